"""Faults planted on one pipeline stage stop the run on every rank and are named with their rank.

As tests/train/audit/test_audit.py, in one spawn of two ranks: nothing of the audit is touched.
"""

import os
from contextlib import ExitStack
from dataclasses import replace
from unittest.mock import patch

import pytest
from torch.distributed.fsdp import fully_shard

from model.linear import grouped_linear_op
from parallel.config import ParallelConfig
from quant.config import QuantConfig, Recipe
from tests.helpers import run_distributed
from tests.integration.small_run import small_run, write_corpus
from train.audit.faults import AuditError
from train.build import build
from train.config.schema import ActivationCheckpoint

LAST = 1  # rank of the last stage


# ---- planted faults: fn(trainer) on the rank that is named, or a context that it is built in -----
def frozen_norm(trainer):
    enter = trainer.engine.set_trainable

    def but_one(trains):
        enter(trains)
        trainer.engine.model.norm.weight.requires_grad_(False)

    trainer.engine.set_trainable = but_one


def expert_op_not_quantised(trainer):
    trainer.engine.model.mtp["0"].ffn.experts.w2.op = grouped_linear_op


def kv_cast_not_quantised(trainer):
    trainer.engine.model.layers["0"].attn.kv_cast.forward = lambda x: x


def bias_not_updated(trainer):
    trainer.engine.update_biases = lambda load, speed: None


def parameter_without_gradient(trainer):
    engine = trainer.engine
    forward_backward = engine.forward_backward

    def but_one(*args):  # FSDP sets gradients past autograd's hooks
        shares = forward_backward(*args)
        engine.model.norm.weight.grad.zero_()
        return shares

    engine.forward_backward = but_one


def nothing_recomputed(trainer):
    for block in trainer.engine.model.modules():
        block.__dict__.pop("forward", None)


def constant_hash_table(trainer):
    trainer.engine.model.layers["0"].ffn.gate.tid2eid.zero_()


def another_schedule(trainer):
    trainer.engine.pipeline._schedule = "gpipe"


def norm_left_out_of_fsdp():
    def but_one(module, **kwargs):
        norm = getattr(module, "norm", None)
        ignored = {norm.weight} if norm is not None and hasattr(module, "layers") else None
        return fully_shard(module, ignored_params=ignored, **kwargs)

    return patch("parallel.fsdp.fully_shard", but_one)


QAT = {"quant": QuantConfig(recipe=Recipe.fp4_qat)}
RECOMPUTED = {"activation_checkpoint": ActivationCheckpoint.block}
# fault -> (rank that has it, the audit's line without the rank, changes of train, of the run)
FAULTS = {
    frozen_norm: (LAST, "tracked: norm.weight should train", {}, {}),
    expert_op_not_quantised: (
        LAST, "quant: quant.experts: mtp.0.ffn.experts.w2 gave products", {}, QAT,
    ),
    kv_cast_not_quantised: (0, "quant: quant.kv: layers.0.attn.kv_cast left its values", {}, QAT),
    bias_not_updated: (LAST, "bias: mtp.0.ffn.gate.bias moved by 0,", {}, {}),
    parameter_without_gradient: (LAST, "gradient: norm.weight received no gradient", {}, {}),
    nothing_recomputed: (LAST, "recompute: mtp.0 ran 2 times", RECOMPUTED, {}),
    constant_hash_table: (0, "hash_table: layers.0.ffn.gate.tid2eid is constant", {}, {}),
    norm_left_out_of_fsdp: (LAST, "sharding: norm.weight is left out", {}, {}),
    another_schedule: (None, "pipeline: ScheduleGPipe ran, parallel.schedule=1f1b", {}, {}),
}  # fmt: skip


def config(folder, corpus, train, run):
    plain = small_run(folder, corpus, steps=1, eval_every=0, **train)
    return replace(plain, parallel=ParallelConfig(pp=2), **run)


def lines_of_audit(trainer):
    """What the audit says of one step; nothing where it lets the step pass."""
    try:
        with trainer.stop:
            trainer._next_step()
    except AuditError as error:
        return [line.strip() for line in str(error).splitlines()[1:]]
    return []


def plant_all(rank, world, folder, corpus, faults):
    os.environ["WORLD_SIZE"] = str(world)
    for plant in faults:
        holder, words, train, run = FAULTS[plant]
        mine = holder in (rank, None)
        built_in = plant is norm_left_out_of_fsdp
        with ExitStack() as stack:
            if built_in and mine:
                stack.enter_context(plant())
            trainer = build(config(folder / plant.__name__, corpus, train, run))
            if mine and not built_in:
                plant(trainer)
            lines = lines_of_audit(trainer)
        told = [line for line in lines if line.startswith(words)]
        assert told, (plant.__name__, rank, lines)
        end = "" if holder is None else f"(rank {holder})"
        assert all(line.endswith(end) for line in lines), (plant.__name__, lines)
        assert not (folder / plant.__name__ / "metrics.jsonl").exists()


FEW = (frozen_norm, expert_op_not_quantised, bias_not_updated, norm_left_out_of_fsdp)


def test_fault_of_one_stage_stops_every_rank_and_is_named(tmp_path):
    run_distributed(plant_all, 2, tmp_path, write_corpus(tmp_path), FEW)


@pytest.mark.slow
def test_other_faults_of_one_stage_stop_every_rank_and_are_named(tmp_path):
    others = [plant for plant in FAULTS if plant not in FEW]
    run_distributed(plant_all, 2, tmp_path, write_corpus(tmp_path), others)
