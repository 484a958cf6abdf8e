"""A disk that is full in the middle of a run costs the save that hits it and nothing else.

The disk is real and small: a tmpfs that holds one checkpoint and a half. Needs the right to mount.
"""

import logging
import subprocess
from dataclasses import replace

import pytest

from tests.integration.small_run import (
    differing,
    final_tensors,
    fit,
    metrics_of,
    small_run,
    write_corpus,
)
from train.build import build
from train.checkpoint import reader as checkpoint_reader
from train.errors import ExitCode


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
    mount("-t", "tmpfs", "-o", f"size={size * 3 // 2}", "none", disk)
    try:
        trainer.recorder.trackers.append(RoomAt(3, disk, size * 4))
        with caplog.at_level(logging.ERROR):
            assert trainer.fit() == ExitCode.finished
        assert "checkpoint of step 2 failed: OSError: [Errno 28] No space left" in caplog.text
        assert [p.name for p in sorted(disk.iterdir())] == ["step_00000001", "step_00000003"]
        checkpoint_reader.verify(disk / "step_00000001")
        assert metrics_of(run) == metrics_of(whole)
        assert differing(final_tensors(run), final_tensors(whole)) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
