"""The experts' matmuls and moves in Triton against float64, in the interpreter."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from model.config import Kernels
from model.kernels import gather
from model.kernels.triton import grouped
from model.linear import block_linear_loop, linear_op
from model.moe.dispatch import LocalDispatcher
from tests.model.kernels.triton.checks import ROUNDING, check, gradients, poisoned, shuffled

DTYPES = list(ROUNDING)


def offsets_of(counts):
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def loop(x, w, offsets):
    """The definition, one expert after the other; torch's grouped_mm has no float64."""
    ends = offsets.tolist()
    parts = [
        F.linear(x[a:b], w[e].to(x.dtype))
        for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False))
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("counts", "width", "outs", "size"),
    [
        ([17, 0, 1, 15], 40, 70, 1.0),
        ([0, 0, 5], 33, 7, 1e-3),
        ([1], 1, 1, 1.0),
        ([0, 33, 0], 16, 16, 4.0),
        ([0, 0], 8, 8, 1.0),
    ],
)
def test_grouped_linear_is_the_definition(dtype, counts, width, outs, size):
    x, w = torch.randn(sum(counts), width), torch.randn(len(counts), outs, width) * size
    grads = [torch.randn(sum(counts), outs)]
    check(grouped.grouped_linear, loop, [x.to(dtype), w.to(dtype), offsets_of(counts)], grads)


def test_fp32_masters_get_gradients_that_are_rounded_once():
    counts = [3, 0, 14]
    x, w = torch.randn(17, 24).half(), torch.randn(3, 10, 24)
    check(grouped.grouped_linear, loop, [x, w, offsets_of(counts)], [torch.randn(17, 10)])


def test_rows_behind_the_last_offset_touch_nothing():
    x, w, offsets = torch.randn(20, 8), torch.randn(2, 4, 8), offsets_of([3, 5])
    w.requires_grad_()
    x[8:] = float("nan")
    y = grouped.grouped_linear(x, w, offsets)
    y[:8].sum().backward()
    torch.testing.assert_close(y[:8], loop(x[:8], w, offsets))
    assert w.grad.isfinite().all()


def test_bf16_is_the_reference_to_its_rounding():
    x, w = torch.randn(9, 16).bfloat16(), torch.randn(3, 8, 16)
    y = grouped.grouped_linear(x, w, offsets_of([4, 0, 5]))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, loop(x, w, offsets_of([4, 0, 5])), rtol=0.05, atol=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "K", "C"), [(13, 3, 40), (1, 1, 1), (5, 8, 1100), (0, 2, 4)])
def test_moves_are_the_references(dtype, T, K, C):
    copy = torch.randperm(T * K)
    place, token = copy.argsort().view(T, K), copy // K
    x, rows, plus = (torch.randn(n, C).to(dtype) for n in (T, T * K, T))
    weight = torch.rand(T, K)
    # the references keep sums in fp32 in a float64 pass too: equal bits are asked for
    cases = (
        ("send", (x, weight), (token, copy, place)),
        ("collect", (rows,), (token, place)),
        ("collect", (rows,), (token, place, plus, dtype)),
    )
    for name, tensors, rest in cases:
        results = []
        for seed, module in enumerate((gather, grouped)):
            leaves = [t.clone().requires_grad_() for t in tensors]
            with poisoned(), shuffled(seed):
                out = getattr(module, name)(*leaves, *rest)
                out = out if isinstance(out, tuple) else (out,)
                torch.autograd.backward(out, [torch.ones_like(o).cumsum(0) for o in out])
            results.append([*out, *(leaf.grad for leaf in leaves)])
        for theirs, ours in zip(*results, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)


def test_plus_has_a_gradient():
    rows, place = torch.randn(6, 4).half(), torch.arange(6).view(3, 2)
    plus = torch.zeros(3, 4).half().requires_grad_()
    grouped.collect(rows, place.flatten() // 2, place, plus, torch.float32).sum().backward()
    assert torch.equal(plus.grad, torch.ones(3, 4).half())


def test_moves_serve_the_dispatcher():
    x, index, weight = torch.randn(6, 8), torch.rand(6, 4).argsort(1)[:, :2], torch.rand(6, 2)
    results = []
    for kernels in (Kernels.fast, Kernels.triton):
        dispatcher = LocalDispatcher(kernels)
        sent = dispatcher.dispatch(x, index, weight, 4)
        out = dispatcher.combine(sent.rows_RD, sent, x, torch.float32)
        results.append((sent.rows_RD, sent.weight_R, sent.offsets_E, out))
    for plain, ours in zip(*results, strict=True):
        assert torch.equal(plain, ours)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_product_serves_all_blocks(dtype):
    x, w = torch.randn(3, 5, 2, 12).to(dtype), torch.randn(14, 12)
    copy = w.to(dtype)
    grads = [torch.randn(3, 5, 14)]

    def of(blocks):
        return lambda x, w: blocks(linear_op, x, 2, w, *([copy] if w.dtype != x.dtype else []))

    check(of(grouped.block_linear), of(block_linear_loop), [x, w.to(dtype)], grads)
    ours, theirs = (
        gradients(of(b), [x, w], grads) for b in (grouped.block_linear, block_linear_loop)
    )
    for a, b in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
        assert a.dtype == b.dtype


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_expert(value):
    x, w, offsets = torch.randn(6, 8), torch.randn(2, 4, 8), offsets_of([2, 4])
    x[3, 1] = value
    ours, plain = grouped.grouped_linear(x, w, offsets), loop(x, w, offsets)
    assert torch.equal(ours.isfinite(), plain.isfinite())


@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_a_step_traces_and_reads_nothing(kind):
    mode = FakeTensorMode()
    real = torch.randn(6, 8), torch.randn(3, 4, 8), offsets_of([2, 0, 4])
    x, w, offsets = (mode.from_tensor(t) if kind == "fake" else t.to("meta") for t in real)
    x, w = x.requires_grad_(), w.requires_grad_()
    with mode if kind == "fake" else torch.device("meta"):
        y = grouped.grouped_linear(x, w, offsets)
        y.sum().backward()
    assert (y.shape, x.grad.shape, w.grad.shape) == ((6, 4), x.shape, w.shape)


def test_operators_are_well_formed():
    x, w, offsets = torch.randn(6, 8), torch.randn(3, 4, 8), offsets_of([2, 0, 4])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(grouped.OPS.triton_grouped, (x, w, offsets, False), test_utils=tests)
    torch.library.opcheck(
        grouped.OPS.triton_grouped_weight_gradient,
        (torch.randn(6, 4), x, offsets, torch.float32), test_utils=tests,
    )  # fmt: skip


def test_a_planted_fault_is_caught(monkeypatch):
    """Offsets shifted by a row: the first row of an expert goes to the one before."""
    counts = [3, 4, 2]
    inputs = [torch.randn(9, 8), torch.randn(3, 4, 8), offsets_of(counts)]
    shifted = [2, 1, 0]
    with pytest.raises(AssertionError, match="output 0"):
        check(
            lambda x, w, o: grouped.grouped_linear(x, w, o + torch.tensor(shifted).int()),
            loop, inputs, [torch.randn(9, 4)],
        )  # fmt: skip
