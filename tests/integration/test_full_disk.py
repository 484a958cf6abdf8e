"""A disk that is full in the middle of a run costs the save that hits it and nothing else.

The disk is real and small: a tmpfs that holds one checkpoint and a half. Needs the right to mount.
"""

import contextlib
import logging
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.integration.small_run import (
    differing,
    final_tensors,
    fit,
    metrics_of,
    small_run,
    write_corpus,
)
from tests.train.test_pretrain_cli import SHORT
from train.build import build
from train.checkpoint import reader as checkpoint_reader
from train.errors import ExitCode
from train.pretrain import cli
from train.record.recorder import Recorder


class RoomAt:
    """A tracker: the disk grows before the save of a step."""

    def __init__(self, step, folder, num_bytes):
        self.step, self.folder, self.num_bytes = step, folder, num_bytes

    def show(self, record):
        if record["step"] == self.step:
            mount("-o", f"remount,size={self.num_bytes}", self.folder)

    def before_save(self):
        return {}

    def close(self):
        pass


def fill(folder: Path) -> None:
    """Leave no byte on the disk of a folder."""
    with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    mount("-t", "tmpfs", "-o", f"size={size}", "none", folder)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def mount(*args):
    done = subprocess.run(["mount", *map(str, args)], check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.decode().strip()}")


@pytest.mark.parametrize("behind", [True, False])
def test_full_disk_costs_the_save_and_not_the_run(tmp_path, caplog, behind):
    corpus = write_corpus(tmp_path)
    whole = small_run(tmp_path / "whole", corpus, steps=3, eval_every=0, checkpoint_every=1)
    whole = replace(whole, train=replace(whole.train, keep_checkpoints=0, async_checkpoint=behind))
    assert fit(whole)[0] == ExitCode.finished
    saved = tmp_path / "whole" / "checkpoints" / "step_00000001"
    size = sum(path.stat().st_size for path in saved.iterdir())
    run = replace(whole, run_dir=str(tmp_path / "run"))
    trainer = build(run)
    disk = trainer.checkpoints.folder
    disk.mkdir()
    with small_disk(disk, size * 3 // 2):
        trainer.recorder.trackers.append(RoomAt(3, disk, size * 4))
        with caplog.at_level(logging.ERROR):
            assert trainer.fit() == ExitCode.finished
        assert "checkpoint of step 2 failed: OSError: [Errno 28] No space left" in caplog.text
        assert [p.name for p in sorted(disk.iterdir())] == ["step_00000001", "step_00000003"]
        checkpoint_reader.verify(disk / "step_00000001")
        assert metrics_of(run) == metrics_of(whole)
        assert differing(final_tensors(run), final_tensors(whole)) == []


def test_full_disk_under_a_steps_metrics_is_one_line_and_resumable(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    with small_disk(folder, 64 << 20):
        assert cli([*SHORT, "train.steps=1", f"run_dir={folder}"]) == ExitCode.finished
        lines = folder / "metrics.jsonl"  # its last page is full: the next line needs another
        text = lines.read_text()
        lines.write_text(text[:-1] + " " * (-len(text) % 4096) + "\n")
        write = Recorder.write
        monkeypatch.setattr(Recorder, "write", lambda *a, **k: (fill(folder), write(*a, **k)))
        capsys.readouterr()
        assert cli([*SHORT, f"run_dir={folder}"]) == ExitCode.failure
        told = capsys.readouterr().err
        assert f"error: run_dir: No space left on device: the disk of {folder}" in told
        assert "Traceback" not in told
        monkeypatch.undo()
        (folder / "filler").unlink()
        assert cli([*SHORT, f"run_dir={folder}"]) == ExitCode.finished
