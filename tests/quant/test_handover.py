"""What Transformer Engine is handed: the export's bytes, from the fp32 master, once a step."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import quant.transformer_engine as engine
from model.linear import grouped_linear_op
from quant.apply import apply_quant
from quant.config import QuantConfig, QuantEngine, Recipe
from quant.export import Stored, quantise_official
from quant.fake_quant import WeightQuantiser
from quant.formats import FP8_WEIGHT, MXFP4, fake_quant, scale_value
from quant.handover import fp8_matrices
from quant.linear import QuantOp
from quant.probe import QuantProbe
from tests.quant.quant_models import run_step, tiny_ids, tiny_model
from tests.quant.te_stand_in import stand_in, values

FP8 = QuantConfig(recipe=Recipe.fp8, engine=QuantEngine.transformer_engine, kv=False, indexer=False)


@pytest.fixture
def te(monkeypatch):
    package = stand_in()
    monkeypatch.setattr(engine, "load", lambda: (package, None))
    return package


@pytest.fixture
def quantisations(monkeypatch):
    """The masters that were quantised, in order."""
    seen, real = [], engine.fp8_matrices
    monkeypatch.setattr(
        engine, "fp8_matrices", lambda w, fmt: (seen.append(w.data_ptr()), real(w, fmt))[1]
    )
    return seen


@pytest.mark.parametrize("shape", [(256, 384), (130, 300), (48, 40)])
def test_bytes_and_scales_are_those_of_the_export(shape):
    torch.manual_seed(0)
    masters = torch.randn(3, *shape) * torch.tensor([1.0, 1e-3, 1e-9])[:, None, None]
    masters[0, :, 1::2] *= 1e-3
    handed = fp8_matrices(masters, FP8_WEIGHT)
    names = [f"layers.0.ffn.experts.{expert}.w1.weight" for expert in range(3)]
    exported = list(quantise_official(zip(names, masters, strict=True), Stored.fp8))
    for expert in range(3):
        codes, scale = (tensor for _, tensor in exported[2 * expert : 2 * expert + 2])
        rows, row_scales, columns, column_scales = (part[expert] for part in handed)
        assert torch.equal(rows, codes.view(torch.uint8))
        assert torch.equal(columns, rows.T)
        exact = scale_value(scale.view(torch.uint8))
        blocks = exact.shape
        assert row_scales.shape == (blocks[0], -(-blocks[1] // 4) * 4)
        assert column_scales.shape == (blocks[1], -(-blocks[0] // 4) * 4)
        assert torch.equal(row_scales[:, : blocks[1]], exact)
        assert torch.equal(column_scales[:, : blocks[0]], exact.T)
    # By way of bf16 other bytes come out: the test can tell the two.
    assert not torch.equal(fp8_matrices(masters.bfloat16(), FP8_WEIGHT).rows, handed.rows)


@pytest.mark.parametrize("size", [1.0, 1e-12])
def test_fp4_weights_are_handed_over_without_loss(size):
    master = size * torch.randn(1, 256, 160, generator=torch.Generator().manual_seed(0))
    handed = fp8_matrices(master, MXFP4)
    expected = fake_quant(master[0], MXFP4)
    assert torch.equal(values(handed.rows[0], handed.row_scales[0]), expected)
    assert torch.equal(values(handed.columns[0], handed.column_scales[0]), expected.T)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("experts", [0, 3])
def test_products_take_the_masters_fp8_values_and_gradients_reach_the_master(
    experts, on_device, monkeypatch
):
    monkeypatch.setattr(engine, "load", lambda: (stand_in(on_device), None))
    torch.manual_seed(0)
    grouped = grouped_linear_op if experts else None
    op = QuantOp("m", "p", WeightQuantiser(FP8_WEIGHT, True), True, True, QuantProbe(), grouped)
    w = torch.randn((experts, 256, 128) if experts else (256, 128), requires_grad=True)
    x = torch.randn(200, 128, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(200, 256).bfloat16()
    offsets = (torch.tensor([64, 64, 200], dtype=torch.int32),) if experts else ()
    y = engine.transformer_engine_op(op)(x, w, *offsets)
    y.backward(grad)
    w_q = fake_quant(w.detach(), FP8_WEIGHT).bfloat16()
    bounds = [(0, 64), (64, 64), (64, 200)] if experts else [(0, 200)]
    assert w.grad is not None
    assert x.grad is not None
    assert w.grad.dtype == torch.float32
    matrices, grads = w_q.view(-1, 256, 128), w.grad.view(-1, 256, 128)
    for (begin, end), matrix, w_grad in zip(bounds, matrices, grads, strict=True):
        rows, g = x.detach()[begin:end], grad[begin:end]
        # One bf16 rounding; padded rows sum in another order.
        torch.testing.assert_close(y[begin:end], rows @ matrix.T, rtol=2**-7, atol=2**-4)
        torch.testing.assert_close(x.grad[begin:end], g @ matrix, rtol=2**-7, atol=2**-4)
        torch.testing.assert_close(w_grad, (g.T @ rows).float(), rtol=2**-7, atol=2**-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_weight_is_quantised_once_a_step(recompute, te, quantisations):
    model = tiny_model(o_lora_rank=128)
    records = apply_quant(model, FP8, QuantProbe(), keep_weights=True)
    weights = {model.get_parameter(str(r.parameter)).data_ptr() for r in records if r.seam == "op"}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    if recompute:
        for ffn in (module for name, module in model.named_modules() if name.endswith(".ffn")):
            ffn.forward = lambda *a, plain=ffn.forward, **k: checkpoint(
                plain, *a, use_reentrant=False, **k
            )
    for _ in range(2):
        quantisations.clear()
        for microbatch in range(2):
            run_step(model, tiny_ids(1, 16, seed=microbatch))
        assert len(quantisations) == len(set(quantisations))
        assert set(quantisations) == weights
        optimizer.step()
        optimizer.zero_grad()


def test_a_model_on_it_equals_one_that_holds_the_exported_values(te):
    model, plain = tiny_model(o_lora_rank=128), tiny_model(o_lora_rank=128)
    records = apply_quant(model, FP8, QuantProbe(), keep_weights=True)
    with torch.no_grad():
        for record in records:
            if record.parameter is not None:
                parameter = plain.get_parameter(record.parameter)
                parameter.copy_(fake_quant(parameter, FP8_WEIGHT))
    choices = {}
    expected = run_step(plain, record=choices).total
    torch.testing.assert_close(run_step(model, replay=choices).total, expected, rtol=1e-5, atol=0)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if ours.grad is None or theirs.grad is None:
            assert ours.grad is theirs.grad, name
            continue
        error = (ours.grad - theirs.grad).norm()
        assert float(error) <= 1e-3 * float(theirs.grad.norm()) + 1e-7, name


def test_groups_that_cross_blocks_are_refused_in_one_line(te):
    with pytest.raises(ValueError, match="has 96 rows, no multiple of 128") as caught:
        apply_quant(tiny_model(), FP8, QuantProbe())
    assert "\n" not in str(caught.value)


def test_a_version_that_lacks_what_is_needed_is_refused_in_one_line(monkeypatch):
    old = stand_in()
    del old.Float8BlockwiseQTensor
    old.__version__ = "2.4.0"
    recipe = SimpleNamespace(Float8BlockScaling=lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", old)
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", recipe)
    with pytest.raises(ValueError, match=r"found 2\.4\.0, which lacks Float8Block") as caught:
        engine.load()
    assert "\n" not in str(caught.value)
