"""The quantised linear op: its three products against float64 ones of reference-quantised parts.

Tolerance: operands are equal bit for bit, so only the fp32 summation of up to 200 products differs
from float64: relative Frobenius error below 1e-6 (bf16 results: 4e-3, half a unit in the last place
of bf16 is 2e-3).
"""

import pytest
import torch

from model.linear import BlockLinear, GroupedLinear, Linear, grouped_linear_op
from model.linear import grouped_linear_reference as grouped_reference
from quant.experts import fake_quant_rows, padded_positions
from quant.fake_quant import WeightQuantiser
from quant.formats import FP8_ACTIVATION, FP8_WEIGHT, MXFP4, fake_quant
from quant.linear import QuantOp
from quant.probe import QuantProbe
from tests.quant import reference

E4M3, E2M1 = reference.e4m3_magnitudes(), reference.e2m1_magnitudes()


def fp8(x, rows, cols):
    return reference.quantise_blocks(x, E4M3, 1e-4, rows, cols)[2]


def fp4(x):
    return reference.quantise_blocks(x, E2M1, MXFP4.amax_floor, 1, 32)[2]


def make_op(fmt, activations=False, gradients=False, keep=False, **more):
    return QuantOp(
        "m", "p", WeightQuantiser(fmt, keep), activations, gradients, QuantProbe(), **more
    )


def close(a, b, bound=1e-6):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm()) < bound


@pytest.mark.core
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("fmt", [MXFP4, FP8_WEIGHT], ids=lambda f: f.name)
def test_qat_gradients_are_those_of_the_quantised_weight(fmt, keep):
    torch.manual_seed(0)
    x = torch.randn(2, 20, 160, requires_grad=True)
    w = torch.randn(70, 160, requires_grad=True)
    grad = torch.randn(2, 20, 70)
    y = make_op(fmt, keep=keep)(x, w)
    y.backward(grad)
    w_q = (fp4(w) if fmt is MXFP4 else fp8(w, 128, 128)).detach()
    x64, g64 = x.detach().double(), grad.double()
    assert close(y, x64 @ w_q.T)
    assert close(x.grad, g64 @ w_q)
    assert close(w.grad, g64.flatten(0, 1).T @ x64.flatten(0, 1))


def test_deployed_activations_are_quantised_and_their_gradient_passes_straight():
    torch.manual_seed(1)
    x = torch.randn(6, 160, requires_grad=True)
    w = torch.randn(70, 160, requires_grad=True)
    grad = torch.randn(6, 70)
    y = make_op(FP8_WEIGHT, activations=True)(x, w)
    y.backward(grad)
    x_q, w_q = fp8(x.detach(), 1, 128), fp8(w.detach(), 128, 128)
    assert close(y, x_q @ w_q.T)
    assert close(x.grad, grad.double() @ w_q)
    assert close(w.grad, grad.double().T @ x_q)


@pytest.mark.core
def test_fp8_training_quantises_the_operands_of_all_three_products():
    torch.manual_seed(2)
    x = torch.randn(150, 160, requires_grad=True)
    w = torch.randn(140, 160, requires_grad=True)
    grad = torch.randn(150, 140) * torch.logspace(-4, 0, 150)[:, None]
    y = make_op(FP8_WEIGHT, activations=True, gradients=True)(x, w)
    y.backward(grad)
    x_q, w_q = fp8(x.detach(), 1, 128), fp8(w.detach(), 128, 128)
    assert close(y, x_q @ w_q.T)
    assert close(x.grad, fp8(grad, 1, 128) @ w_q)
    # wgrad contracts over rows: blocks of 128 rows; the input was stored in FP8 by the forward pass
    assert close(w.grad, fp8(grad, 128, 1).T @ fp8(x_q, 128, 1))


def test_bf16_compute_multiplies_the_same_operands():
    torch.manual_seed(3)
    x = torch.randn(8, 64, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(32, 64, requires_grad=True)
    y = make_op(MXFP4)(x, w)
    y.backward(torch.ones_like(y))
    assert (y.dtype, x.grad.dtype, w.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert close(y, x.detach().double() @ fp4(w.detach()).T, 4e-3)


OFFSETS = torch.tensor([0, 130, 130, 141, 301], dtype=torch.int32)


@pytest.mark.parametrize("grouped", [grouped_linear_op, grouped_reference])
@pytest.mark.parametrize("gradients", [False, True])
def test_experts_match_one_linear_per_expert(grouped, gradients):
    torch.manual_seed(4)
    x = torch.randn(301, 160, requires_grad=True)
    w = torch.randn(5, 48, 160, requires_grad=True)
    grad = torch.randn(301, 48)
    op = make_op(MXFP4, activations=gradients, gradients=gradients, grouped=grouped)
    y = op(x, w, OFFSETS)
    y.backward(grad)
    start = 0
    for expert, stop in enumerate(OFFSETS.tolist()):
        x_e = x.detach()[start:stop].clone().requires_grad_()
        w_e = w.detach()[expert].clone().requires_grad_()
        y_e = make_op(MXFP4, activations=gradients, gradients=gradients)(x_e, w_e)
        y_e.backward(grad[start:stop])
        if stop > start:
            assert close(y[start:stop], y_e)
            assert close(x.grad[start:stop], x_e.grad)
            assert close(w.grad[expert], w_e.grad)
        else:
            assert not w.grad[expert].any()
        start = stop


def test_experts_without_any_row():
    x = torch.empty(0, 64, requires_grad=True)
    w = torch.randn(2, 32, 64, requires_grad=True)
    for gradients in (False, True):
        op = make_op(
            FP8_WEIGHT, activations=gradients, gradients=gradients, grouped=grouped_linear_op
        )
        y = op(x, w, torch.zeros(2, dtype=torch.int32))
        assert y.shape == (0, 32)
        y.sum().backward()
        assert not w.grad.any()


def test_row_blocks_never_mix_two_experts():
    torch.manual_seed(5)
    x = torch.randn(301, 3)
    x[130:141] *= 1e7  # E4M3 holds 2**15 of range: only beyond it does a shared scale show
    assert not torch.equal(fake_quant_rows(x, None)[:130], fp8(x[:130], 128, 1).float())
    got = fake_quant_rows(x, OFFSETS)
    start = 0
    for stop in OFFSETS.tolist():
        if stop > start:
            assert torch.equal(got[start:stop], fp8(x[start:stop], 128, 1).float())
        start = stop
    position, padded = padded_positions(OFFSETS, 301)
    firsts = position[torch.tensor([0, 130, 141])]
    assert bool((firsts % 128 == 0).all())
    assert len(set(position.tolist())) == 301
    assert int(position.max()) < padded


@pytest.mark.parametrize("keep", [False, True])
def test_block_linear_uses_the_blocks_of_the_whole_weight(keep):
    # Groups of 96 rows straddle blocks of 128: trained and exported values must still be the same.
    torch.manual_seed(6)
    module = BlockLinear(64, 192, 2)
    with torch.no_grad():
        module.weight.copy_(torch.randn(192, 64) * torch.logspace(-4, 4, 192)[:, None])
    module.op = make_op(FP8_WEIGHT, keep=keep, owner=module)
    x = torch.randn(4, 2, 64)
    y = module(x)
    w_q = fp8(module.weight.detach(), 128, 128)
    assert not torch.equal(w_q[96:].float(), fake_quant(module.weight.detach()[96:], FP8_WEIGHT))
    oracle = torch.cat([x[:, g].double() @ w_q[96 * g : 96 * (g + 1)].T for g in range(2)], -1)
    assert close(y, oracle)
    grad = torch.randn_like(y)
    y.backward(grad)
    parts = [grad[:, 96 * g : 96 * (g + 1)].double().T @ x[:, g].double() for g in range(2)]
    assert close(module.weight.grad, torch.cat(parts))


def test_only_the_fp32_master_may_be_trained():
    x, w = torch.randn(4, 64), torch.randn(8, 64).bfloat16().requires_grad_()
    with pytest.raises(ValueError, match="weight of m arrives as torch"):
        make_op(MXFP4)(x, w)
    with torch.no_grad():  # running an imported bf16 checkpoint is fine
        assert close(make_op(MXFP4)(x, w), x.double() @ fp4(w.detach()).T)


def test_recomputation_and_double_use_give_the_same_gradients():
    torch.manual_seed(7)
    linear = Linear(64, 32)
    torch.nn.init.normal_(linear.weight)
    linear.op = make_op(MXFP4, keep=True)
    x = torch.randn(3, 64, requires_grad=True)
    linear(x).sum().backward()
    plain = linear.weight.grad.clone(), x.grad.clone()
    linear.weight.grad = x.grad = None
    torch.utils.checkpoint.checkpoint(linear, x, use_reentrant=False).sum().backward()
    assert torch.equal(linear.weight.grad, plain[0])
    assert torch.equal(x.grad, plain[1])


def test_grouped_module_takes_the_op():
    torch.manual_seed(8)
    module = GroupedLinear(2, 64, 32)
    torch.nn.init.normal_(module.weight)
    module.op = make_op(MXFP4, grouped=module.op)
    x, offsets = torch.randn(5, 64), torch.tensor([2, 5], dtype=torch.int32)
    w_q = fake_quant(module.weight.detach(), MXFP4)
    assert torch.equal(module(x, offsets), grouped_linear_op(x, w_q, offsets))
    assert torch.equal(fake_quant(x, FP8_ACTIVATION), fp8(x, 1, 128).float())
