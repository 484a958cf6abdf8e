"""What a study's runs answer far behind: who is asked, what counts, what report and archive say.

Runs and answers are planted as trainer and probe leave them; shares of right answers are known.
"""

import json
import re
from dataclasses import replace

import pytest

from scripts import probe, study
from scripts.reports.answer import lead
from scripts.reports.study_report import as_json, study_document
from scripts.studies.archive import archive_of, open_archive, pack
from scripts.studies.cells import Sweep
from scripts.studies.config import load_study
from scripts.studies.probed import answers_of, probe_words, unasked
from scripts.studies.protocol import Protocol
from scripts.studies.results import gather
from scripts.studies.store import Store
from tests.studies.folders import CODE, leave_run
from train.errors import ExitCode, UserError

SMALL = ["steps=10", "seeds=[1,2,3]", "evaluations=2", "again=false"]
RIGHT = {"trained": 0.98, "untrained": 0.25, "all_entries": 0.97}


def answers(share, lengths=(128, 256, 512), count=16, depths=5, within=1):
    """A fraction of right answers beyond the windows; all are right within (last depths)."""
    rows = [
        {"task": "pairs", "length": length, "depth": depth / (depths - 1), "count": count,
         "beyond": depth < depths - within, "correct": share if depth < depths - within else 1.0,
         "chance": 1 / 52}
        for length in lengths for depth in range(depths)
    ]  # fmt: skip
    return json.dumps({"models": {"run": {"needles": rows}}})


def finished(tmp_path, *words):
    """A study whose runs are all trained; returns its protocol."""
    plan = Protocol(load_study("indexer_loss", [*SMALL, *words]), Store([tmp_path], CODE), tmp_path)
    while (batch := next(plan.batches(), None)) is not None:
        for cell in batch.cells:
            folder = tmp_path / f"{cell.arm}_{cell.lr}_{cell.seed}"
            away = abs(cell.lr - 1.5e-2) + 0.01 * cell.seed
            leave_run(folder, plan.config(cell), {5: 3.0, 10: 2.0 + away})
            (folder / "checkpoints" / "step_10").mkdir(parents=True)
        plan.store.scan()
    return plan


def answer(run, share=None, within=1):
    """Seeds differ by a hundredth."""
    arm = run.folder.name.rsplit("_", 2)[0]
    text = answers((RIGHT[arm] if share is None else share) - 0.01 * run.run.seed, within=within)
    (run.folder / "probe.json").write_text(text)


def test_every_seeds_run_is_asked_once_and_the_search_is_not(tmp_path, monkeypatch, capsys):
    plan = finished(tmp_path)
    asked = list(unasked(plan))
    assert len(asked) == 9
    assert {run.run.seed for run in asked} == {1, 2, 3}
    called = []

    def child(words, lock):
        options = probe.parse(words[1:])
        assert (options.needle, options.only, options.count) == (["pairs"], ["needles"], 16)
        assert probe.check(options) == [128, 256, 512]
        (run,) = (run for run in asked if run.folder == options.models[0] == options.out)
        answer(run)
        called.append(run)
        return ExitCode.finished

    monkeypatch.setattr(study, "_child", child)
    assert study._ask(plan, 0) == ExitCode.finished
    assert len(called) == 9
    assert study._ask(plan, 0) == ExitCode.finished
    assert len(called) == 9, "they have answered"
    assert "scripts/probe.py" in capsys.readouterr().out


def test_a_probe_that_does_not_end_well_ends_the_study(tmp_path, monkeypatch):
    plan = finished(tmp_path)
    monkeypatch.setattr(study, "_child", lambda words, lock: ExitCode.resumable)
    assert study._ask(plan, 0) == ExitCode.resumable


def test_report_and_archive_tell_right_answers_beside_the_loss(tmp_path):
    plan = finished(tmp_path)
    assert gather("indexer_loss", plan).answers is None
    for run in list(unasked(plan)):
        answer(run)
    path = archive_of("indexer_loss", tmp_path / "packed")
    pack(plan, path)
    for protocol in (plan, open_archive(path)):
        results = gather("indexer_loss", protocol)
        found = results.answers
        assert found.questions == 3 * 4 * 16
        for arm, share in RIGHT.items():
            wanted = {seed: share - 0.01 * seed for seed in (1, 2, 3)}
            assert found.shares[arm] == pytest.approx(wanted)
        assert found.tests["untrained"][0].mean == pytest.approx(0.25 - 0.98)
        line = lead(results)
        assert "of 192 questions beyond the windows are right: trained 0.960" in line
        assert "untrained 0.230 (fewer: -0.730" in line
        assert as_json(results)["answers"]["shares"]["trained"]["2"] == pytest.approx(0.96)
        written = study_document(results).write(tmp_path / "report").read_text()
        assert "## What lies far behind" in written
        assert re.search(r"\| untrained +\| 0\.230 +\| -0\.730 ", written)


def test_equal_answers_and_single_seeds_get_no_verdict(tmp_path):
    plan = finished(tmp_path)
    runs = list(unasked(plan))
    for run in runs:
        if run.run.seed < 3:
            answer(run)
    assert "untrained 0.235 (no verdict: -0.730" in lead(gather("indexer_loss", plan))
    for run in runs:
        answer(run, 0.5)
    line = lead(gather("indexer_loss", plan))
    assert "untrained 0.480 (no verdict: +0.000" in line


@pytest.mark.parametrize("change", [{"lengths": (128, 256)}, {"count": 8}, {"depths": 3}])
def test_answers_to_other_questions_do_not_count(tmp_path, change):
    plan = finished(tmp_path)
    run = next(unasked(plan))
    (run.folder / "probe.json").write_text(answers(0.9, **change))
    assert answers_of(run, plan.study.probe) == {}
    answer(run)
    assert len(answers_of(run, plan.study.probe)) == 15


def test_all_arms_are_judged_by_what_lies_beyond_every_one(tmp_path):
    """An arm whose windows relay farther answers more of the same questions within them."""
    plan = finished(tmp_path)
    for run in list(unasked(plan)):
        answer(run, within=2 if run.folder.name.startswith("all_entries") else 1)
    assert list(unasked(plan)) == []
    results = gather("indexer_loss", plan)
    assert results.answers.questions == 3 * 3 * 16
    for arm, share in RIGHT.items():
        wanted = {seed: share - 0.01 * seed for seed in (1, 2, 3)}
        assert results.answers.shares[arm] == pytest.approx(wanted)


def test_questions_within_the_windows_are_asked_once_and_judge_nobody(tmp_path):
    plan = finished(tmp_path)
    for run in list(unasked(plan)):
        answer(run, within=5 if run.folder.name.startswith("all_entries") else 1)
    assert list(unasked(plan)) == []
    results = gather("indexer_loss", plan)
    assert "no question stands beyond the windows of every arm (pairs)" in lead(results)
    written = study_document(results).write(tmp_path / "report").read_text()
    assert "No question stands beyond the windows of every arm." in written


def test_runs_that_were_not_asked_are_listed(tmp_path):
    plan = finished(tmp_path)
    for run in list(unasked(plan)):
        if run.run.seed != 2 or "untrained" not in run.folder.name:
            answer(run)
    written = study_document(gather("indexer_loss", plan)).write(tmp_path / "report").read_text()
    assert "Not asked, or elsewhere: untrained of seeds [2]." in written
    assert "over training seeds alone" in written
    assert "While the indexer of `trained` warms up" in written


def run_all(plan, tmp_path, *words):
    args = study._parse(["study=indexer_loss", *words, "--archive", str(tmp_path / "docs")])
    return study._run_all(plan, args, 0, "indexer_loss")


def probing(monkeypatch, plan, code=ExitCode.finished):
    """A child that answers, or ends so; returns the folders that it was asked of."""
    by_folder, asked = {str(run.folder): run for run in unasked(plan)}, []

    def child(words, lock):
        asked.append(words[1])
        if code == ExitCode.finished:
            answer(by_folder[words[1]])
        return code

    monkeypatch.setattr(study, "_child", child)
    return asked


def test_answers_behind_the_last_batch_reach_the_archive(tmp_path, monkeypatch):
    plan = finished(tmp_path)
    asked = probing(monkeypatch, plan)
    assert run_all(plan, tmp_path) == ExitCode.finished
    assert len(asked) == 9
    packed = open_archive(archive_of("indexer_loss", tmp_path / "docs" / study.PACKED))
    assert len(gather("indexer_loss", packed).answers.shares["trained"]) == 3


def test_questions_heed_limit_and_share(tmp_path, monkeypatch):
    plan = finished(tmp_path)
    asked = probing(monkeypatch, plan)
    assert run_all(plan, tmp_path, "--time-limit", "1") == ExitCode.resumable
    assert asked == []
    assert run_all(plan, tmp_path, "--share", "2/3") == ExitCode.finished
    assert len(asked) == 3
    assert {folder.rsplit("_", 1)[1] for folder in asked} == {"2"}


def test_questions_that_fail_hold_up_no_training(tmp_path, monkeypatch):
    plan = finished(tmp_path)
    asked = probing(monkeypatch, plan, ExitCode.user_error)
    batches = [Sweep("one", (), "seed"), Sweep("two", (), "seed"), None]
    cells = (next(iter(plan.finished())),)
    left = iter([replace(b, cells=cells) if b else None for b in batches])
    monkeypatch.setattr(study, "first_of_share", lambda *_: next(left))
    started = []
    monkeypatch.setattr(study, "_start", lambda *_: started.append(1) or ExitCode.finished)
    assert run_all(plan, tmp_path) == ExitCode.user_error
    assert len(started) == 2
    assert len(asked) == 1


def test_runs_of_other_machines_or_without_weights_are_not_asked(tmp_path):
    plan = finished(tmp_path)
    first, second, *_ = unasked(plan)
    (first.folder / "checkpoints" / "step_10").rmdir()
    left = {run.folder for run in unasked(plan)}
    assert first.folder not in left
    assert second.folder in left
    plan.out = tmp_path / "mine"
    assert list(unasked(plan)) == []
    assert str(second.folder) in probe_words(second, plan.study.probe)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("probe.needle=haystack", "probe.needle=haystack must be one of single"),
        ("probe.lengths=[]", "probe.lengths=[] must be"),
        ("probe.lengths=[64]", "probe.lengths=[64] must be"),
        ("probe.count=0", "probe.count=0 must be 1 or more"),
        ("arms.untrained.evaluates=trained", "asks checkpoints, and arms=['untrained'] leave none"),
    ],
)
def test_questions_that_cannot_be_are_refused(word, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_study("indexer_loss", [word])
