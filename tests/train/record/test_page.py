"""``report.html`` and ``v4 watch``: what people see of a run while it trains, and afterwards."""

import re
import threading
import time

import pytest

from scripts import watch
from tests.integration.small_run import fit, small_run, write_corpus
from train.build import build
from train.display.console import Console
from train.display.page import Page
from train.errors import ExitCode, TrainingFailedError
from train.record.metrics import METRICS, MetricsFile
from train.record.report import RunReport
from train.run_folder.folder import LOCK
from train.run_folder.lock import owned


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def test_page_is_there_at_every_evaluation_and_reloads_until_the_end(tmp_path, corpus, monkeypatch):
    pages = []
    write = Page._write

    def watched(page, records, ended):
        write(page, records, ended)
        pages.append((records[-1]["step"], ended, (tmp_path / "run" / "report.html").read_text()))

    monkeypatch.setattr(Page, "_write", watched)
    assert fit(small_run(tmp_path / "run", corpus, eval_every=2))[0] == ExitCode.finished
    assert [(step, ended) for step, ended, _ in pages] == [(2, False), (4, False), (6, True)]
    for step, ended, text in pages:
        assert ('http-equiv="refresh"' in text) is not ended
        assert f"tep {step}" in text
        assert set(re.findall(r'(?:src|href)="(.{5})', text)) == {"data:"}, "needs no other file"
        assert "What it writes" in text
        for name in ("loss", "val_loss", "expert_load_max"):
            assert f"<code>{name}</code>" in text


def test_text_of_a_model_is_text(tmp_path, corpus, monkeypatch):
    """Whatever a model writes: no tag of the page."""
    monkeypatch.setattr("train.record.report.continue_text", lambda *_: "<script>alert(1)</script>")
    fit(small_run(tmp_path / "run", corpus, steps=2))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "&lt;script&gt;" in page
    assert "<script" not in page


def test_samples_in_between_change_no_later_bit(tmp_path, corpus, monkeypatch):
    def losses(folder):
        fit(small_run(folder, corpus, steps=5, eval_every=1))
        records = MetricsFile(folder / "metrics.jsonl").read()
        return [(r["loss"], r["val_loss"], r["grad_norm"]) for r in records]

    wrote = losses(tmp_path / "a")
    monkeypatch.setattr(RunReport, "write_text", lambda *_, **__: None)
    assert losses(tmp_path / "b") == wrote
    assert not (tmp_path / "b" / "sample.txt").exists()


def test_prompt_is_the_users_or_held_out_text(tmp_path, corpus):
    run = small_run(tmp_path / "a", corpus, steps=1)
    run.sample.prompt = None
    trainer = build(run)
    text = trainer.state.loader.validation_beginning(10**6).decode()
    prompt = trainer.recorder.report._sample[0]
    assert len(prompt.split()) > 2
    assert text.startswith(prompt)
    assert text[len(prompt)].isspace(), "no word is cut"
    run = small_run(tmp_path / "b", corpus, steps=1)
    run.sample.prompt = "mine"
    assert build(run).recorder.report._sample[0] == "mine"


def test_screen_is_free_when_a_run_fails(tmp_path, corpus, monkeypatch):
    trainer = build(small_run(tmp_path / "run", corpus, steps=2))
    closed = []
    monkeypatch.setattr(trainer.recorder.screen, "close", lambda: closed.append(True))
    monkeypatch.setattr(trainer, "_next_step", lambda: (_ for _ in ()).throw(TrainingFailedError))
    with pytest.raises(TrainingFailedError):
        trainer.fit()
    assert closed


# ---- watch ---------------------------------------------------------------------------------------
def test_new_lines_are_given_once_also_over_a_cut(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    lines = watch.NewLines(file.path)
    assert lines.read() == (None, [])
    for step in (1, 2, 3):
        file.write({"step": step})
    with file.path.open("a") as half:
        half.write('{"step": 4')
    assert [r["step"] for r in lines.read()[1]] == [1, 2, 3]
    assert lines.read() == (None, [])
    file.cut(2)
    file.write({"step": 3, "loss": 1.0})
    assert lines.read() == (None, []), "a resume repeats steps to the bit"
    file.cut(1)
    assert lines.read() == (1, [])
    file.write({"step": 2})
    assert [r["step"] for r in lines.read()[1]] == [2]


def test_lines_that_hold_no_step_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = watch.NewLines(path)
    path.write_text('garbage\n{"step": 1}\n[2]\n{"loss": 1.0}\n{"step": 2}\n')
    assert [r["step"] for r in lines.read()[1]] == [1, 2]


def test_watch_follows_a_run_to_its_end(tmp_path, corpus, caplog):
    caplog.set_level("INFO")
    run = small_run(tmp_path / "run", corpus, steps=8, log_every=1)
    (tmp_path / "run").mkdir()

    def train():
        with owned(tmp_path / "run"):
            fit(run)

    trained = threading.Thread(target=train)
    trained.start()
    while not (tmp_path / "run" / "config.yaml").exists():
        time.sleep(0.02)
    caplog.clear()
    assert watch.main([str(tmp_path / "run"), "--every", "0.05"]) == 0
    trained.join()
    told = [m for m in caplog.messages if m.startswith("step 8/8 ")]
    assert len(told) == 2, "one is the run's own"
    assert f"{tmp_path / 'run'} finished: step 8 of 8" in caplog.messages


def test_watch_waits_for_a_run_that_has_not_begun(tmp_path, corpus, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "later"

    def begin():
        while not any("waiting until one begins" in m for m in caplog.messages):
            if watched.wait(0.01):
                return
        folder.mkdir()
        (folder / LOCK).touch()  # as a start leaves it for a moment
        time.sleep(0.05)
        fit(small_run(tmp_path / "run", corpus, steps=2))
        (folder / LOCK).unlink()
        (tmp_path / "run").replace(folder)  # all at once: watch looks at any time

    watched = threading.Event()
    began = threading.Thread(target=begin)
    began.start()
    try:
        assert watch.main([str(folder), "--every", "0.01"]) == 0
    finally:
        watched.set()
        began.join()
    assert sum("waiting until one begins" in m for m in caplog.messages) == 1
    assert watch.main([str(tmp_path / "never"), "--once"]) == 2


def test_time_left_is_told_by_more_than_the_last_step(caplog):
    """As ``v4 watch`` does: steps of 2 s, of which the last took 60 s, with evaluations between."""
    caplog.set_level("INFO")
    console = Console(100, 0, every=1, bar=False, live=False)
    console.remember([{"step": n, "step_seconds": 2.0} for n in range(1, 49)])
    console.show({"step": 49, "step_seconds": 2.0, "eval_seconds": 10.0})
    console.show({"step": 50, "step_seconds": 60.0})
    told = [message.rpartition("left ")[2] for message in caplog.messages]
    assert told == ["1:52", "2:48"]


def test_watch_says_that_a_run_stopped(tmp_path, corpus, capsys, caplog):
    caplog.set_level("INFO")
    fit(small_run(tmp_path / "run", corpus, steps=4))
    MetricsFile(tmp_path / "run" / "metrics.jsonl").cut(3)
    assert watch.main([str(tmp_path / "run")]) == 0
    assert caplog.messages[-1] == f"{tmp_path / 'run'} stopped: step 3 of 4"
    assert watch.main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_every_metric_of_a_run_has_a_place_on_the_page(tmp_path, corpus):
    fit(small_run(tmp_path / "run", corpus, steps=2))
    page = (tmp_path / "run" / "report.html").read_text()
    records = MetricsFile(tmp_path / "run" / "metrics.jsonl").read()
    shown = re.findall(r"<code>(.+?)</code>", page)
    assert set(shown) == {name for record in records for name in record}
    assert len(METRICS) > len(shown) > 20
