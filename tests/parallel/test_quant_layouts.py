"""Quantisation under layouts: as in one process, in effect on every rank, seen by the audit there.

Bounds as in test_layouts.py. Experts are rounded from equal masters, so their operands have equal
bits; activations may differ in the last bit before they are rounded to FP8 or FP4, and one that
falls to the other side of an edge would exceed any bound. In these batches none does (the experts'
rows, the only ones whose bits depend on the layout, are few enough); routing is not replayed.
"""

import os
import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessRaisedException

from parallel.config import ParallelConfig
from quant.apply import apply_quant, reads_master
from quant.config import QuantConfig, Recipe
from quant.formats import MXFP4, fake_quant
from quant.linear import QuantOp
from quant.probe import QuantProbe
from tests.helpers import random_rows, run_distributed
from tests.integration.small_run import small_run, write_corpus
from tests.parallel.ranks import (
    SEQ_LEN,
    alone,
    forward_backward,
    gradients,
    spread,
    worst_gradient,
)
from train.build import build
from train.config.schema import Precision
from train.record.metrics import read_metrics

ROWS = 8
QAT = QuantConfig(recipe=Recipe.fp4_qat)
LAYOUTS = {"dp2": {}, "ep2": {"ep": 2}}


def compare_steps(rank, world):
    for name, degrees in LAYOUTS.items():
        reference, probe = alone(), QuantProbe()
        rows = random_rows(ROWS, SEQ_LEN, reference.model.config.vocab_size)
        plain = float(forward_backward(reference, rows, ROWS).total)
        reference.optimizer.zero_grad()
        engine, _ = spread(reference, degrees)
        apply_quant(reference.model, QAT, QuantProbe(), keep_weights=True)
        records = apply_quant(engine.model, QAT, probe)
        one = forward_backward(reference, rows, ROWS)
        many = forward_backward(engine, rows, ROWS, micro=2)
        assert float(one.total) != plain, "quantisation acts"
        assert abs(float(many.total - one.total)) <= 1e-6 * float(one.total), (name, many, one)
        distance, which = worst_gradient(gradients(engine), gradients(reference))
        assert distance < 1e-5, (name, distance, which)
        assert probe.silent(record.name for record in records) == [], (name, rank)


def test_qat_on_two_ranks_trains_as_one_process():
    run_distributed(compare_steps, 2)


# ---- the trainer on several ranks ---------------------------------------------------------------
def build_here(folder, corpus, quant=QAT, **degrees):
    """The trainer of this rank, in bf16, as ``train/pretrain.py`` builds it."""
    os.environ["WORLD_SIZE"] = str(dist.get_world_size())
    run = small_run(folder, corpus, steps=1, eval_every=0, monitor_every=1, micro_batch_size=1)
    run = replace(run, quant=quant, parallel=ParallelConfig(**degrees))
    return build(replace(run, train=replace(run.train, precision=Precision.bf16)))


def watched_operands(model):
    """What the experts' matmuls are given as weights, by name: bits of a real pass."""
    used = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "op", None), QuantOp) and module.op.grouped:
            plain = module.op.grouped

            def watched(x, w, offsets, name=name, plain=plain):
                used.setdefault(name, w.detach().clone())
                return plain(x, w, offsets)

            module.op.grouped = watched
    return used


def audited_run(rank, world, folder, corpus):
    trainer = build_here(folder / "honest", corpus, ep=2)
    masters = {
        name: parameter.full_tensor().clone()
        for name, parameter in trainer.engine.model.named_parameters()
        if ".experts." in name
    }
    trainer.phase.quantise(True)
    used = watched_operands(trainer.engine.model)
    with trainer.stop:
        trainer._next_step()
    assert trainer.phase.probe.silent(r.name for r in trainer.phase.records) == []
    assert trainer.audit.result()["steps"] == [1], rank
    assert len(used) == 12, "w1, w2, w3 of three layers and the MTP block"
    for module, operand in used.items():
        values = fake_quant(masters[f"{module}.weight"], MXFP4, torch.bfloat16)
        assert torch.equal(operand, values.chunk(world)[rank]), (module, rank)
    trainer = build_here(folder / "faulty", corpus)
    if rank == 1:
        trainer.phase.quantise(False)
        trainer.phase.quantise = lambda on: None
    with trainer.stop:
        trainer._next_step()


def test_every_rank_is_audited_and_quantises_the_fp32_master(tmp_path):
    """An honest run; then one whose second rank leaves quantisation out, which ends it."""
    corpus = write_corpus(tmp_path)
    with pytest.raises(ProcessRaisedException) as error:
        run_distributed(audited_run, 2, tmp_path, corpus)
    told = str(error.value)
    assert "AuditError" in told
    assert re.search(
        r"quant: quant.experts: layers.0.ffn.experts.w1 gave products .* \(rank 1\)", told
    )
    first = read_metrics(tmp_path / "honest" / "metrics.jsonl")[0]
    for part in ("experts", "kv", "indexer"):
        assert 0 < first[f"quant_error_{part}"] < 0.05
    assert not (tmp_path / "faulty" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("recipe", "masters"),
    [
        (Recipe.none, set()),
        (Recipe.fp4_qat, {"layers.0.ffn.experts.w1.weight", "mtp.0.ffn.experts.w2.weight"}),
        (
            Recipe.deployed,
            {
                "layers.0.ffn.experts.w1.weight",
                "mtp.0.ffn.experts.w2.weight",
                "layers.1.attn.wo_a.weight",
                "mtp.0.e_proj.weight",
            },
        ),
    ],
)
def test_masters_are_asked_for_where_an_op_rounds_them(recipe, masters):
    names = ["layers.0.ffn.experts.w1.weight", "mtp.0.ffn.experts.w2.weight",
             "layers.1.attn.wo_a.weight", "mtp.0.e_proj.weight", "layers.1.ffn.gate.weight",
             "layers.1.attn.compressor.wkv.weight", "embed.weight"]  # fmt: skip
    config = QuantConfig(recipe=recipe)
    assert {name for name in names if reads_master(config, name)} == masters
