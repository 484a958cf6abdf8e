"""RMSNorm, SwiGLU and RoPE: formulas in float64, then the plain references, then the compiled pass.

Bound as in test_mhc_fast: at most twice the error of the reference, with a floor of 1e-6 in fp32
and of 1e-3 in bf16. Widths leave the last vector of a row partly filled.
"""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model.kernels import elementwise, elementwise_fast
from model.rope import apply_rope

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
LIMIT = 10.0


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def oracle_rms_norm(x, weight, eps):
    rows = [
        [v / math.sqrt(sum(u * u for u in row) / len(row) + eps) for v in row]
        for row in x.flatten(0, -2).tolist()
    ]
    y = torch.tensor(rows, dtype=F64).view(x.shape)
    return y if weight is None else y * weight


def oracle_swiglu(gate, up, weight):
    """Values and gradients of the sum, element by element."""
    out = torch.zeros(4, *gate.shape, dtype=F64)
    for n in range(gate.shape[0]):
        for i in range(gate.shape[1]):
            g, v, w = gate[n, i].item(), up[n, i].item(), weight[n].item()
            gc, vc = min(g, LIMIT), max(-LIMIT, min(v, LIMIT))
            s = 1 / (1 + math.exp(-gc))
            dgate = w * vc * s * (1 + gc * (1 - s)) if g < LIMIT else 0.0
            dup = w * gc * s if abs(v) < LIMIT else 0.0
            values = [gc * s * vc * w, dgate, dup, gc * s * vc]
            out[:, n, i] = torch.tensor(values, dtype=F64)
    return out[0], out[1], out[2], out[3].sum(1)


def oracle_rope(x, cos, sin):
    """Each pair of the last 2R channels as a complex number times cos + i sin."""
    y, R = x.clone(), cos.shape[-1]
    for p in range(R):
        c, s = cos[..., p], sin[..., p]
        if x.dim() == 4:
            c, s = c[..., None], s[..., None]
        at = x.shape[-1] - 2 * R + 2 * p
        turned = torch.complex(x[..., at], x[..., at + 1]) * torch.complex(c, s)
        y[..., at], y[..., at + 1] = turned.real, turned.imag
    return y


def run(f, inputs, dtypes, grad, *rest):
    """Result and gradients of ``f`` for float64 inputs brought to ``dtypes``."""
    leaves = [
        None if t is None else t.clone().to(d).requires_grad_()
        for t, d in zip(inputs, dtypes, strict=True)
    ]
    y = f(*leaves, *rest)
    y.backward(grad.to(y.dtype))
    return [y.detach(), *(t.grad for t in leaves if t is not None)]


def check(reference, fast, inputs, dtypes, grad, *rest):
    exact = run(reference_in_f64(reference), inputs, [F64] * len(inputs), grad, *rest)
    plain, fused = (run(f, inputs, dtypes, grad, *rest) for f in (reference, fast))
    floor = 1e-6 if dtypes[0] is F32 else 1e-3
    for want, a, b in zip(exact, plain, fused, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        bound = 2 * (a.double() - want).norm() + floor * want.norm()
        assert (b.double() - want).norm() <= bound


def reference_in_f64(reference):
    """The references compute in fp32; for float64 leaves let ``.float()`` keep them."""

    def wide(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            return reference(*args)

    return wide


@pytest.mark.core
def test_references_equal_the_formulas():
    x, weight = normal(3, 5, 7), normal(7, seed=1)
    for w in (weight, None):
        got = reference_in_f64(elementwise.rms_norm)(x, w, 1e-6)
        assert (got - oracle_rms_norm(x, w, 1e-6)).abs().max() < 1e-12
    gate, up, weight = normal(5, 6) * 9, normal(5, 6, seed=1) * 9, normal(5, seed=2)
    f = reference_in_f64(elementwise.swiglu)
    got = run(f, (gate, up, weight), [F64] * 3, torch.ones(5, 6), LIMIT)
    for a, b in zip(got, oracle_swiglu(gate, up, weight), strict=True):
        assert (a - b).abs().max() < 1e-12
    cos, sin = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    for x in (normal(2, 3, 11), normal(2, 3, 5, 8)):
        got = reference_in_f64(apply_rope)(x, cos, sin)
        assert (got - oracle_rope(x, cos, sin)).abs().max() < 1e-12


@pytest.mark.core
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("width", [64, 37, 5])
@pytest.mark.parametrize("weighted", [True, False])
def test_fused_rms_norm(width, weighted, dtype):
    inputs = (normal(3, 9, width).to(dtype), normal(width, seed=1).to(F32) if weighted else None)
    assert elementwise_fast.compiled(inputs[0])
    grad = normal(3, 9, width, seed=2).to(dtype)
    check(elementwise.rms_norm, elementwise_fast.rms_norm, inputs, (dtype, F32), grad, 1e-6)


def test_fused_rms_norm_keeps_eps_inside_the_root():
    x = normal(4, 16).float() * 1e-4
    want = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(elementwise_fast.rms_norm(x, None, 1e-6), want, rtol=1e-5)


@pytest.mark.core
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("width", [64, 21])
@pytest.mark.parametrize("weighted", [True, False])
def test_fused_swiglu(width, weighted, dtype):
    """About a third of the elements is clamped."""
    gate, up = ((normal(11, width, seed=s) * 9).to(dtype) for s in (0, 1))
    inputs = (gate, up, normal(11, seed=2).to(F32) if weighted else None)
    grad = normal(11, width, seed=3).to(dtype)
    check(elementwise.swiglu, elementwise_fast.swiglu, inputs, (dtype, dtype, F32), grad, LIMIT)


def test_fused_swiglu_gives_clamped_elements_no_gradient():
    gate = torch.tensor([[10.5, 9.5, -30.0, 10.0]], requires_grad=True)
    up = torch.tensor([[1.0, -10.5, 10.5, -10.0]], requires_grad=True)
    elementwise_fast.swiglu(gate, up, None, LIMIT).sum().backward()
    assert (gate.grad != 0).tolist() == [[False, True, True, True]]
    assert (up.grad != 0).tolist() == [[True, False, False, True]]


@pytest.mark.core
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(2, 5, 48), (2, 5, 3, 40), (1, 4, 2, 10)])
def test_fused_rope(shape, dtype):
    cos, sin = (normal(*shape[:2], 5, seed=s).float() for s in (1, 2))
    x, grad = normal(*shape).to(dtype), normal(*shape, seed=3).to(dtype)
    check(apply_rope, elementwise_fast.rope, (x,), (dtype,), grad, cos, sin)
    back = elementwise_fast.rope(elementwise_fast.rope(x.float(), cos, sin), cos, -sin)
    scale = torch.ones_like(back)
    turned = (cos**2 + sin**2).repeat_interleave(2, -1)
    scale[..., -10:] = turned if len(shape) == 3 else turned[:, :, None]
    assert torch.allclose(back, x.float() * scale, atol=2e-5)


def test_fused_rope_takes_strided_tensors_and_tables_shared_by_rows():
    x = normal(3, 4, 6, 20).float().transpose(1, 2)
    cos, sin = (normal(1, 6, 5, seed=s).float() for s in (1, 2))
    want = apply_rope(x, cos, sin)
    assert torch.allclose(elementwise_fast.rope(x, cos, sin), want, atol=1e-6)


def test_rows_do_not_depend_on_each_other_or_on_threads():
    x, weight = normal(33, 40).float(), normal(40, seed=1).float()
    gate, up, w = normal(33, 40).float(), normal(33, 40, seed=1).float(), normal(33).float()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        norm = elementwise_fast.rms_norm(x, weight, 1e-6)
        glu = elementwise_fast.swiglu(gate, up, w, LIMIT)
        torch.set_num_threads(1)
        assert torch.equal(norm[7:20], elementwise_fast.rms_norm(x[7:20], weight, 1e-6))
        part = elementwise_fast.swiglu(gate[7:20], up[7:20], w[7:20], LIMIT)
        assert torch.equal(glu[7:20], part)
    finally:
        torch.set_num_threads(threads)


def test_operators_have_shapes_without_data():
    with FakeTensorMode():
        x = torch.randn(2, 3, 16, requires_grad=True)
        cos = torch.randn(2, 3, 4)
        y = elementwise_fast.rms_norm(x, torch.randn(16, requires_grad=True), 1e-6)
        y = elementwise_fast.rope(y, cos, cos).flatten(0, 1)
        elementwise_fast.swiglu(y, y, torch.randn(6, requires_grad=True), 10.0).sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    x = torch.randn(rows, 8, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    y = elementwise_fast.rms_norm(x, weight, 1e-6)
    elementwise_fast.swiglu(y, y, None, LIMIT).sum().backward()
    assert (x.grad.shape, weight.grad.shape) == ((rows, 8), (8,))


def test_other_dtypes_run_the_reference():
    x = torch.randn(3, 8, dtype=torch.float16)
    assert not elementwise_fast.compiled(x)
    want = elementwise.rms_norm(x, None, 1e-6)
    assert torch.equal(elementwise_fast.rms_norm(x, None, 1e-6), want)
