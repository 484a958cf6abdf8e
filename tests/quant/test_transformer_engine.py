"""Transformer Engine: the guard here, the arithmetic where there is a GPU for it."""

from typing import Any

import pytest
import torch

from model.linear import grouped_linear_op
from quant.apply import apply_quant
from quant.config import QuantConfig, QuantEngine, Recipe
from quant.fake_quant import WeightQuantiser
from quant.formats import FP8_WEIGHT, fake_quant
from quant.linear import QuantOp
from quant.probe import QuantProbe
from quant.transformer_engine import _LinearOp, transformer_engine_op
from tests.quant.quant_models import tiny_model


def needs_fp8(test):
    """A ``gpu`` test that wants FP8 matmuls."""
    lacks = not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0)
    return pytest.mark.gpu(pytest.mark.skipif(lacks, reason="needs a GPU with FP8")(test))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_without_it_one_line_says_what_to_install():
    config = QuantConfig(recipe=Recipe.fp8, engine=QuantEngine.transformer_engine)
    with pytest.raises(ValueError, match="pip install --no-build-isolation") as caught:
        apply_quant(tiny_model(), config, QuantProbe())
    message = str(caught.value)
    assert "quant.engine=transformer_engine needs" in message
    assert "quant.engine=emulated" in message
    assert "\n" not in message


def test_a_broken_install_ends_in_the_same_message(monkeypatch):
    # The import itself may raise anything: here the package is really absent, the GPU is claimed.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(__import__("sys").modules, "transformer_engine", None)
    op = QuantOp("m", "p", WeightQuantiser(FP8_WEIGHT, False), True, True, QuantProbe())
    with pytest.raises(ValueError, match="import failed"):
        transformer_engine_op(op)


@needs_fp8
@pytest.mark.parametrize("experts", [0, 3])
def test_tensor_cores_agree_with_the_emulation(experts):
    pytest.importorskip("transformer_engine.pytorch")
    torch.manual_seed(0)
    grouped = grouped_linear_op if experts else None
    emulated = QuantOp(
        "m", "p", WeightQuantiser(FP8_WEIGHT, False), True, True, QuantProbe(), grouped
    )
    shape = (experts, 256, 128) if experts else (256, 128)
    offsets = (torch.tensor([64, 64, 256], dtype=torch.int32, device="cuda"),) if experts else ()
    grad = torch.randn(256, 256, device="cuda", dtype=torch.bfloat16)
    results = []
    x0 = torch.randn(256, 128, device="cuda", dtype=torch.bfloat16)
    w0 = torch.randn(shape, device="cuda")
    for op in (emulated, transformer_engine_op(emulated)):
        x, w = x0.clone().requires_grad_(), w0.clone().requires_grad_()
        y = op(x, w, *offsets)
        y.backward(grad)
        results.append((y.detach(), x.grad, w.grad))
    # The same FP8 operands, other orders of summation: both round to bf16 (2**-9). For wgrad ours
    # rounds the stored FP8 input to columns, theirs the input: subnormal codes may differ.
    for ours, theirs, bound in zip(*results, (2**-8, 2**-8, 0.02), strict=True):
        assert float((ours.float() - theirs.float()).norm() / ours.float().norm()) < bound


@needs_fp8
def test_it_holds_the_exported_values_and_takes_them_as_they_are():
    te = pytest.importorskip("transformer_engine.pytorch")
    torch.manual_seed(0)
    op = QuantOp("m", "p", WeightQuantiser(FP8_WEIGHT, True), True, True, QuantProbe())
    w = torch.randn(256, 384, device="cuda", requires_grad=True)
    product = transformer_engine_op(op)
    assert isinstance(product, _LinearOp)
    handed: Any = product._weights(w, torch.bfloat16)[0]
    assert isinstance(handed, te.Float8BlockwiseQTensor)
    expected = fake_quant(w.detach(), FP8_WEIGHT)
    with torch.no_grad():
        assert torch.equal(handed.dequantize(dtype=torch.float32), expected)
    # Rows of the identity are exact in FP8, and so is each product with one of them: what is
    # multiplied is the handed weight, in the forward pass and in dgrad.
    x = torch.eye(384, device="cuda", dtype=torch.bfloat16).requires_grad_()
    y = product(x, w)
    assert torch.equal(y.float().T, expected)
    (grad,) = torch.autograd.grad(y, x, torch.eye(384, 256, device="cuda", dtype=torch.bfloat16))
    assert torch.equal(grad[:256].float(), expected)
