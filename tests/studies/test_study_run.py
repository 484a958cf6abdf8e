"""The command itself, with real runs: killed half-way it gives the report of one that was not.

Everything is compared but the section of measured seconds; both lie in the same folder in their
time, since a run's hash holds its folder. The planted effect is an arm that trains
on a tenth of the tokens; FP4 rounded afterwards must find the weights that it evaluates.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest

from scripts import study
from scripts.reports.study_report import MEASURED
from scripts.studies.archive import open_archive
from tests.helpers import ROOT
from tests.integration.small_run import write_corpus

pytestmark = pytest.mark.slow


def words(tmp_path, corpus, *more):
    base = [
        "model=v4_tiny", "model.num_hidden_layers=3", "model.layer_kinds=[swa,csa,hca]",
        "model.compress_ratios=[0,4,16]", "model.hidden_size=32", "data=jsonl",
        f"data.sources.jsonl.path={corpus}", f"data.cache_dir={corpus.parent / 'cache'}",
        "data.tokenizer=byte", "data.validation.bytes=4000", "data.validation.max_overlap=1",
        "train.seq_len=64", "train.global_batch_tokens=256", "train.micro_batch_size=4",
        "train.device=cpu", "train.eval_tokens=2048", "train.checkpoint_every=10",
        "train.final_eval_tokens=64",
        "optim.schedule.warmup_steps=2", "sample.tokens=0",
    ]  # fmt: skip
    return [
        f"base={base}", "seeds=[1,2,3,4]", "evaluations=2", "search.fraction=0.5",
        "search.extensions=8", *more, "--out", str(tmp_path / "runs"), "--archive",
        str(tmp_path / "docs"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def reported(tmp_path, name):
    text = (tmp_path / "docs" / name / "report.md").read_text()
    return text.partition(f"## {MEASURED}")[0]


@pytest.mark.timeout(3000)
def test_killed_study_gives_the_same_report_and_finds_a_tenth_of_the_tokens(corpus, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "here"
    tenth = "+arms={tenth:{fraction:0.1}}"
    args = ["study=aa", "steps=60", tenth]
    assert study.main([*args, *words(killed, corpus)]) == 0
    killed.rename(whole)
    command = [sys.executable, str(ROOT / "scripts" / "study.py"), *args, *words(killed, corpus)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        wait_for_metrics(killed, process, runs=5)
        os.killpg(process.pid, signal.SIGKILL)  # the study and its run
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert study.main([*args, *words(killed, corpus)]) == 0
    assert reported(killed, "aa") == reported(whole, "aa")
    lead = reported(whole, "aa").splitlines()[2]
    assert lead.startswith("**tenth has a higher loss than same")
    before = sorted((killed / "runs").rglob("metrics.jsonl"))
    times = [path.stat().st_mtime_ns for path in before]
    assert study.main([*args, *words(killed, corpus)]) == 0
    assert [path.stat().st_mtime_ns for path in before] == times  # nothing ran again


@pytest.mark.timeout(3000)
def test_weights_are_rounded_after_training_without_training_again(corpus, tmp_path):
    assert study.main(["study=fp4_qat", "steps=4", *words(tmp_path, corpus), "again=false"]) == 0
    runs = open_archive(tmp_path / "docs" / "archives" / "fp4_qat.tar.xz").recorded
    assert runs is not None
    assert sum(run.is_evaluation for run in runs.values()) == 4
    found = [run.rows_evaluated for run in runs.values()]
    assert found == pytest.approx([found[0]] * len(found), rel=1e-6), "all on the same text"
    assert "post_training" in reported(tmp_path, "fp4_qat")


@pytest.mark.timeout(3000)
def test_best_rates_come_from_every_rate_on_every_seed(corpus, tmp_path):
    """Two widths of a tiny model, four steps: too few for a verdict, and no seed trains twice."""
    sizes = ["~arms.w256", "~arms.d8", "~transfer.along.depth", "transfer.along.width=[w64,w128]"]
    sizes += ["arms.w64.overrides=['model.hidden_size=16']", "steps=4", "search.fraction=1"]
    sizes += ["seeds=[1,2]", "arms.w128.lr=[4.5e-2,6.3e-2,8.9e-2]"]
    assert study.main(["study=lr_transfer", *words(tmp_path, corpus), *sizes]) == 0
    runs = open_archive(tmp_path / "docs" / "archives" / "lr_transfer.tar.xz").recorded
    assert runs is not None
    rates = {arm: {cell.lr for cell in runs if cell.arm == arm} for arm in ("w64", "w128")}
    assert len(runs) == 2 * sum(map(len, rates.values()))
    assert len({run.name for run in runs.values()}) == len(runs)
    text = reported(tmp_path, "lr_transfer")
    assert "over width (w64 to w128) the best rates have the ratio" in text or "No answer" in text


@pytest.mark.timeout(3000)
@pytest.mark.skipif(find_spec("joblib") is None, reason="needs pip install -e .[sweep]")
def test_runs_side_by_side_give_the_report_of_runs_in_turn(corpus, tmp_path):
    args = ["study=aa", "steps=4", "+arms={tenth:{fraction:0.5}}"]
    in_turn, at_once = tmp_path / "in_turn", tmp_path / "here"
    assert study.main([*args, *words(at_once, corpus)]) == 0
    at_once.rename(in_turn)
    assert study.main([*args, *words(at_once, corpus), "--launcher", "joblib"]) == 0
    assert reported(at_once, "aa") == reported(in_turn, "aa")


def wait_for_metrics(folder, process, runs):
    deadline = time.monotonic() + 1500
    while time.monotonic() < deadline:
        if len(list((folder / "runs").rglob("metrics.jsonl"))) >= runs:
            return
        assert process.poll() is None, "the study ended before it was killed"
        time.sleep(0.05)
    pytest.fail("no runs in time")
