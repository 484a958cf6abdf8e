"""One rank fails on its own, as by an audit that only it does not pass: the whole job ends soon."""

import subprocess
import time

import pytest

from tests.helpers import ROOT
from tests.integration.small_run import write_corpus
from tests.parallel.torchrun import ONE_THREAD, command, end, wait_for_line, words

# The real entry; rank 1 raises between two steps, while rank 0 goes on into the next collective.
FAILING = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train.build
from tests.integration.small_run import KillAfter
from train import pretrain
from train.audit.faults import AuditError

class Fail(KillAfter):
    def show(self, record):
        if record["step"] == self.step:
            raise AuditError("planted: this rank alone does not pass")

def build(run, *rest, whole=train.build.build):
    trainer = whole(run, *rest)
    if os.environ["RANK"] == "1":
        trainer.recorder.trackers.append(Fail(2))
    return trainer

train.build.build = build
sys.exit(pretrain.cli(sys.argv[1:]))
"""


@pytest.mark.slow
def test_error_of_one_rank_ends_the_job(tmp_path):
    """30 s is the promise, the configured timeout is 10 minutes."""
    entry, log, folder = tmp_path / "entry.py", tmp_path / "log", tmp_path / "run"
    entry.write_text(FAILING)
    args = [*words(write_corpus(tmp_path), 500), "train.checkpoint_every=0", f"run_dir={folder}"]
    with log.open("w") as file:
        job = subprocess.Popen(
            command(2, args, entry=entry), stdout=file, stderr=file, env=ONE_THREAD
        )
    try:
        wait_for_line(folder / "metrics.jsonl", 2, [job], log)
        began = time.monotonic()
        code = job.wait(timeout=250)
        seconds = time.monotonic() - began
    finally:
        end(job)
    printed = log.read_text()
    print(f"down after {seconds:.1f} s")  # noqa: T201
    assert code == 1, printed[-3000:]
    assert "planted: this rank alone does not pass" in printed
    cause = printed.rpartition("Root Cause")[2]
    assert "rank      : 1 (local_rank: 1)" in cause
    assert seconds < 30
