"""What a reader of W&B and TensorBoard sees of a run that was killed, or rolled back.

W&B offline is read by its own ``wandb leet inspect``, TensorBoard by its EventAccumulator. Bound:
the steps and losses of ``metrics.jsonl``, each step once. Kills are SIGKILL of a real process.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import warm_context
from tests.integration.poisoned_run import FIRST_SPIKE, poisoned_run, write_poisoned
from tests.integration.small_run import KillAfter, fit, metrics_of, small_run, write_corpus
from tests.train.checkpoint.folders import locate
from train.build import build
from train.checkpoint.files import STATE
from train.config.schema import SampleConfig, WandbConfig, WandbMode
from train.display.wandb_tracker import last_step, logged_steps
from train.errors import ExitCode

STEPS, EVERY, KILLED_AFTER = 8, 3, 5


def shown(run):
    """The run with both trackers on."""
    offline = WandbConfig(mode=WandbMode.offline)
    return replace(run, wandb=offline, tensorboard=True, sample=SampleConfig(tokens=0))


def wandb_fragments(run, run_id="*"):
    """Files of a W&B run, in the order in which ``wandb sync`` takes them."""
    return sorted((Path(run.run_dir) / "wandb").glob(f"offline-run-*-{run_id}/*.wandb"))


def wandb_history(run, run_id="*"):
    """(step, loss) of all its files in that order, by W&B's own reader."""
    found = []
    for file in wandb_fragments(run, run_id):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        records = [json.loads(line) for line in printed.splitlines()]
        items = [r["history"]["item"] for r in records if r["type"] == "history"]
        assert [item["_step"] for item in items] == list(logged_steps(file))
        found += [(item["_step"], item["loss"]) for item in items]
    return found


def tensorboard_history(run):
    """(step, loss) that TensorBoard shows; floats there have 32 bits."""
    events = EventAccumulator(f"{run.run_dir}/tensorboard", size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def in_metrics(run):
    return [(record["step"], record["loss"]) for record in metrics_of(run)]


def assert_shows_metrics(run, run_id="*"):
    assert wandb_history(run, run_id) == in_metrics(run)
    expected = [(step, pytest.approx(loss, rel=1e-6)) for step, loss in in_metrics(run)]
    assert tensorboard_history(run) == expected


def id_of(run):
    state = json.loads((locate(run.run_dir) / STATE).read_text())
    return state["trackers"]["wandb"]["id"]


class Sigkill(KillAfter):
    """A tracker that lets this process be killed once W&B's file holds the step."""

    def __init__(self, folder):
        super().__init__(KILLED_AFTER)
        self.folder = Path(folder)

    def show(self, record):
        if record["step"] < self.step:
            return
        run_id = (self.folder / "wandb_id.txt").read_text().split()[0]
        deadline = time.monotonic() + 120
        while last_step(self.folder, run_id) < self.step:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(run):
    os.environ.pop("WANDB_SERVICE", None)  # its own W&B process, as a run of its own has
    trainer = build(run)
    trainer.recorder.trackers.append(Sigkill(run.run_dir))
    trainer.fit()


def sigkill(run):
    process = warm_context().Process(target=run_until_killed, args=(run,))
    process.start()
    process.join(500)
    assert process.exitcode == -signal.SIGKILL


def lose_all_but_one_step(file):
    """As where the host went down before the file's blocks were written."""
    while len(list(logged_steps(file))) > 1:
        os.truncate(file, file.stat().st_size - 64)


@pytest.fixture
def run(tmp_path):
    corpus = write_corpus(tmp_path)
    small = small_run(
        tmp_path / "run", corpus, steps=STEPS, eval_every=0, monitor_every=0,
        checkpoint_every=EVERY, async_checkpoint=False,
    )  # fmt: skip
    return shown(small)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("lost", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kill_and_resume_show_every_step_once(run, lost):
    """W&B holds steps beyond the checkpoint, or has lost even those before it."""
    sigkill(run)
    if lost:
        lose_all_but_one_step(*wandb_fragments(run))
    held = [step for step, _ in wandb_history(run)]
    assert held == ([1] if lost else list(range(1, KILLED_AFTER + 1)))
    first, folder = id_of(run), Path(run.run_dir)
    (folder / "wandb_id.txt").unlink()
    assert fit(run)[0] == ExitCode.finished
    assert len(wandb_fragments(run, first)) == len(wandb_fragments(run)) == 2
    assert id_of(run) == first == (folder / "wandb_id.txt").read_text().split()[0]
    assert [step for step, _ in in_metrics(run)] == list(range(1, STEPS + 1))
    assert_shows_metrics(run)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_copied_checkpoint_continues_the_same_wandb_run(run, tmp_path):
    """Nothing but the checkpoints and the config goes along."""
    sigkill(run)
    folder, copy = Path(run.run_dir), replace(run, run_dir=str(tmp_path / "copy"))
    shutil.copytree(folder / "checkpoints", Path(copy.run_dir) / "checkpoints")
    shutil.copy(folder / "config.yaml", copy.run_dir)
    first = id_of(run)
    assert fit(copy)[0] == ExitCode.finished
    assert id_of(copy) == first
    assert [step for step, _ in wandb_history(copy, first)] == list(range(EVERY + 1, STEPS + 1))
    assert_shows_metrics(copy)


@pytest.mark.timeout(1200)
def test_rollback_shows_every_step_once(tmp_path):
    """The abandoned steps stay in the W&B run that they were sent to."""
    run = shown(poisoned_run(tmp_path / "run", write_poisoned(tmp_path)))
    assert fit(run)[0] == ExitCode.finished
    assert metrics_of(run)[-1]["rollbacks"] == 2
    first, _, number = id_of(run).partition("-r")
    assert number == "2"
    assert_shows_metrics(run, f"{first}-r2")
    before = list(range(1, FIRST_SPIKE))
    for run_id in (first, f"{first}-r1"):
        steps = [step for step, _ in wandb_history(run, run_id)]
        assert steps == [*before, FIRST_SPIKE], run_id
