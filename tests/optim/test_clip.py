"""The global gradient norm: float64 sums, one scale for all, and no scaling of broken gradients."""

import math

import pytest
import torch
from torch.nn import Parameter

from optim.clip import clip_grad_norm, grad_norm


def with_grads(*grads):
    parameters = []
    for grad in grads:
        parameters.append(Parameter(torch.zeros_like(grad)))
        parameters[-1].grad = grad.clone()
    return parameters


@pytest.mark.core
def test_norm_is_that_of_all_gradients_as_one_vector():
    grads = [torch.randn(5, 7), torch.randn(3), torch.randn(2, 4, 6)]
    wanted = torch.cat([g.double().flatten() for g in grads]).norm()
    parameters = [*with_grads(*grads), Parameter(torch.ones(4))]  # the last has no gradient
    assert grad_norm(parameters).item() == pytest.approx(wanted.item(), rel=1e-12)


def test_norm_of_many_elements_does_not_lose_digits():
    # A fp32 sum over 2^22 squares is off in the fourth digit here.
    wanted = 2**11 * torch.tensor(0.1).double().item()
    norm = grad_norm(with_grads(torch.full((2**22,), 0.1)))
    assert norm.item() == pytest.approx(wanted, rel=1e-9)


def test_norm_of_large_gradients_does_not_overflow():
    assert grad_norm(with_grads(torch.full((4,), 1e30))).item() == pytest.approx(2e30, rel=1e-6)


@pytest.mark.core
@pytest.mark.parametrize("max_norm", [0.5, 1.0])
def test_clipping_scales_everything_by_one_factor(max_norm):
    grads = [torch.randn(5, 7), torch.randn(3)]
    parameters = with_grads(*grads)
    norm = clip_grad_norm(parameters, max_norm)
    assert norm > 1
    for parameter, grad in zip(parameters, grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad * (max_norm / norm))
    assert grad_norm(parameters).item() == pytest.approx(max_norm, rel=1e-6)


@pytest.mark.parametrize("max_norm", [0.0, 100.0])
def test_gradients_below_the_bound_or_without_one_keep_their_bits(max_norm):
    grads = [torch.randn(5, 7), torch.randn(3)]
    parameters = with_grads(*grads)
    clip_grad_norm(parameters, max_norm)
    for parameter, grad in zip(parameters, grads, strict=True):
        assert torch.equal(parameter.grad, grad)


@pytest.mark.core
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_any_bad_element_makes_the_norm_not_finite_and_nothing_is_scaled(bad):
    grads = [torch.randn(5, 7), torch.randn(3)]
    grads[1][2] = bad
    parameters = with_grads(*grads)
    assert not math.isfinite(clip_grad_norm(parameters, 1.0))
    assert torch.equal(parameters[0].grad, grads[0])


def test_no_gradients_have_norm_zero():
    assert clip_grad_norm([Parameter(torch.ones(3))], 1.0) == 0.0
