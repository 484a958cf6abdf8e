"""Hyper-connections in Triton against the float64 reference, in the interpreter.

The yardstick is the plain path in fp32, as ``checks.check`` says. Sizes leave the last block of
tokens and of channels partly filled.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model.kernels import mhc
from model.kernels.triton import mhc as triton_mhc
from model.kernels.triton.launch import counted
from tests.helpers import relative
from tests.model.kernels.triton.checks import check, gradients

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def normal(*shape, dtype=F32, size=1.0):
    return (torch.randn(*shape, dtype=torch.float64) * size).to(dtype)


def whole(module, iters):
    """pre, merge and head in one: every gradient reaches every input."""

    def run(x, y, fn, base, scale, head_fn):
        S = x.shape[-2]
        u, mix = module.mhc_pre(x, fn, base, scale, iters, 1e-6, 1e-6)
        new = module.mhc_merge(y + u, mix)
        head = module.mhc_head(new, head_fn, base[:S], scale[:1], 1e-6, 1e-6)
        return u, new, head, mix.post_BTS, mix.comb_BTSS

    return run


def case(B, T, S, D, dtype, size):
    M = (2 + S) * S
    inputs = [
        normal(B, T, S, D, dtype=dtype), normal(B, T, D, dtype=dtype),
        normal(M, S * D, size=size * (S * D) ** -0.5), normal(M, size=size),
        torch.tensor([0.9, 1.3, 1.7]) * size, normal(S, S * D, size=size * (S * D) ** -0.5),
    ]  # fmt: skip
    grads = [
        normal(B, T, D), normal(B, T, S, D), normal(B, T, D), normal(B, T, S), normal(B, T, S, S)
    ]  # fmt: skip
    return inputs, grads


@pytest.mark.parametrize(
    ("B", "T", "S", "D", "dtype", "size", "iters"),
    [
        (1, 19, 4, 70, F32, 1.0, 20),
        (2, 3, 4, 70, F32, 1e-3, 4),
        (2, 9, 4, 64, F16, 1.0, 3),
        (1, 1, 4, 37, F32, 3.0, 20),
        (1, 5, 3, 7, F32, 1.0, 2),
        (1, 3, 1, 16, F32, 1.0, 2),
        (1, 0, 4, 16, F32, 1.0, 2),
    ],
)
def test_mhc_is_the_reference(B, T, S, D, dtype, size, iters):
    inputs, grads = case(B, T, S, D, dtype, size)
    check(whole(triton_mhc, iters), whole(mhc, iters), inputs, grads)


def two_sublayers(module, iters, fused=True):
    """Two sublayers: the second forms the streams while it reads them, or reads what was formed."""

    def run(x, y, z, fn, base, scale, fn_2, base_2, scale_2):
        u, mix = module.mhc_pre(x, fn, base, scale, iters, 1e-6, 1e-6)
        parameters = (fn_2, base_2, scale_2, iters, 1e-6, 1e-6)
        if fused:
            v, mix_2 = module.mhc_merge_pre(y + u, mix, *parameters)
        else:
            v, mix_2 = module.mhc_pre(module.mhc_merge(y + u, mix), *parameters)
        return u, v, module.mhc_merge(z + v, mix_2), mix_2.post_BTS, mix_2.comb_BTSS

    return run


def two_sublayers_case(B, T, S, D, dtype, size):
    (x, y, fn, base, scale, _), grads = case(B, T, S, D, dtype, size)
    (_, z, *second, _), _ = case(B, T, S, D, dtype, size)
    return [x, y, z, fn, base, scale, *second], [grads[0], grads[2], grads[1], *grads[3:]]


@pytest.mark.parametrize(
    ("B", "T", "S", "D", "dtype", "size", "iters"),
    [
        (2, 9, 4, 70, F32, 1.0, 3),
        (1, 3, 4, 130, F32, 1e-3, 2),
        (1, 5, 4, 37, F16, 1.0, 2),
        (1, 1, 3, 7, F32, 3.0, 20),
        (1, 0, 4, 16, F32, 1.0, 2),
    ],
)
def test_a_merge_with_the_next_pre_is_the_reference(B, T, S, D, dtype, size, iters):
    inputs, grads = two_sublayers_case(B, T, S, D, dtype, size)
    plain = two_sublayers(mhc, iters)
    # A scale's gradient is that of its bases times the mix, of about this size, summed: the terms
    # cancel. The second sublayer adds its roundings to those of the first.
    bases = gradients(plain, inputs, grads)[1]
    norms = {n: bases[n - 1].norm() * max(size, 1.0) for n in (5, 8)}
    twice = 16 * 2.0**-24
    check(two_sublayers(triton_mhc, iters), plain, inputs, grads, norms, least=twice)


def test_one_pass_for_a_merge_and_a_pre_gives_the_streams_bit_for_bit():
    inputs, grads = two_sublayers_case(1, 5, 4, 70, F32, 1.0)
    given = [None, None, grads[2], None, None]
    runs, counts = [], []
    for fused in (True, False):
        with counted() as launches:
            runs.append(gradients(two_sublayers(triton_mhc, 2, fused), inputs, given)[1])
        counts.append(sum(launches.values()))
    assert counts[0] == counts[1] - 2  # mhc_mix and mhc_merge_streams_backward are gone
    mixed = [
        op(inputs[1], triton_mhc.mhc_pre(inputs[0], *inputs[3:6], 2, 1e-6, 1e-6)[1])
        for op in (
            lambda y, m: triton_mhc.mhc_merge(y, m),
            lambda y, m: triton_mhc.mhc_merge_pre(y, m, *inputs[6:], 2, 1e-6, 1e-6)[1].x_BTSD,
        )
    ]
    assert torch.equal(*mixed)
    for ours, theirs in zip(*runs, strict=True):
        assert relative(ours, theirs) < 1e-5


def test_the_streams_after_a_merge_of_bf16_are_bf16():
    inputs, _ = two_sublayers_case(1, 3, 4, 16, BF16, 1.0)
    ours = two_sublayers(triton_mhc, 2)(*inputs)
    assert [o.dtype for o in ours] == [BF16, BF16, BF16, F32, F32]
    for mine, plain in zip(ours, two_sublayers(mhc, 2)(*inputs), strict=True):
        torch.testing.assert_close(mine, plain, rtol=0.05, atol=0.05)


def test_one_iteration_and_outputs_that_nobody_reads():
    (x, y, *parameters), grads = case(1, 6, 4, 16, F32, 1.0)
    given = [None, grads[1], *grads[2:4], None]
    # Tokens' gradients of the three scales cancel: errors go by the terms.
    terms = [
        gradients(
            whole(mhc, 1), [x[:, t : t + 1], y[:, t : t + 1], *parameters],
            [g if g is None else g[:, t : t + 1] for g in given],
        )[1][4].norm()
        for t in range(6)
    ]  # fmt: skip
    inputs = [x, y, *parameters]
    check(whole(triton_mhc, 1), whole(mhc, 1), inputs, given, norms={4: sum(terms)})


def test_bf16_streams_keep_their_dtype_and_the_fp32_of_parameters():
    inputs, _ = case(1, 6, 4, 16, BF16, 1.0)
    outputs = whole(triton_mhc, 2)(*inputs)
    assert [o.dtype for o in outputs] == [BF16, BF16, BF16, F32, F32]
    plain = whole(mhc, 2)(*inputs)
    for ours, theirs in zip(outputs, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_what_is_not_finite_stays_so():
    inputs, _ = case(1, 6, 4, 16, F32, 1.0)
    inputs[0][0, 2, 1, 3], inputs[0][0, 4, 0, 0] = float("nan"), float("inf")
    for ours, theirs in zip(whole(triton_mhc, 2)(*inputs), whole(mhc, 2)(*inputs), strict=True):
        assert torch.equal(ours.isfinite(), theirs.isfinite())


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize(("form", "make"), [(whole, case), (two_sublayers, two_sublayers_case)])
def test_a_step_traces_and_reads_nothing(kind, form, make):
    inputs, _ = make(1, 6, 4, 16, F32, 1.0)
    real = form(triton_mhc, 2)(*inputs)
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    traced = [mode.from_tensor(x) if kind == "fake" else x.to("meta") for x in inputs]
    traced = [x.requires_grad_() for x in traced]
    with mode if kind == "fake" else torch.device("meta"), counted() as launches:
        outputs = form(triton_mhc, 2)(*traced)
        sum(o.float().sum() for o in outputs).backward()
    assert [(o.shape, o.dtype) for o in outputs] == [(o.shape, o.dtype) for o in real]
    assert [x.grad.shape for x in traced] == [x.shape for x in inputs]
    assert launches["mhc_streams_backward"] == 2


def test_a_planted_fault_is_caught(monkeypatch):
    inputs, grads = case(1, 6, 4, 16, F32, 1.0)
    plain = triton_mhc._OPS.pre_backward

    def no_shrink(*arguments):  # drops the RMS from the gradient
        x, *rest = arguments
        grad_x, *others = plain(*arguments)
        return grad_x + 1e-4 * x, *others

    broken = triton_mhc._OPS._replace(pre_backward=no_shrink)
    monkeypatch.setattr(
        triton_mhc, "mhc_pre", lambda *a: triton_mhc.mhc_fast.mhc_pre(*a, ops=broken)
    )
    with pytest.raises(AssertionError, match="gradient 0"):
        check(whole(triton_mhc, 2), whole(mhc, 2), inputs, grads)
