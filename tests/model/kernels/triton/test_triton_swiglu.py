"""SwiGLU in Triton against float64, in the interpreter."""

import pytest
import torch

from model.kernels import elementwise
from model.kernels.triton.swiglu import swiglu
from tests.model.kernels.triton.checks import ROUNDING, check


@pytest.mark.parametrize("dtype", list(ROUNDING))
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (13, 48), (3, 1030), (0, 8)])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("size", [1e-4, 1.0, 8.0])
def test_swiglu_is_the_reference(dtype, rows, width, weighted, size):
    gate, up = (torch.randn(rows, width) * size for _ in range(2))
    weight = torch.rand(rows) if weighted else None
    inputs = [gate.to(dtype), up.to(dtype), weight, 10.0]
    check(swiglu, elementwise.swiglu, inputs, [torch.randn(rows, width)])


def test_clamped_elements_have_no_gradient_and_nan_stays():
    gate = torch.tensor([[11.0, 3.0, float("nan"), float("inf")]], requires_grad=True)
    up = torch.tensor([[1.0, -12.0, 1.0, 1.0]], requires_grad=True)
    a = swiglu(gate, up, None, 10.0)
    a.sum().backward()
    expected = elementwise.swiglu(gate, up, None, 10.0)
    assert torch.equal(a.isnan(), expected.isnan())
    assert gate.grad[0, 0] == 0
    assert gate.grad[0, 3] == 0
    assert up.grad[0, 1] == 0
    assert gate.grad[0, 2].isnan()
