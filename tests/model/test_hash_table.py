"""The hash-routing table: distinct experts, balanced load, seeded.

The bounds on the load follow from the greedy rule: an expert receives a token only while it is
among the least loaded, so two experts differ by at most one count.
"""

import pytest
import torch

from model.moe.hash_table import build_table
from tests.helpers import table_load

pytestmark = pytest.mark.core


def zipf_counts(vocab_size: int) -> torch.Tensor:
    return (1e6 / torch.arange(1, vocab_size + 1, dtype=torch.float64)).long()


def greedy_oracle_loads(counts: list[int], num_experts: int, k: int) -> list[int]:
    """Sorted final loads of the greedy rule (ties do not matter to them)."""
    loads = [0] * num_experts
    for count in sorted(counts, reverse=True):
        loads.sort()
        loads[:k] = [load + count for load in loads[:k]]
    return sorted(loads)


def assert_rows_distinct(table: torch.Tensor, num_experts: int) -> None:
    ordered = table.sort(dim=1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    assert 0 <= int(table.min())
    assert int(table.max()) < num_experts


def test_released_size_is_balanced_and_distinct():
    table = build_table(129280, 256, 6, seed=1)
    assert table.dtype == torch.int64
    assert table.shape == (129280, 6)
    assert_rows_distinct(table, 256)
    load = table_load(table, 256)
    assert int(load.sum()) == 129280 * 6
    assert int(load.max() - load.min()) <= 1


@pytest.mark.parametrize(
    ("vocab", "experts", "k"), [(1000, 16, 2), (500, 7, 3), (64, 6, 6), (3, 5, 1)]
)
def test_loads_equal_the_greedy_rule(vocab: int, experts: int, k: int):
    counts = zipf_counts(vocab)[torch.randperm(vocab, generator=torch.Generator().manual_seed(3))]
    table = build_table(vocab, experts, k, seed=5, token_counts_V=counts)
    assert_rows_distinct(table, experts)
    loads = sorted(table_load(table, experts, counts).tolist())
    assert loads == greedy_oracle_loads(counts.tolist(), experts, k)


def test_frequencies_balance_better_than_uniform_assumption():
    counts = zipf_counts(4096)
    spread = {}
    for name, known in (("known", counts), ("unknown", None)):
        table = build_table(4096, 16, 2, seed=0, token_counts_V=known)
        load = table_load(table, 16, counts).double()
        spread[name] = float(load.std() / load.mean())
    assert spread["known"] < 0.2 * spread["unknown"]


def test_unseen_tokens_spread_over_the_experts():
    counts = torch.zeros(1000, dtype=torch.int64)
    counts[:4] = 2
    table = build_table(1000, 8, 2, seed=0, token_counts_V=counts)
    unseen_load = table_load(table[4:], 8)
    assert int(unseen_load.max() - unseen_load.min()) <= 4


def test_ties_are_random_so_that_pairs_of_experts_vary():
    table = build_table(2000, 16, 2, seed=0).sort(dim=1).values
    pairs = {tuple(row) for row in table.tolist()}
    assert len(pairs) > 100  # of 120; fixed groups would give 8


def test_same_seed_same_table_other_seed_another():
    first = build_table(300, 16, 2, seed=7)
    assert torch.equal(first, build_table(300, 16, 2, seed=7))
    assert not torch.equal(first, build_table(300, 16, 2, seed=8))


def test_impossible_requests_name_both_values():
    with pytest.raises(ValueError, match=r"num_experts_per_tok=5.*n_routed_experts=4"):
        build_table(10, 4, 5, seed=0)
    with pytest.raises(ValueError, match=r"\[9\].*vocab_size=10"):
        build_table(10, 4, 2, seed=0, token_counts_V=torch.ones(9))
    with pytest.raises(ValueError, match=r"id 3 has -1"):
        build_table(4, 4, 2, seed=0, token_counts_V=torch.tensor([1, 1, 1, -1]))
