"""Cross-entropy in Triton against float64, in the interpreter."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model.kernels.cross_entropy import cross_entropy_rows as plain_rows
from model.kernels.triton.cross_entropy import OPS, cross_entropy_rows
from model.loss import cross_entropy_sum
from tests.model.kernels.triton.checks import distance, poisoned, shuffled

F32, F16 = torch.float32, torch.float16
# The gradient is rounded once; fp32: some roundings of exp and the sum. The loss is fp32 always.
BOUNDS = {F32: 1e-6, F16: 2.0**-11 + 1e-6}


def exact_rows(logits, labels):
    logits = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(
        logits, labels.clamp(min=-1), ignore_index=-1, reduction="none"
    )
    losses.sum().backward()
    return losses.detach(), logits.grad


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize(("N", "V"), [(5, 1300), (1, 1), (3, 512), (0, 7)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_loss_and_gradient_are_exact_to_their_rounding(dtype, N, V, size):
    logits, labels = torch.randn(N, V) * size, torch.randint(-1, V, (N,))
    losses, grad = exact_rows(logits, labels)
    runs = []
    for seed in (0, 1):
        with poisoned(), shuffled(seed):
            runs.append(cross_entropy_rows(logits.clone(), labels, dtype))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    ours, ours_grad = runs[0]
    assert (ours.dtype, ours_grad.dtype) == (F32, dtype)
    assert distance(ours, losses) < 1e-6
    assert distance(ours_grad, grad) <= BOUNDS[dtype]
    without, none = cross_entropy_rows(logits.clone(), labels, None)
    assert none is None
    assert torch.equal(without, ours)


def test_the_head_learns_through_it():
    x, w, labels = torch.randn(7, 16), torch.randn(40, 16), torch.randint(-1, 40, (7,))
    found = []
    for rows in (plain_rows, cross_entropy_rows):
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        loss = cross_entropy_sum(*leaves, labels, 3, F32, rows)
        loss.backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


def test_what_is_not_finite_stays_so_and_minus_infinity_is_no_choice():
    logits, labels = torch.randn(5, 1030), torch.tensor([3, -1, 5, 1029, 2])
    logits[0, 600], logits[1, 2], logits[3, 0] = float("nan"), float("nan"), float("inf")
    logits[4, :] = -float("inf")
    logits[4, 600:] = 1.0
    logits[2, :513] = -float("inf")
    labels[2], labels[4] = 700, 800
    plain = plain_rows(logits.clone(), labels, F32)
    ours = cross_entropy_rows(logits.clone(), labels, F32)
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        torch.testing.assert_close(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("dtype", [F32, F16])
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_a_call_traces_and_reads_nothing(kind, dtype):
    mode = FakeTensorMode()
    real = torch.randn(3, 8), torch.tensor([1, -1, 7])
    logits, labels = (mode.from_tensor(t) if kind == "fake" else t.to("meta") for t in real)
    with mode if kind == "fake" else torch.device("meta"):
        losses, grad = cross_entropy_rows(logits, labels, dtype)
    assert (losses.shape, grad.shape, grad.dtype) == ((3,), (3, 8), dtype)


def test_operator_is_well_formed():
    arguments = (torch.randn(3, 8), torch.tensor([1, -1, 7]), torch.empty(3, 8))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(OPS.triton_cross_entropy_rows_, arguments, test_utils=tests)


def test_a_planted_fault_is_caught():
    """Labels shifted by one token, as a wrong place of the -1 would be."""
    logits, labels = torch.randn(4, 9), torch.tensor([0, 3, -1, 7])
    _, grad = exact_rows(logits, labels)
    _, wrong = cross_entropy_rows(logits.clone(), labels + (labels >= 0), F32)
    assert distance(wrong, grad) > BOUNDS[F32]
