"""The reports under ``docs/studies`` say what the archives beside them say, to the letter.

An archive holds the study as it was asked and each run's whole config, so a default that has
changed since changes nothing here.
"""

import json
from types import SimpleNamespace

import pytest

from docs.studies.default_run import table as search
from scripts import report
from scripts.reports.study_report import study_document
from scripts.studies.archive import open_archive, pack
from scripts.studies.results import gather
from scripts.studies.store import ARCHIVED, Store, read_archive
from tests.helpers import ROOT
from train.config.command_line import compose_run

DOCS = ROOT / "docs" / "studies"
ARCHIVES = sorted((DOCS / "archives").iterdir())


def test_every_report_has_its_archive():
    reports = sorted(path.parent.name for path in DOCS.glob("*/report.md"))
    assert [path.name.removesuffix(ARCHIVED) for path in ARCHIVES] == reports
    assert len(reports) >= 4


@pytest.mark.parametrize("path", ARCHIVES, ids=lambda path: path.name)
def test_report_is_what_its_runs_say(path):
    name = path.name.removesuffix(ARCHIVED)
    results = gather(name, open_archive(path))
    assert results.missing == 0
    assert len({run.code for run in results.runs}) == 1
    assert study_document(results).markdown() == (DOCS / name / "report.md").read_text()


def test_report_of_an_archive_does_not_ask_for_todays_defaults(monkeypatch, tmp_path, capsys):
    """Composing a config of today is an error here, so nothing can come from one."""
    monkeypatch.setattr("scripts.studies.cells.compose_run", None)
    path = DOCS / "archives" / f"mhc_vs_plain{ARCHIVED}"
    assert report.main([str(path), "--out", str(tmp_path)]) == 0
    assert "plain has a higher loss than mhc" in capsys.readouterr().out
    written = tmp_path / "mhc_vs_plain" / "report.md"
    assert written.read_bytes() == (DOCS / "mhc_vs_plain" / "report.md").read_bytes()


def test_an_archive_packed_again_has_equal_bytes_and_names_the_same_runs(tmp_path):
    path = DOCS / "archives" / f"fp4_qat{ARCHIVED}"
    plan = open_archive(path)
    for name in ("one", "other"):
        pack(plan, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    again, before = read_archive(tmp_path / "one"), read_archive(path)
    # keys of a study that came later stand in the new one, at their defaults
    cells = [json.loads(archive.pop("")["study.json"])["cells"] for archive in (again, before)]
    assert cells[0] == cells[1]
    assert again == before
    assert open_archive(tmp_path / "one").study == plan.study


def test_runs_that_archives_share_are_read_once(monkeypatch):
    read = []

    def parse(folder, files):
        read.append(folder.name)
        return SimpleNamespace(identity=folder.name, code="c")

    monkeypatch.setattr("scripts.studies.store.parse_run", parse)
    names = [name for path in ARCHIVES for name in read_archive(path) if name]
    store = Store([DOCS / "archives"], None)
    assert sorted(read) == sorted({*names}) == sorted(store.runs)
    assert len(read) < len(names)


def test_table_of_the_default_runs_search_is_what_its_trials_say():
    trials = json.loads(search.TRIALS.read_text())
    assert search.table(trials) in search.DOCUMENT.read_text()
    steps = compose_run([]).train.steps
    assert [t["config"]["train"]["steps"] for t in trials.values()].count(steps) >= 1


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (b"no archive", [], "is no archive of runs"),
        (None, [], "is no archive of runs"),
        (b"no archive", ["runs/other"], "cannot stand beside it"),
    ],
)
def test_what_is_no_archive_is_refused_in_one_line(content, words, message, tmp_path, capsys):
    path = tmp_path / f"x{ARCHIVED}"
    if content is not None:
        path.write_bytes(content)
    assert report.main([str(path), *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
