"""RMSNorm and RoPE in Triton against float64, in the interpreter."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model.kernels import elementwise
from model.kernels.triton import norm_rope
from model.rope import apply_rope, rope_tables
from tests.model.kernels.triton.checks import ROUNDING, check

DTYPES = list(ROUNDING)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "size"), [((1, 1), 1.0), ((3, 70, 5), 1e-4), ((33, 130), 8.0), ((0, 8), 1.0)]
)
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm_is_the_reference(dtype, shape, size, weighted):
    x = (torch.randn(shape) * size).to(dtype)
    weight = torch.rand(shape[-1]) + 0.5 if weighted else None
    grad = torch.randn(shape)
    # Along x the gradient cancels (of one channel all of it): errors go by the terms.
    scale = (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    terms = grad * scale * (1.0 if weight is None else weight)
    inputs = [x, weight, 1e-6]
    check(norm_rope.rms_norm, elementwise.rms_norm, inputs, [grad], norms={0: terms.norm()})


def test_weight_gradient_sums_many_runs(monkeypatch):
    monkeypatch.setattr(norm_rope, "_RUNS", 3)
    monkeypatch.setitem(norm_rope._ELEMENTS, "interpreter", 16)
    x, weight = torch.randn(41, 6), torch.rand(6)
    check(norm_rope.rms_norm, elementwise.rms_norm, [x, weight, 1e-6], [torch.randn(41, 6)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lead", "K", "R"),
    [((1, 1), 64, 32), ((2, 7), 80, 32), ((2, 5, 3), 96, 16), ((1, 3, 128), 12, 3),
     ((1, 2, 1), 512, 32), ((2, 0), 8, 2)],
)  # fmt: skip
def test_rope_is_the_reference(dtype, lead, K, R):
    x = torch.randn(*lead, K).to(dtype)
    positions = torch.arange(lead[0] * lead[1]).view(lead[:2]) * 1000
    cos, sin = rope_tables(positions, torch.rand(R, dtype=torch.float64))
    for sign in (1.0, -1.0):
        check(
            lambda x, s=sign: norm_rope.rope(x, cos, s * sin),
            lambda x, s=sign: apply_rope(x, cos, s * sin),
            [x], [torch.randn(*lead, K)],
        )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("lead", "K", "R"), [((2, 7), 80, 32), ((2, 3, 3), 16, 8), ((1, 1), 2, 1)])
def test_norm_and_rope_in_one_pass(dtype, weighted, lead, K, R):
    x, weight = torch.randn(*lead, K).to(dtype), torch.rand(K) + 0.5 if weighted else None
    positions = torch.arange(lead[0] * lead[1]).view(lead[:2]) * 1000
    cos, sin = rope_tables(positions, torch.rand(R, dtype=torch.float64))
    grad = torch.randn(*lead, K)
    scale = (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    terms = grad * scale * (1.0 if weight is None else weight)
    check(
        lambda x, w: norm_rope.norm_rope(x, w, 1e-6, cos, sin),
        lambda x, w: apply_rope(elementwise.rms_norm(x, w, 1e-6), cos, sin),
        [x, weight], [grad], norms={0: terms.norm()},
    )  # fmt: skip


def test_rope_back_is_the_inverse():
    x, angle = torch.randn(2, 4, 8), torch.rand(2, 4, 3)
    table = angle.cos(), angle.sin()
    torch.testing.assert_close(norm_rope.rope_back(norm_rope.rope(x, *table), *table), x)


def test_one_table_serves_every_row():
    x, angle = torch.randn(3, 4, 2, 8), torch.rand(1, 4, 2)
    expected = apply_rope(x, angle.cos(), angle.sin())
    torch.testing.assert_close(norm_rope.rope(x, angle.cos(), angle.sin()), expected)


def test_what_is_not_finite_stays_so():
    x = torch.randn(4, 8)
    x[1, 2], x[3, 7] = float("nan"), float("inf")
    plain, ours = (m.rms_norm(x, None, 1e-6) for m in (elementwise, norm_rope))
    assert torch.equal(ours.isfinite(), plain.isfinite())
    cos = sin = torch.ones(1, 4, 2)
    plain, ours = apply_rope(x[None], cos, sin), norm_rope.rope(x[None], cos, sin)
    assert torch.equal(ours.isfinite(), plain.isfinite())


def test_bf16_keeps_its_dtype_and_fp32_that_of_the_weight():
    x, weight = torch.randn(5, 8).bfloat16().requires_grad_(), torch.rand(8, requires_grad=True)
    y = norm_rope.rms_norm(x, weight, 1e-6)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, weight.grad.dtype) == (y.dtype, x.dtype, torch.float32)
    torch.testing.assert_close(y, elementwise.rms_norm(x, weight, 1e-6), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_a_step_traces_and_reads_nothing(kind):
    mode = FakeTensorMode()
    real = torch.randn(2, 3, 8), torch.rand(8), torch.rand(2, 3, 2)
    x, weight, angle = (mode.from_tensor(t) if kind == "fake" else t.to("meta") for t in real)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    with mode if kind == "fake" else torch.device("meta"):
        y = norm_rope.rope(norm_rope.rms_norm(x, weight, 1e-6), angle.cos(), angle.sin())
        y.sum().backward()
    assert (y.shape, x.grad.shape, weight.grad.shape) == (x.shape, x.shape, weight.shape)


def test_operators_are_well_formed():
    x, weight = torch.randn(3, 8), torch.rand(8)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        norm_rope.OPS.triton_rms_norm, (x, weight, None, None, 1e-6), test_utils=tests
    )
    arguments = (x[None], torch.rand(1, 3, 2), torch.rand(1, 3, 2), 1.0)
    torch.library.opcheck(norm_rope.OPS.triton_rope, arguments, test_utils=tests)


def test_a_planted_fault_is_caught(monkeypatch):
    plain = norm_rope.OPS.triton_rms_norm_backward

    def broken(*inputs):
        return plain(*inputs[:-1], inputs[-1] + 1e-4)

    operators = SimpleNamespace(
        triton_rms_norm=norm_rope.OPS.triton_rms_norm, triton_rms_norm_backward=broken
    )
    monkeypatch.setattr(norm_rope, "OPS", operators)
    inputs = [torch.randn(4, 8), torch.rand(8), 1e-6]
    with pytest.raises(AssertionError, match="gradient"):
        check(norm_rope.rms_norm, elementwise.rms_norm, inputs, [torch.randn(4, 8)])
