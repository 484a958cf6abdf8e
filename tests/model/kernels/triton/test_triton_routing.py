"""The gate, the order by expert, load and balance in Triton, in the interpreter.

Choices and counts are those of the reference exactly; scores and gradients go against float64.
"""

import pytest
import torch

from model.kernels import routing as plain
from model.kernels.triton import routing
from model.kv_exchange import WholeRows
from model.sequence_plan import build_sequence_plan
from tests.model.kernels.triton.checks import check, poisoned, shuffled


def valid_of(tokens):
    return torch.arange(tokens) % 7 != 3


@pytest.mark.parametrize(
    ("N", "E", "K", "given"),
    [(1, 1, 1, False), (33, 6, 2, False), (20, 64, 6, False), (9, 40, 8, True), (5, 3, 3, True)],
)
def test_gate_is_the_reference(N, E, K, given):
    logits, bias = torch.randn(N, E) * 4, torch.randn(E)
    index = torch.stack([torch.randperm(E)[:K] for _ in range(N)]) if given else None
    grads = [None, torch.randn(N, K), torch.randn(N, E)]

    def of(module):
        return lambda x, b: tuple(module.route(x, valid_of(N), b.float(), index, K, 1.5))

    with torch.no_grad():
        ours, theirs = of(routing)(logits, bias), of(plain)(logits, bias)
    assert torch.equal(ours[0], theirs[0])

    def chosen(module):  # the bias chooses and has no gradient
        return lambda x: tuple(
            module.route(x, valid_of(N), None if given else bias, index, K, 1.5)[1:]
        )

    # Weights are 0 gradient in sum along a token's scores: errors go by the terms.
    norm = grads[1].norm() + grads[2].norm()
    check(chosen(routing), chosen(plain), [logits], grads[1:], norms={0: norm})


def test_equal_scores_go_to_the_lower_expert_and_what_is_not_finite_to_some():
    logits = torch.zeros(4, 9)
    logits[1, 4], logits[2], logits[3, 2] = float("nan"), float("-inf"), float("inf")
    for module in (plain, routing):
        index, weight, _ = module.route(logits, valid_of(4), torch.zeros(9), None, 3, 1.0)
        assert index.tolist() == [[0, 1, 2], [4, 0, 1], [0, 1, 2], [2, 0, 1]]
        assert weight.isfinite().tolist()[0] == [True] * 3


@pytest.mark.parametrize(("N", "E", "K"), [(1, 1, 1), (37, 5, 3), (70, 64, 6), (8, 33, 2)])
def test_order_is_the_reference(N, E, K):
    index = torch.rand(N, E).argsort(1)[:, :K]
    want = plain.expert_order(index, E)
    for seed in (0, 1):
        with poisoned(), shuffled(seed):
            got = routing.expert_order(index, E)
        for ours, theirs in zip(got, want, strict=True):
            assert torch.equal(ours.long(), theirs.long())
    assert got.offsets_E.dtype == torch.int32


def test_balance_of_one_token():
    plan, index = build_sequence_plan(torch.tensor([[0]]), ()), torch.tensor([[2, 0]])

    def of(module):
        return lambda s: module.load_and_balance(index, s, plan, WholeRows(), balance=True)[1]

    check(of(routing), of(plain), [torch.rand(1, 3)], [torch.tensor(0.7)])


@pytest.mark.parametrize("balance", [True, False])
def test_load_and_balance_are_the_references(balance):
    ids = torch.tensor([[0] * 31 + [1] * 50 + [-1] * 15, [2] * 95 + [3]])
    plan, E, K = build_sequence_plan(ids, ()), 12, 3
    index = torch.rand(ids.numel(), E).argsort(1)[:, :K]
    score = torch.rand(ids.numel(), E)
    load, loss = routing.load_and_balance(index, score, plan, WholeRows(), balance=balance)
    want_load, want = plain.load_and_balance(index, score, plan, WholeRows(), balance=balance)
    assert torch.equal(load, want_load)
    assert load.dtype == want_load.dtype
    if not balance:
        assert loss is None
        return

    def of(module):
        return lambda s: module.load_and_balance(index, s, plan, WholeRows(), balance=True)[1]

    check(of(routing), of(plain), [score], [torch.tensor(0.7)])
    assert abs(float(loss) - float(want)) < 1e-5 * float(want)
