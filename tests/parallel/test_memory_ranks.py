"""One of two ranks finds no memory: the job ends soon, with one line that names what helps.

The real launcher and entry; planted where an allocator raises it. The other rank is in a collective
by then, or comes to one: 30 s is the promise, the configured timeout is 10 minutes.
"""

import subprocess
import time

import pytest
import torch.distributed as dist

from parallel import lost_rank
from parallel.lost_rank import leave_by_own_error
from tests.helpers import ROOT
from tests.integration.small_run import write_corpus
from tests.parallel.torchrun import ONE_THREAD, command, end, words
from train.run_folder.lock import owned

ENTRY = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
import train.build
from train import pretrain

PLACE = os.environ["PLACE"]
RANKS = os.environ["FULL"].split()

def full(*_, **__):
    print("planted at", time.time(), flush=True)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

def in_backward(_, __, out):
    out[0].register_hook(full)

def from_step_2(act):
    return lambda *args, **named: act(*args, **named) if trainer.state.progress.step else None

def build(run, *rest, whole=train.build.build):
    global trainer
    trainer = whole(run, *rest)
    if os.environ["RANK"] not in RANKS:
        return trainer
    block = list(trainer.engine.model.layers.values())[-1]
    if PLACE == "forward":
        block.register_forward_pre_hook(from_step_2(full))
    elif PLACE == "backward":
        block.register_forward_hook(from_step_2(in_backward))
    elif PLACE == "optimizer":
        step = trainer.engine.optimizer.step
        trainer.engine.optimizer.step = lambda lr: (from_step_2(full)(), step(lr))
    else:
        trainer.state.tensors = full
    return trainer

def build_model(*_, **__):
    if os.environ["RANK"] in RANKS:
        full()
    time.sleep(60)

train.build.build = build
if PLACE == "build":
    train.build.build_model = build_model
if __name__ == "__main__":
    sys.exit(pretrain.command(sys.argv[1:]))
"""


class LeftError(Exception):
    """In place of the end of a process."""


@pytest.fixture
def leaves(monkeypatch):
    """``leaves(rank, lines, code)`` as that rank of one job, whose process does not end."""
    store = dist.HashStore()

    def left(code):
        raise LeftError(code)

    def leave(rank, lines, code):
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        with pytest.raises(LeftError) as error:
            leave_by_own_error(lines, code)
        return error.value.args[0]

    monkeypatch.setattr(lost_rank.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(lost_rank.os, "_exit", left)
    return leave


def test_the_first_rank_tells_and_all_know_its_code(leaves, capsys):
    assert lost_rank._code_of_another() == 0
    assert leaves(1, ["a", "b"], 2) == 2
    assert capsys.readouterr().err == "error: rank 1: a\nerror: rank 1: b\n"
    assert lost_rank._code_of_another() == 0  # its own
    assert leaves(3, ["c"], 2) == 2
    assert capsys.readouterr().err == ""
    assert lost_rank._code_of_another() == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "ranks"),
    [
        ("forward", "1"), ("forward", "0"), ("forward", "0 1"), ("backward", "1"),
        ("optimizer", "1"), ("checkpoint", "1"), ("build", "1"),
    ],
)  # fmt: skip
def test_a_rank_without_memory_ends_the_job_in_one_line(tmp_path, place, ranks):
    entry, folder = tmp_path / "entry.py", tmp_path / "run"
    entry.write_text(ENTRY)
    args = [*words(write_corpus(tmp_path), 5), "train.micro_batch_size=2", f"run_dir={folder}",
            "train.checkpoint_every=2", "train.eval_every=0"]  # fmt: skip
    job = subprocess.Popen(
        command(2, args, entry=entry), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**ONE_THREAD, "PLACE": place, "FULL": ranks},
    )  # fmt: skip
    try:
        printed, _ = job.communicate(timeout=250)
    finally:
        end(job)
    ended = time.time()
    assert job.returncode != 0
    planted = float(printed.partition("planted at ")[2].split()[0])
    assert ended - planted < 30, printed[-3000:]
    above, _, below = printed.partition("torch.distributed.elastic")  # what torchrun says
    [line] = [line for line in above.splitlines() if line.startswith("error: ")]
    when = {"build": "before the first step", "checkpoint": "in step 2"}.get(place, "in step 2")
    assert f"out of memory on cpu {when} (CUDA out of memory): give" in line
    assert line.removeprefix("error: ").startswith(tuple(f"rank {r}: " for r in ranks.split()))
    if place != "build":
        assert "give train.micro_batch_size=1 instead of 2" in line
    assert "exitcode  : 2" in below
    assert printed.rstrip().endswith(line)  # and once more below all that torchrun says
    assert "OutOfMemoryError" not in printed
    with owned(folder):  # nobody holds it
        pass
