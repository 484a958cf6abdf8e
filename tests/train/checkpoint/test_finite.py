"""One rule for every save and for the end of a run: what is not finite is nothing to go back to.

Oracle: the folders that are left, the exit code, and a JSON reader that takes no NaN.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.integration.small_run import (
    KillAfter,
    SignalAfter,
    fit,
    metrics_of,
    small_run,
    write_corpus,
)
from train import pretrain
from train.build import build
from train.checkpoint.manager import Checkpoints
from train.checkpoint.retention import remove
from train.config.schema import SampleConfig
from train.errors import ExitCode, TrainingFailedError, UserError
from train.record.receipt import write_json


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def run_of(folder, corpus, **train):
    keys = {"steps": 6, "eval_every": 0, "checkpoint_every": 2, "keep_checkpoints": 1} | train
    return replace(small_run(folder, corpus, **keys), sample=SampleConfig(tokens=0))


class SpoilAfter(KillAfter):
    """A tracker that puts a value into one tensor of the state after a step."""

    def __init__(self, step, tensors, name, value):
        super().__init__(step)
        self.tensors, self.name, self.value = tensors, name, value

    def show(self, record):
        if record["step"] == self.step:
            self.tensors[self.name].view(-1)[0] = self.value


def strict(path):
    def refuse(word):
        raise AssertionError(f"{path} holds {word}")

    return json.loads(path.read_text(), parse_constant=refuse)


def steps_left(run):
    return [int(p.name[-8:]) for p in Checkpoints(Path(run.run_dir) / "checkpoints").published()]


def guarded(trainer):
    return pretrain._guarded(trainer.fit, [])


WHERE = {
    "weight": ("model.head.weight", math.nan),
    "optimizer": ("optim.head.weight.exp_avg_sq", math.inf),
    "average": ("ema.head.weight", -math.inf),
}


@pytest.mark.core
@pytest.mark.parametrize("where", WHERE)
def test_run_that_ends_with_what_is_not_finite_keeps_the_last_good_one(
    corpus, tmp_path, capsys, caplog, where
):
    """FAULTS A2: it is found after step 5; step 6 is due, and is the last."""
    name, value = WHERE[where]
    run = run_of(tmp_path / "run", corpus, ema_decay=0.5)
    trainer = build(run)
    state = trainer.engine.state() | trainer.state.average.state()
    assert name in state
    trainer.recorder.trackers.append(SpoilAfter(5, state, name, value))
    assert guarded(trainer) == ExitCode.failure
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"error: after step 6 {name} is not finite" in err
    assert "is not finite: it was not saved, and the newest checkpoint is that of step 4" in err
    assert "no checkpoint of step 6: " in caplog.text
    assert steps_left(run) == [4]
    receipt = strict(tmp_path / "run" / "receipt.json")
    assert not receipt["finished"]
    assert receipt["progress"]["step"] == 6
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_run_that_is_stopped_with_what_is_not_finite_does_not_claim_to_be_resumable(
    corpus, tmp_path, capsys
):
    run = run_of(tmp_path / "run", corpus)
    trainer = build(run)
    trainer.recorder.trackers.append(
        SpoilAfter(3, trainer.engine.state(), "model.head.weight", math.nan)
    )
    trainer.recorder.trackers.append(SignalAfter(3, 15))
    assert guarded(trainer) == ExitCode.failure
    assert "the newest checkpoint is that of step 2" in capsys.readouterr().err
    assert steps_left(run) == [2]
    assert fit(run)[0] == ExitCode.finished
    assert [record["step"] for record in metrics_of(run)] == [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def broken(corpus, tmp_path_factory):
    """A finished run whose last checkpoint holds a NaN, as older code wrote it."""
    run = run_of(tmp_path_factory.mktemp("broken") / "run", corpus, steps=2)
    _, trainer = fit(run)
    tensors = trainer.engine.state()
    tensors["model.head.weight"].view(-1)[0] = math.nan
    folder = trainer.checkpoints.path(2)
    state = json.loads((folder / "state.json").read_text())
    remove(folder)
    Checkpoints(folder.parent).save(2, tensors, state)
    return run


@pytest.mark.parametrize("how", ["resume", "init_from", "eval_only"])
def test_checkpoint_that_is_not_finite_is_refused(broken, tmp_path, how):
    run = replace(broken, train=replace(broken.train, steps=4))
    if how != "resume":
        run = replace(run, run_dir=str(tmp_path / "run"), init_from=broken.run_dir)
        run.train.eval_only = how == "eval_only"
    with pytest.raises(UserError, match=r"step_00000002: its model\.head\.weight is not finite"):
        build(run)


def test_evaluation_that_is_not_finite_is_no_report(corpus, tmp_path):
    """Weights whose logits overflow: finite themselves."""
    run = run_of(tmp_path / "run", corpus, steps=1)
    fit(run)
    trainer = build(replace(run, train=replace(run.train, eval_only=True)))
    with torch.no_grad():
        trainer.engine.model.head.weight.fill_(3e38)
    with pytest.raises(TrainingFailedError, match=r"the evaluation is not finite: .*val_loss=nan"):
        trainer.fit()
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_last_evaluation_that_is_not_finite_ends_with_1(corpus, tmp_path, monkeypatch):
    run = run_of(tmp_path / "run", corpus, steps=1)
    trainer = build(run)
    measure = trainer.recorder.final_evaluator.evaluate
    trainer.recorder.final_evaluator.evaluate = lambda step: measure(step) | {"val_loss": math.nan}
    with pytest.raises(TrainingFailedError, match="after the last step is not finite"):
        trainer.fit()
    receipt = strict(tmp_path / "run" / "receipt.json")
    assert not receipt["finished"]
    assert receipt["validation"]["loss"] is None
    assert steps_left(run) == [1]


def test_reports_write_null_for_what_is_not_finite(tmp_path):
    write_json(tmp_path / "x.json", {"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": 1.5})
    assert strict(tmp_path / "x.json") == {"a": None, "b": [None, {"c": None}], "d": 1.5}
