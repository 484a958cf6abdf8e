"""Quantisation swapped into the real model: what is swapped, that it runs, that it comes out again.

Comparisons are bitwise unless a tolerance is argued on the spot.
"""

import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from model.linear import GroupedLinear
from model.state_dict import to_official
from quant.apply import absent_parts, apply_quant, describe, remove_quant
from quant.config import QuantConfig, Recipe
from quant.export import Stored, stored_as
from quant.formats import FP8_WEIGHT, MXFP4, fake_quant
from quant.probe import QuantProbe
from tests.quant.quant_models import run_step, tiny_ids, tiny_model

QAT = QuantConfig(recipe=Recipe.fp4_qat)
DEPLOYED = QuantConfig(recipe=Recipe.deployed)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_none_changes_nothing():
    model = tiny_model()
    names = list(model.state_dict())
    assert apply_quant(model, QuantConfig(), QuantProbe()) == []
    assert list(model.state_dict()) == names


@pytest.mark.core
@pytest.mark.parametrize("recipe", [r for r in Recipe if r is not Recipe.none])
def test_every_swapped_seam_runs_and_comes_out_again(recipe):
    model, ids, probe = tiny_model(), tiny_ids(), QuantProbe()
    names = list(model.state_dict())
    before = model.logits(ids)
    records = apply_quant(model, QuantConfig(recipe=recipe), probe)
    assert list(model.state_dict()) == names  # checkpoints, optimizers: the same names
    assert absent_parts(QuantConfig(recipe=recipe), records) == []
    during = run_step(model)
    assert torch.isfinite(during.total)
    assert probe.silent(record.name for record in records) == []
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert not torch.equal(model.logits(ids), before)
    probe.begin_step()
    assert probe.silent(record.name for record in records) == [r.name for r in records]
    remove_quant(records)
    assert torch.equal(model.logits(ids), before)
    assert not probe.ran
    again = apply_quant(model, QuantConfig(recipe=recipe), probe)
    assert again == records
    remove_quant(again)


def test_a_seam_that_is_bypassed_is_silent():
    # The audit's premise: a swap that is not in effect shows.
    model, probe = tiny_model(), QuantProbe()
    records = apply_quant(model, QAT, probe)
    experts = model.get_submodule("layers.1.ffn.experts.w2")
    experts.op = GroupedLinear(1, 1, 1).op
    run_step(model)
    assert probe.silent(record.name for record in records) == ["layers.1.ffn.experts.w2"]


def test_qat_touches_experts_indexer_and_kv_of_every_block_and_nothing_else():
    model = tiny_model()
    records = apply_quant(model, QAT, QuantProbe())
    found = {(record.part, record.name) for record in records}
    blocks = ["layers.0", "layers.1", "layers.2", "mtp.0"]
    expected = {("experts", f"{b}.ffn.experts.w{i}") for b in blocks for i in (1, 2, 3)}
    expected |= {("kv", f"{b}.attn.kv_cast") for b in blocks}
    expected |= {("kv", f"layers.{i}.attn.compressor.cast") for i in (1, 2)}
    expected |= {("indexer", f"layers.1.attn.indexer.{m}cast") for m in ("q_", "compressor.")}
    assert found == expected
    by_name = {record.name: record for record in records}
    assert describe(by_name["layers.0.ffn.experts.w1"]) == "mxfp4_1x32"
    assert by_name["layers.0.ffn.experts.w1"].parameter == "layers.0.ffn.experts.w1.weight"
    assert by_name["layers.0.attn.kv_cast"].parameter is None


def test_deployed_covers_every_tensor_in_its_stored_format():
    model = tiny_model()
    records = apply_quant(model, DEPLOYED, QuantProbe())
    formats = {r.parameter: r.format for r in records if r.parameter}
    wanted = {Stored.fp4: MXFP4.name, Stored.fp8: FP8_WEIGHT.name, Stored.bf16: "bf16"}
    for name in to_official(model):
        stored = stored_as(name)
        ours = re.sub(r"experts\.\d+\.", "experts.", name)
        assert formats.pop(ours, None) == wanted.get(stored), name
        if stored is Stored.fp4:
            formats[ours] = MXFP4.name  # the next expert of the same stack
    assert {name for name in formats if ".experts." not in name} == set()


def test_only_wo_a_keeps_its_input_in_deployed():
    records = apply_quant(tiny_model(), DEPLOYED, QuantProbe())
    plain = {r.name.rpartition(".")[2] for r in records if r.seam == "op" and not r.activations}
    assert plain == {"wo_a"}


@pytest.mark.core
def test_qat_gradients_equal_those_of_a_model_that_holds_the_quantised_weights():
    # The paper's rule: the gradient for the weights that were used goes straight to the master.
    config = QuantConfig(recipe=Recipe.fp4_qat, kv=False, indexer=False)
    model, plain = tiny_model(), tiny_model()
    apply_quant(model, config, QuantProbe())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if ".ffn.experts." in name:
                parameter.copy_(fake_quant(parameter, MXFP4))
    loss, plain_loss = run_step(model).total, run_step(plain).total
    assert torch.equal(loss, plain_loss)
    expected = gradients(plain)
    for name, grad in gradients(model).items():
        assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("recipe", [Recipe.fp4_qat, Recipe.fp8])
def test_keeping_weights_changes_no_bit_over_updates(recipe):
    results = []
    for keep in (False, True):
        model = tiny_model()
        apply_quant(model, QuantConfig(recipe=recipe), QuantProbe(), keep_weights=keep)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(2):
            for microbatch in range(2):
                run_step(model, tiny_ids(1, 16, seed=2 * step + microbatch))
            optimizer.step()
            optimizer.zero_grad()
        results.append(model.logits(tiny_ids(1, 16)))
    assert torch.equal(*results)


def test_fp8_training_stays_near_full_precision():
    model, choices = tiny_model(), {}
    plain = run_step(model, record=choices).total
    exact = gradients(model)
    model.zero_grad()
    records = apply_quant(model, QuantConfig(recipe=Recipe.fp8), QuantProbe())
    loss = run_step(model, replay=choices).total  # else routing flips
    assert abs(float(loss.detach()) - float(plain.detach())) < 0.01
    # E4M3 has 3 mantissa bits: an rms error of 2.6 % an element, and each of some ten products on
    # the way adds its own. A wrong transpose, scale or operand gives an error above 1.
    for record in records:
        name = f"{record.name}.weight"
        if ".indexer." not in name:
            error = (model.get_parameter(name).grad - exact[name]).norm() / exact[name].norm()
            assert 0.01 < float(error) < 0.4, name


def test_monitors_come_from_the_parts_that_ran():
    model, probe = tiny_model(), QuantProbe()
    apply_quant(model, QAT, probe)
    run_step(model)
    assert probe.metrics() == {}
    probe.begin_step(monitors=True)
    run_step(model)
    metrics = probe.metrics()
    for part in ("experts", "kv", "indexer"):
        error = metrics[f"quant_error_{part}.sum"] / metrics[f"quant_error_{part}.count"]
        assert 0 < float(error) < 0.05
    assert float(metrics["quant_lossy_experts.sum"]) == 0
    weights = [p.numel() for n, p in model.named_parameters() if ".ffn.experts." in n]
    assert float(metrics["quant_zeroed_experts.count"]) == sum(weights)


def test_a_part_that_the_model_lacks_is_named():
    model = tiny_model(attention="swa")
    records = apply_quant(model, QAT, QuantProbe())
    assert absent_parts(QAT, records) == ["indexer"]


def test_quantising_twice_is_refused():
    model = tiny_model()
    apply_quant(model, QAT, QuantProbe())
    with pytest.raises(ValueError, match=r"quant\.experts: layers\.0\..* is quantised already"):
        apply_quant(model, QAT, QuantProbe())


@pytest.fixture
def one_rank_mesh(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


# Whether a block returns a view is the business of the layout tests.
view_allowed = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")


def shard(model, mesh, dtype=torch.float32):
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.layers.values():
        fully_shard(block.ffn.experts, mesh=mesh, mp_policy=policy)
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@view_allowed
@pytest.mark.parametrize("order", ["before", "after"])
def test_sharded_model_gives_the_same_step(one_rank_mesh, order):
    # FSDP and the "stored" seam both extend classes and read attributes: either may come first.
    expected, model = tiny_model(), tiny_model()
    apply_quant(expected, DEPLOYED, QuantProbe())
    expected_loss = run_step(expected).total
    if order == "before":
        apply_quant(model, DEPLOYED, QuantProbe())
    shard(model, one_rank_mesh)
    if order == "after":
        apply_quant(model, DEPLOYED, QuantProbe())
    assert torch.equal(run_step(model).total, expected_loss)
    want = gradients(expected)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad.full_tensor(), want[name]), name


@view_allowed
def test_sharding_that_gathers_in_bf16_is_refused(one_rank_mesh):
    model = tiny_model()
    apply_quant(model, QAT, QuantProbe())
    model.compute_dtype = torch.bfloat16
    shard(model, one_rank_mesh, torch.bfloat16)
    with pytest.raises(ValueError, match="the layout must gather it in fp32"):
        run_step(model)


@view_allowed
def test_sharding_with_kept_weights_is_found_out(one_rank_mesh):
    model = tiny_model()
    apply_quant(model, QAT, QuantProbe(), keep_weights=True)
    shard(model, one_rank_mesh)
    run_step(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    with pytest.raises(RuntimeError, match="keep_weights=False"):
        run_step(model)
