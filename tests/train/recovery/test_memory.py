"""Out of memory ends in one line with the keys that help; the run and its checkpoints stay.

Planted where a device's allocator raises it: in a block's forward pass.
"""

import functools
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from parallel.config import ParallelConfig
from tests.integration.small_run import small_run, write_corpus
from train.build import build
from train.config.schema import ActivationCheckpoint, Precision
from train.errors import USER_ERRORS, UserError, lines_of
from train.recovery.memory import remedies, told_out_of_memory
from train.stages import resolve
from train.step import plan_step

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"


def planted(trainer, number, error):
    """Step ``number`` finds no memory in the last block."""

    def full(*_):
        if trainer.state.progress.step + 1 == number:
            raise error

    list(trainer.engine.model.layers.values())[-1].register_forward_pre_hook(full)


def test_one_line_names_the_keys_and_the_last_checkpoint_stays(tmp_path):
    run = small_run(
        tmp_path / "run", write_corpus(tmp_path), steps=5, checkpoint_every=2, eval_every=0
    )
    trainer = build(run)
    planted(trainer, 4, torch.OutOfMemoryError(SAID))
    with pytest.raises(UserError) as error:
        trainer.fit()
    assert isinstance(error.value, USER_ERRORS)  # told in one line, exit code 2
    assert lines_of(error.value) == [
        "out of memory on cpu in step 4 (CUDA out of memory): give train.micro_batch_size=1 instead"
        " of 2, or train.activation_checkpoint=block instead of none; checkpoints stay, from"
        " the newest of which the same command goes on, and v4 plan shows what a run needs"
    ]
    smaller = replace(run, train=replace(run.train, micro_batch_size=1))
    resumed = build(smaller)
    assert resumed.state.progress.step == 2
    assert resumed.fit() == 0


@pytest.mark.parametrize("part", ["build_model", "PhaseSwitch", "build_state", "restore", "Audit"])
def test_every_part_of_a_run_is_made_where_memory_is_told(tmp_path, part):
    run = small_run(tmp_path / "run", write_corpus(tmp_path))
    with patch(f"train.build.{part}", side_effect=torch.OutOfMemoryError(SAID)):
        with pytest.raises(UserError, match=r"^out of memory on cpu before the first step"):
            build(run)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_host_memory_counts_and_other_errors_do_not(tmp_path, error):
    run = small_run(tmp_path, tmp_path / "none")
    step = plan_step(1, 0, resolve(run), run.train, run.optim)
    with pytest.raises(UserError, match=r"give train\.micro_batch_size=1"):
        with told_out_of_memory(run, lambda: step, CPU):
            raise error
    with pytest.raises(RuntimeError, match="shape"):
        with told_out_of_memory(run, lambda: step, CPU):
            raise RuntimeError("shape")


# Where a run that stops after its second step of two, or before, or evaluates alone, can fail.
PLACES = {
    "phase": ("trainer.phase.enter", 0),
    "evaluation": ("trainer.recorder.evaluator.evaluate", 1),
    "last evaluation": ("trainer.recorder.final_evaluator.evaluate", 2),
    "report": ("trainer.recorder.report.write", 2),
    "checkpoint": ("trainer.state.tensors", 1),
    "leaving": ("trainer.recorder.close", 1),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_part_of_a_run_is_told(tmp_path, place):
    target, done = PLACES[place]
    run = small_run(
        tmp_path / "run", write_corpus(tmp_path), steps=2, checkpoint_every=1, eval_every=1
    )
    trainer = build(run)
    if place == "leaving":
        trainer.stop.ask("the test")
    *path, name = target.split(".")[1:]
    owner = functools.reduce(getattr, path, trainer)
    with patch.object(owner, name, side_effect=torch.OutOfMemoryError(SAID)):
        with pytest.raises(UserError, match=rf"^out of memory on cpu in step {max(done, 1)} \("):
            trainer.fit()
    assert trainer.state.progress.step == done


@pytest.mark.parametrize("place", ["phase", "last evaluation"])
def test_an_evaluation_alone_is_told(tmp_path, place):
    run = small_run(tmp_path / "run", write_corpus(tmp_path), steps=1, checkpoint_every=1)
    assert build(run).fit() == 0
    trainer = build(replace(run, train=replace(run.train, eval_only=True)))
    *path, name = PLACES[place][0].split(".")[1:]
    owner = functools.reduce(getattr, path, trainer)
    with patch.object(owner, name, side_effect=torch.OutOfMemoryError(SAID)):
        with pytest.raises(UserError, match=r"^out of memory on cpu in step 1 \("):
            trainer.fit()


def test_only_what_still_helps_is_named(tmp_path):
    run = small_run(
        tmp_path, tmp_path / "none", activation_checkpoint=ActivationCheckpoint.block,
        micro_batch_size=1, precision=Precision.bf16,
    )  # fmt: skip
    step = plan_step(1, 0, resolve(run), run.train, run.optim)
    told = {}
    for offload in ("none", "optimizer", "optimizer+master"):
        run = replace(run, parallel=ParallelConfig(offload=offload))
        told[offload] = remedies(run, step, CUDA)
    assert told["none"] == ["parallel.offload=optimizer instead of none"]
    assert told["optimizer"] == ["parallel.offload=optimizer+master instead of optimizer"]
    assert "more ranks (parallel.dp_shard)" in told["optimizer+master"][0]
