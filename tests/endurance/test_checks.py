"""The judge of lives: what it allows a start to leave, and that its own faults are told.

Oracle: folders written by hand.
"""

import json
from types import SimpleNamespace

import pytest

from tests.endurance import checkpoints, checks, life, session
from tests.endurance.broken import BrokenError

pytestmark = pytest.mark.core
TERM = life.Start(during=life.Event(life.TERM))


@pytest.fixture
def judge(tmp_path):
    """Checks beside an undisturbed run of 8 steps."""
    usual = tmp_path / "usual" / "run"
    usual.mkdir(parents=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
        (usual / name).write_text(lines(8))
    numbers = [{"step": n, "loss": 1.0} for n in range(1, 9)]
    references = SimpleNamespace(
        folder=lambda *_: usual.parent, metrics=lambda *_: numbers, bounds=lambda _: [0.0] * 8
    )
    return checks.Checks("plain", references)


def lines(steps):
    return "".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in range(1, steps + 1))


def outcome(before, code, printed="", newest=0):
    rank = SimpleNamespace(code=code, printed=lambda: printed, facts=list)
    job = SimpleNamespace(ranks=[rank], codes=[code], facts=list, printed=lambda: printed)
    return checks.Outcome(TERM, job, newest, True, before)


def after(judge, folder, found):
    judge.after(found, folder, ["alone"] * 8)


def test_start_stopped_before_it_made_its_folder_leaves_none(judge, tmp_path):
    after(judge, tmp_path / "run", outcome({}, checks.RESUMABLE))


def test_start_stopped_before_its_first_step_leaves_what_lay_there(judge, tmp_path):
    """An earlier kill's: lines behind the checkpoint, a torn one, files that it was writing."""
    folder = tmp_path / "run"
    (folder / "checkpoints" / ".writing_step_00000003_aa").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(lines(2) + '{"step": 3, "lo\n')
    (folder / "samples.jsonl").write_text(lines(2))
    (folder / ".samples.jsonl.writing").write_text(lines(1))
    before = checkpoints.tree(folder)
    stopped = outcome(before, checks.RESUMABLE)
    after(judge, folder, stopped)
    trained = outcome(before, checks.RESUMABLE, "...\nstep 1/8 loss 1")
    (folder / "metrics.jsonl").write_text(lines(2))
    with pytest.raises(BrokenError, match=r"metrics.jsonl ends with step 2, not 0"):
        after(judge, folder, trained)
    (folder / "metrics.jsonl").write_text(lines(0))
    (folder / ".metrics.jsonl.writing").write_text(lines(0))
    with pytest.raises(BrokenError, match=r"left in the run folder: \['.metrics.jsonl.writing'\]"):
        after(judge, folder, stopped)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_finished_run_must_have_cut_what_lay_there(judge, tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / name).write_text(lines(1))
    found = outcome(checkpoints.tree(folder), checks.FINISHED)
    with pytest.raises(BrokenError, match="its newest good checkpoint is of step 0"):
        after(judge, folder, found)
    with pytest.raises(BrokenError, match=rf"{name} ends with step 1, not 0"):
        judge._lines(found, folder, ["alone"] * 8)


def test_fault_of_the_test_itself_breaks_its_life_alone(tmp_path, monkeypatch):
    class Living:
        def __init__(self, story, *_):
            self.story, self.counts, self.starts = story, {}, 1

        def run(self):
            if self.story.seed == 1:
                raise FileNotFoundError("run")

        def end(self):
            pass

    monkeypatch.setattr(session, "Living", Living)
    monkeypatch.setattr(session.commands, "prepare", lambda *_: None)
    lives = session.Session(tmp_path, 1, "", [])
    assert lives.many(range(3), 1, stop=False) == 1
    summary = json.loads((tmp_path / "ranks_1" / "summary.json").read_text())
    assert summary["lives"] == 3
    assert summary["broken"] == {"1": "the test itself failed: FileNotFoundError: run"}
    assert "Traceback" in (tmp_path / "ranks_1" / "life_000001" / "printed.txt").read_text()
