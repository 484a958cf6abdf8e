"""The balanced scoring order: shares are even, and what is chosen and learned has the same bits.

The C++ of ``auto`` scores a query by itself, so its choice does not depend on the rank or on the
other queries of the call: bits are equal on every CPU.
"""

import pytest
import torch

from model.scoring_order import balanced_halves, heaviest, own_halves
from model.sequence_plan import SequenceShard, build_sequence_plan, scoring_work
from parallel.config import CpScoring
from parallel.context_parallel import _SharedQueries
from tests.helpers import run_distributed
from tests.parallel.ranks import alone, forward_backward, gradients, spread
from tests.parallel.test_context_layouts import LENGTHS, compare_step, packed_rows
from tests.parallel.test_context_parallel import documents


@pytest.mark.core
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_one_document_is_scored_in_zig_zag_order(ranks):
    shares = balanced_halves(range(1, 2 * ranks + 1))
    pairs = {frozenset(share) for share in shares}
    assert pairs == {frozenset((h, 2 * ranks - 1 - h)) for h in range(ranks)}


@pytest.mark.core
def test_every_half_is_scored_once_and_one_of_each_rank_stays():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        ranks = int(torch.randint(1, 9, (), generator=generator))
        work = torch.randint(0, 5, (2 * ranks,), generator=generator).tolist()
        shares = balanced_halves(work)
        assert sorted(h for share in shares for h in share) == list(range(2 * ranks))
        assert all(share.kept // 2 == rank for rank, share in enumerate(shares))
        assert heaviest(shares, work) <= heaviest(own_halves(work), work)


@pytest.mark.core
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_last_rank_has_two_cp_minus_one_times_the_work_of_the_first_unless_balanced(ranks):
    """A document of n tokens; entries are closed every 4 tokens, so work is even to 1 / n."""
    ids = documents([[64 * ranks]], 64 * ranks)
    whole = build_sequence_plan(ids, (4,)).compressed[4]
    work = scoring_work(whole.first_BT, whole.stop_BT, ranks)
    own = [sum(work[h] for h in share) for share in own_halves(work)]
    even = [sum(work[h] for h in share) for share in balanced_halves(work)]
    assert own[-1] / own[0] == pytest.approx(2 * ranks - 1, rel=0.2)
    assert max(even) / min(even) == pytest.approx(1, rel=0.05)
    for rank, total in enumerate(even):
        plan = build_sequence_plan(ids, (4,), 1, SequenceShard(rank, ranks, True)).compressed[4]
        scoring, half = plan.scoring, slice(plan.scoring.kept * 32, plan.scoring.kept * 32 + 32)
        here = (plan.stop_BT - plan.first_BT)[:, half].sum()
        assert here + (scoring.stop_BS - scoring.first_BS).sum() == total


def compare_orders(rank, world):
    reference = alone()
    rows = packed_rows(reference.model.config.vocab_size)
    own, _ = spread(reference, {"cp": world})
    even, _ = spread(reference, {"cp": world, "cp_scoring": CpScoring.balanced})
    shared = []

    def step(engine, change=lambda index: index):
        def choose(self, score, real=_SharedQueries.choose):
            shared.append(self)
            return change(real(self, score))

        engine.optimizer.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_SharedQueries, "choose", choose)
            total = forward_backward(engine, rows, len(LENGTHS), 1).total
        return total, gradients(engine)

    total, grads = step(own)
    assert not shared
    same_total, same = step(even)
    assert shared, "no query was scored elsewhere"
    assert torch.equal(total, same_total)
    for name, grad in grads.items():
        assert torch.equal(grad, same[name]), name
    other, _ = step(even, lambda index: torch.cat(index.chunk(2, dim=1)[::-1], dim=1))
    assert not torch.equal(other, total), "halves in the wrong order go unseen"


def test_balanced_order_changes_no_bit():
    run_distributed(compare_orders, 2)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["none", "block", "selective"])
@pytest.mark.parametrize(
    ("world", "degrees"), [(4, {"cp": 4}), (4, {"cp": 2, "pp": 2})], ids=["cp4", "cp2xpp2"]
)
def test_balanced_order_trains_as_one_process(world, degrees, checkpoint):
    degrees = degrees | {"cp_scoring": CpScoring.balanced}
    run_distributed(compare_step, world, degrees, "tiny", 1, checkpoint, {})
