"""Several ranks decide alike, as one process does, and choices cross layouts.

Bounds: which steps spike, are abandoned and are routed ahead is equal; so are the experts that a
checkpoint gives to a step. Losses agree to 1e-3: free steps, and Newton-Schulz amplifies rounding.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers import run_distributed
from tests.integration.poisoned_run import EVERY, FIRST_SPIKE, poisoned_run, write_poisoned
from tests.integration.small_run import SignalAfter, differing, fit, metrics_of
from tests.train.samples import read_samples
from train.build import build
from train.config.schema import SampleConfig
from train.errors import ExitCode

TOLD = ("step", "loss_spikes", "rollbacks", "abandoned_steps", "anticipated", "skipped_steps")
STOPPED = FIRST_SPIKE + EVERY - 1  # a step in the mode


def told(run):
    return [{key: record.get(key) for key in TOLD} for record in metrics_of(run)]


def on_ranks(rank, world, run):
    os.environ["WORLD_SIZE"] = str(world)
    code, trainer = fit(run)
    assert code == ExitCode.finished
    state = trainer.state.recovery.state_dict() | {"loader": trainer.state.loader.state_dict()}
    everyone = [None] * world
    dist.all_gather_object(everyone, (state, trainer.state.progress))
    assert all(theirs == everyone[0] for theirs in everyone)
    assert trainer.state.recovery.state.rollbacks == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = poisoned_run(folder / "alone", write_poisoned(folder))
    run = replace(run, sample=SampleConfig(tokens=0))
    fit(run)
    return run


@pytest.mark.slow
def test_two_ranks_roll_back_as_one_process(run, tmp_path):
    spread = replace(run, run_dir=str(tmp_path / "spread"))
    run_distributed(on_ranks, 2, spread)
    assert told(spread) == told(run)
    assert read_samples(tmp_path / "spread") == read_samples(Path(run.run_dir))
    for mine, theirs in zip(metrics_of(spread), metrics_of(run), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-3)


def stop_on_ranks(rank, world, run):
    os.environ["WORLD_SIZE"] = str(world)
    trainer = build(run)
    if rank == 0:
        trainer.recorder.trackers.append(SignalAfter(STOPPED, 15))
    assert trainer.fit() == ExitCode.resumable
    mine = trainer.state.anticipation.state(STOPPED)
    whole = {name: tensor.long().full_tensor() for name, tensor in mine.items()}  # gloo: no int16
    again = build(run)
    read = {
        name: t.long().full_tensor() for name, t in again.state.anticipation.state(STOPPED).items()
    }
    assert differing(whole, read) == []


@pytest.mark.slow
def test_choices_of_two_ranks_are_read_by_one_process(run, tmp_path):
    spread = replace(run, run_dir=str(tmp_path / "spread"))
    run_distributed(stop_on_ranks, 2, spread)
    trainer = build(spread)
    chosen = trainer.state.anticipation.state(STOPPED)
    assert {name.split(".")[1] for name in chosen} == {"+1"}
    alone = build(replace(run, run_dir=str(tmp_path / "alone")))
    alone.recorder.trackers.append(SignalAfter(STOPPED, 15))
    assert alone.fit() == ExitCode.resumable
    ours = alone.state.anticipation.state(STOPPED)
    assert chosen.keys() == ours.keys()
    for name, index_RTK in chosen.items():
        same = float((index_RTK == ours[name]).float().mean())
        assert same > 0.98, (name, same)  # ties and rounding move single choices
    assert trainer.fit() == ExitCode.finished
    assert told(spread) == told(run)
