"""A run that meets poisoned batches: found, rolled back, passed, and the same after a kill.

Oracle of a rollback: a run of its own that trains to the checkpoint, plans the bad batches without
training on them, and goes on. Bound: equality of every tensor, both optimizers included, and of
every metric but the counters that say what happened. Kills are SIGKILL of a real process.
"""

import json
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers import warm_context
from tests.integration.poisoned_run import (
    EVERY,
    FIRST_SPIKE,
    STEPS,
    poisoned_run,
    settings,
    write_poisoned,
)
from tests.integration.small_run import (
    KillAfter,
    SignalAfter,
    differing,
    final_tensors,
    fit,
    metrics_of,
)
from tests.train.checkpoint.folders import locate
from tests.train.samples import read_samples
from train.build import build
from train.checkpoint import reader as checkpoint_reader
from train.config.recovery import Anticipatory, Remedy
from train.errors import ExitCode, TrainingFailedError
from train.record.plots import rollbacks

TARGET = FIRST_SPIKE - 1  # the checkpoint before it
COUNTERS = ("loss_spikes", "rollbacks", "abandoned_steps")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_poisoned(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def recovered(corpus, tmp_path_factory):
    """Two rollbacks (four poisoned batches, two are enough for one), then anticipatory routing."""
    run = poisoned_run(tmp_path_factory.mktemp("runs") / "recovered", corpus)
    code, trainer = fit(run)
    assert code == ExitCode.finished
    return run, trainer


def again(run, folder, **recovery):
    return settings(replace(run, run_dir=str(folder)), **recovery)


def samples_of(run):
    return read_samples(Path(run.run_dir))


def without_counters(records):
    return [{k: v for k, v in r.items() if k not in COUNTERS} for r in records]


def test_metrics_tell_of_a_rollback_and_hold_no_step_twice(recovered):
    run, trainer = recovered
    records = metrics_of(run)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert [r["rollbacks"] for r in records] == [0] * TARGET + [2] * (STEPS - TARGET)
    assert [r["loss_spikes"] for r in records] == [0] * TARGET + [4] * (STEPS - TARGET)
    told = {r["step"]: r["abandoned_steps"] for r in records if "abandoned_steps" in r}
    assert told == {TARGET + 1: 2}
    # one step chooses for itself, since the weights before it are gone
    assert [r["step"] for r in records if "anticipated" in r] == list(range(TARGET + 2, TARGET + 7))
    assert rollbacks(records) == [records[TARGET - 1]["tokens"]]
    assert max(r["loss"] for r in records[TARGET:]) < records[TARGET - 1]["loss"]
    assert trainer.state.progress.skipped_steps == 0


class SkipBatches(KillAfter):
    """A tracker that has the loader pass batches over."""

    def __init__(self, trainer, step, count):
        super().__init__(step)
        self.trainer, self.count = trainer, count

    def show(self, record):
        if record["step"] == self.step:
            for _ in range(self.count):
                self.trainer.state.loader.plan(4, 48)


@pytest.mark.core
def test_rollback_is_the_run_that_never_met_the_batches(recovered, tmp_path):
    """With ``patience`` 3 and one batch left out on top, one rollback passes all four."""
    run, _ = recovered
    told = {"patience": 3, "skip_steps": 1, "anticipatory": Anticipatory.never}
    rolled = again(run, tmp_path / "rolled", **told)
    assert fit(rolled)[0] == ExitCode.finished
    passed = again(run, tmp_path / "passed", on_spike=Remedy.none)
    trainer = build(passed)
    trainer.recorder.trackers.append(SkipBatches(trainer, TARGET, 4))
    assert trainer.fit() == ExitCode.finished
    assert [r["rollbacks"] for r in metrics_of(rolled)][-1] == 1
    assert without_counters(metrics_of(rolled)) == without_counters(metrics_of(passed))
    assert samples_of(rolled) == samples_of(passed)
    assert differing(final_tensors(rolled), final_tensors(passed)) == []


class SigkillAfter(SignalAfter):
    """A tracker that lets the operating system kill this process after a step was shown n times."""

    def __init__(self, step, times=1):
        super().__init__(step, signal.SIGKILL)
        self.times = times

    def show(self, record):
        self.times -= record["step"] == self.step
        if not self.times:
            super().show(record)


def run_until_killed(run, step, times):
    os.environ["OMP_NUM_THREADS"] = "1"
    trainer = build(run)
    trainer.recorder.trackers.append(SigkillAfter(step, times))
    trainer.fit()


def sigkill(run, step, times):
    """Kill a run of its own; what was to be saved before the step is on disk by then."""
    run = replace(run, train=replace(run.train, async_checkpoint=False))
    context = warm_context()
    process = context.Process(target=run_until_killed, args=(run, step, times))
    process.start()
    process.join(200)
    assert process.exitcode == -signal.SIGKILL


# step, and how often it has been reached by then: step 9 comes three times, 9 and 10 are abandoned
IN_THE_SPIKE, AFTER_THE_FIRST, AFTER_THE_LAST = (TARGET + 1, 1), (TARGET + 1, 2), (TARGET + 1, 3)
IN_THE_MODE = (TARGET + EVERY + 1, 1)  # behind a checkpoint that holds choices


@pytest.mark.core
@pytest.mark.parametrize(
    ("step", "times"),
    [
        pytest.param(*IN_THE_SPIKE, marks=pytest.mark.slow, id="in-the-spike"),
        pytest.param(*AFTER_THE_FIRST, marks=pytest.mark.slow, id="after-the-first"),
        pytest.param(*AFTER_THE_LAST, marks=pytest.mark.slow, id="right-after"),
        pytest.param(*IN_THE_MODE, id="in-the-mode"),
    ],
)
def test_sigkill_around_a_rollback_continues_bitwise(recovered, tmp_path, step, times):
    reference, _ = recovered
    run = again(reference, tmp_path / "run")
    sigkill(run, step, times)
    assert metrics_of(run)[-1]["step"] == step
    newest = checkpoint_reader.saved_tensors(locate(run.run_dir))
    holds = {name.split(".")[1] for name in newest if name.startswith("anticipated.")}
    assert holds == ({"+1"} if (step, times) == IN_THE_MODE else set())
    assert fit(run)[0] == ExitCode.finished
    assert metrics_of(run) == metrics_of(reference)
    assert samples_of(run) == samples_of(reference)
    assert differing(final_tensors(run), final_tensors(reference)) == []


@pytest.mark.slow
@pytest.mark.parametrize("step", [TARGET - 1, TARGET + 1])
def test_sigterm_before_a_rollback_changes_nothing(recovered, tmp_path, step):
    """The checkpoint of the signal is nearer to the spike than the one that is gone back to."""
    reference, _ = recovered
    run = again(reference, tmp_path / "run")
    trainer = build(run)
    trainer.recorder.trackers.append(SignalAfter(step, signal.SIGTERM))
    assert trainer.fit() == ExitCode.resumable
    assert fit(run)[0] == ExitCode.finished
    assert metrics_of(run) == metrics_of(reference)
    assert differing(final_tensors(run), final_tensors(reference)) == []


@pytest.mark.slow
def test_stop_saves_nothing_of_the_spike(recovered, tmp_path):
    run = again(recovered[0], tmp_path / "run", on_spike=Remedy.stop)
    run.train.checkpoint_every = 1
    with pytest.raises(TrainingFailedError, match=r"on_spike=stop"):
        fit(run)
    assert metrics_of(run)[-1]["step"] == FIRST_SPIKE + 1
    assert locate(run.run_dir).name == f"step_{FIRST_SPIKE - 1:08d}"
    assert not json.loads((tmp_path / "run" / "receipt.json").read_text())["finished"]


@pytest.mark.slow
def test_skip_leaves_the_updates_out(recovered, tmp_path):
    """The weights behind the spike are those of before it."""
    run = again(recovered[0], tmp_path / "run", on_spike=Remedy.skip)
    trainer = build(run)
    kept = []

    class Weights(KillAfter):
        def show(self, record):
            if record["step"] in (self.step, self.step + 4):
                kept.append({n: t.clone() for n, t in trainer.engine.state().items()})

    trainer.recorder.trackers.append(Weights(TARGET))
    assert trainer.fit() == ExitCode.finished
    assert differing(*kept) == []
    records = metrics_of(run)
    assert [r["skipped_steps"] for r in records][TARGET - 1 :] == [0, 1, 2, 3] + [4] * 5
    assert records[-1]["rollbacks"] == 0


class Spoil(KillAfter):
    """A tracker that breaks a weight after a step, as an update that goes wrong would."""

    def __init__(self, trainer, step):
        super().__init__(step)
        self.trainer = trainer

    def show(self, record):
        if record["step"] == self.step:
            self.step = 0
            self.trainer.engine.model.norm.weight.data[0] = math.nan


@pytest.mark.slow
def test_spoilt_weights_are_not_saved_and_rolled_back(recovered, tmp_path, caplog):
    """No step is finite any more: skipping would never end."""
    run = again(recovered[0], tmp_path / "run", on_nonfinite=Remedy.rollback)
    run.train.steps, run.train.checkpoint_every = TARGET, 2
    trainer = build(run)
    trainer.recorder.trackers.append(Spoil(trainer, EVERY))
    assert trainer.fit() == ExitCode.finished
    assert f"no checkpoint of step {EVERY}: model.norm.weight is not finite" in caplog.text
    records = metrics_of(run)
    assert {r["step"]: r["abandoned_steps"] for r in records if "abandoned_steps" in r} == {3: 3}
    assert all(math.isfinite(r["loss"]) for r in records)


@pytest.mark.slow
def test_endless_spikes_end_the_run_with_one_line(recovered, tmp_path):
    """Poison to the end of the file, which every rollback meets again."""
    reference, _ = recovered
    run = again(reference, tmp_path / "run", max_rollbacks=2)
    corpus = write_poisoned(tmp_path, range(11, 80))
    run.data.sources["words"].path = str(corpus)
    run.data.cache_dir = str(tmp_path / "cache")
    line = re.escape(f"step {FIRST_SPIKE + 1} is a loss spike")
    with pytest.raises(TrainingFailedError, match=line) as caught:
        fit(run)
    assert "rolled back 2 time(s) before: train.recovery.max_rollbacks=2" in str(caught.value)
    assert [p.name for p in (Path(run.run_dir) / "checkpoints").iterdir()] == [
        f"step_{n:08d}" for n in (TARGET - EVERY, TARGET)
    ]
