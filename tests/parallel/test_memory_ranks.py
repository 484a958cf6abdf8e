"""One of two ranks meets an error that the other does not: the job ends soon, with one line.

The real launcher and entry; planted where an allocator raises it. The other rank is in a collective
by then, or comes to one: 30 s is the promise, the configured timeout is 10 minutes.
"""

import os
import re
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from parallel import lost_rank
from parallel.lost_rank import all_meet_an_error, leave_by_own_error, lost_rank_ends_the_job
from parallel.mesh import init_process_group, leave_process_group
from scripts.layout_trials.asked import free_port
from tests.helpers import ROOT, warm_context
from tests.integration.small_run import write_corpus
from tests.parallel.torchrun import ONE_THREAD, command, end, words
from train.run_folder.lock import owned

ENTRY = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch
import parallel.errors
import train.build
from data.errors import DiskError
from train import pretrain

PLACE = os.environ["PLACE"]
RANKS = os.environ["FULL"].split()

ERRORS = {{
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "refusal": parallel.errors.ConfigError("planted: this cannot be"),
    "disk": DiskError("planted: the disk is full"),
}}

def full(*_, **__):
    os.write(1, f"planted at {{time.time()}}\\n".encode())  # whole: both ranks may write
    raise ERRORS[os.environ["ERROR"]]

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
    monkeypatch.setattr(lost_rank, "_LOOK", 0.0)
    return leave


def test_the_first_rank_tells_and_all_know_its_code(leaves, capsys):
    assert lost_rank._code_of_another() == 0
    assert leaves(1, ["a", "b"], 2) == 2
    assert capsys.readouterr().err == "error: rank 1: a\nerror: rank 1: b\n"
    assert lost_rank._code_of_another() == 0  # its own
    assert leaves(3, ["c"], 2) == 2
    assert capsys.readouterr().err == ""
    assert lost_rank._code_of_another() == 2


class GoneStore:
    """As rank 0, which held it, has left."""

    def __getattr__(self, _):
        raise dist.DistStoreError("connection reset by peer")


def test_a_rank_without_a_store_tells_its_error_and_leaves(leaves, monkeypatch, capsys):
    monkeypatch.setattr(lost_rank.distributed_c10d, "_get_default_store", GoneStore)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    assert not all_meet_an_error()
    assert lost_rank._code_of_another() == 0
    assert leaves(1, ["a"], 2) == 2
    assert capsys.readouterr().err == "error: rank 1: a\n"


class GoingStore:
    """Rank 0, which holds it, leaves while this rank waits for the others."""

    def add(self, _, amount):
        if not amount:
            raise dist.DistStoreError("connection reset by peer")
        return 1


def test_a_store_that_goes_meanwhile_went_with_a_rank_that_met_an_error(monkeypatch):
    monkeypatch.setattr(lost_rank.distributed_c10d, "_get_default_store", GoingStore)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    assert all_meet_an_error()


def test_an_error_that_all_ranks_meet_is_none_of_one_rank(leaves, monkeypatch):
    """Two jobs of a sweep, both refused by both ranks; in a third one rank alone refuses."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with ThreadPoolExecutor(2) as ranks:
        for _ in range(2):
            assert all(ranks.map(lambda _: all_meet_an_error(), range(2)))
    monkeypatch.setattr(lost_rank, "_TOGETHER", 0.2)
    assert not all_meet_an_error()


def test_a_rank_leaves_when_another_has_told(leaves, monkeypatch):
    """Whatever the rank itself is at; here its process lives on."""
    codes, ended = [], threading.Event()

    def left(code):
        codes.append(code)
        ended.set()

    leaves(1, ["a"], 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(lost_rank.os, "_exit", left)
    monkeypatch.setattr(lost_rank, "_LOOK", 0.01)
    monkeypatch.setattr(lost_rank, "_PATIENCE", 0.0)
    with lost_rank_ends_the_job(600):
        assert ended.wait(30)
    assert set(codes) == {2}


def test_the_looking_ends_with_what_it_watches(monkeypatch):
    """It would meet the end of the group, and warn of an error in a thread."""
    looking, ended = threading.Event(), []

    def look():
        looking.set()
        time.sleep(0.2)
        ended.append(True)
        return 0

    assert lost_rank._code_of_another() == 0  # there is no group
    monkeypatch.setattr(lost_rank, "_code_of_another", look)
    monkeypatch.setattr(lost_rank, "_LOOK", 0.01)
    with lost_rank_ends_the_job(600):
        assert looking.wait(30)
        ended.clear()
    assert ended


def as_rank(rank, port, folder):
    """As started without torchrun, with rank 0's process holding the store: it has no memory."""
    err = os.open(folder / str(rank), os.O_WRONLY | os.O_CREAT)
    os.dup2(err, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}  # fmt: skip
    lost_rank._LOOK, lost_rank._PATIENCE = 0.4, 0.8
    init_process_group(torch.device("cpu"))
    with lost_rank_ends_the_job(600):
        if rank == 0:
            leave_by_own_error(["no memory"], 2)
        dist.barrier()
    leave_process_group()


def test_a_rank_that_holds_the_store_leaves_when_the_others_know(tmp_path):
    port = free_port()
    ranks = [warm_context().Process(target=as_rank, args=(r, port, tmp_path)) for r in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    try:
        assert [rank.exitcode for rank in ranks] == [2, 2]
    finally:
        for rank in ranks:
            rank.kill()
    assert [(tmp_path / str(r)).read_text() for r in range(2)] == ["error: rank 0: no memory\n", ""]


def planted_job(folder, place, ranks, error):
    """What a job prints above and below torchrun's report, and seconds from a fault to its end."""
    entry = folder / "entry.py"
    entry.write_text(ENTRY)
    args = [*words(write_corpus(folder), 5), "train.micro_batch_size=2", f"run_dir={folder}/run",
            "train.checkpoint_every=2", "train.eval_every=0"]  # fmt: skip
    job = subprocess.Popen(
        command(2, args, entry=entry), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**ONE_THREAD, "PLACE": place, "FULL": ranks, "ERROR": error},
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
    assert printed.rstrip().endswith(line)  # and once more below all that torchrun says
    with owned(folder / "run"):  # nobody holds it
        pass
    return line, below, printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "ranks", "error", "code"),
    [
        ("checkpoint", "1", "refusal", 2), ("checkpoint", "0", "disk", 1),
        ("backward", "1", "disk", 1), ("build", "0", "refusal", 2),
    ],
)  # fmt: skip
def test_an_error_of_one_rank_ends_the_job_in_one_line(tmp_path, place, ranks, error, code):
    line, below, printed = planted_job(tmp_path, place, ranks, error)
    said = {"refusal": "planted: this cannot be", "disk": "planted: the disk is full"}[error]
    assert line == f"error: rank {ranks}: {said}"
    assert f"exitcode  : {code}" in below
    assert not re.search("ConfigError|DiskError", printed)


@pytest.mark.slow
def test_an_error_of_all_ranks_is_told_by_rank_0(tmp_path):
    line, below, printed = planted_job(tmp_path, "checkpoint", "0 1", "refusal")
    assert line == "error: planted: this cannot be"
    assert "exitcode  : 2" in below
    assert not re.search("ConfigError|DiskError", printed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "ranks"),
    [
        ("forward", "1"), ("forward", "0"), ("forward", "0 1"), ("backward", "1"),
        ("optimizer", "1"), ("checkpoint", "1"), ("build", "1"),
    ],
)  # fmt: skip
def test_a_rank_without_memory_ends_the_job_in_one_line(tmp_path, place, ranks):
    line, below, printed = planted_job(tmp_path, place, ranks, "memory")
    when = "before the first step" if place == "build" else "in step 2"
    assert f"out of memory on cpu {when} (CUDA out of memory): give" in line
    assert line.removeprefix("error: ").startswith(tuple(f"rank {r}: " for r in ranks.split()))
    if place != "build":
        assert "give train.micro_batch_size=1 instead of 2" in line
    assert "exitcode  : 2" in below
    assert "OutOfMemoryError" not in printed
