"""One run at a time writes to a run folder; the lock of a process that is gone is taken over.

Other processes are forks of this one: real ones, without the start of an interpreter. Other hosts
are records in the file with another kernel's id; a file system without locks is one whose flock
says so.
"""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.helpers import run_distributed
from tests.train.test_pretrain_cli import SHORT
from train.errors import ExitCode, UserError
from train.pretrain import cli
from train.recovery.stop import Stopped
from train.run_folder import lock as folder_lock
from train.run_folder.folder import LOCK
from train.run_folder.lock import FolderLock, owned


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(folder_lock, "_PATIENCE", 0.2)
    monkeypatch.setattr(folder_lock, "_SETTLE", 0.05)


def forked(body):
    """Pid of a fork that runs ``body`` and leaves with what it returns."""
    child = os.fork()
    if not child:
        code = 99
        try:
            code = body() or 0
        finally:
            os._exit(code)
    return child


def code_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def holder(tmp_path):
    """A live process that owns the folder."""

    def hold():
        FolderLock(tmp_path).acquire()
        (tmp_path.parent / "ready").touch()
        time.sleep(300)

    child = forked(hold)
    wait_for(tmp_path.parent / "ready")
    yield child
    os.kill(child, signal.SIGKILL)
    code_of(child)
    (tmp_path.parent / "ready").unlink()


def record_of(folder):
    return json.loads((folder / LOCK).read_text())


def leave_record(folder, age=0.0, **changes):
    """What another host's process has written, so long ago."""
    path = folder / LOCK
    path.touch()
    here = {"pids": folder_lock._pid_namespace(), "inode": path.stat().st_ino}
    record = {"host": "far", "pid": 7, "boot": "another", "started": "5", "nonce": "x"}
    path.write_text(json.dumps(here | record | changes))
    now = time.time()
    os.utime(path, (now - age, now - age))


def free(folder):
    FolderLock(folder).acquire()


@pytest.mark.core
def test_second_start_is_one_line_that_names_folder_and_holder(tmp_path, holder):
    lock = FolderLock(tmp_path)
    with pytest.raises(UserError) as error:
        lock.acquire()
    text = str(error.value)
    assert text.startswith(f"run_dir={tmp_path} is in use by process {holder} on ")
    assert "\n" not in text


@pytest.mark.core
def test_lock_of_a_killed_process_is_free_at_once(tmp_path, holder):
    os.kill(holder, signal.SIGKILL)
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert record_of(tmp_path)["pid"] == os.getpid()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_process_that_is_just_dying_is_waited_for(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(folder_lock, "_PATIENCE", 60)
    killer = forked(lambda: time.sleep(0.1) or os.kill(holder, signal.SIGKILL))
    lock = FolderLock(tmp_path)
    lock.acquire()
    lock.release()
    assert code_of(killer) == 0


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_lock_goes_with_its_context_whatever_happens(tmp_path, error):
    def leave():
        with owned(tmp_path):
            assert record_of(tmp_path)["pid"] == os.getpid()
            raise error

    with pytest.raises(error):
        leave()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["unlink", "read_bytes"])
def test_signal_while_the_lock_goes_leaves_none(tmp_path, monkeypatch, call):
    done, signals = getattr(Path, call), [Stopped()]

    def struck(path, *args):
        if path.name == ".lock" and signals:
            raise signals.pop()
        return done(path, *args)

    lock = FolderLock(tmp_path)
    lock.acquire()
    monkeypatch.setattr(Path, call, struck)
    with pytest.raises(Stopped):
        lock.release()
    assert list(tmp_path.iterdir()) == []


def test_only_one_of_many_processes_is_in(tmp_path):
    """Each enters five times and finds nobody inside, however they meet at making and removing."""
    inside = tmp_path.parent / "inside"

    def enter():
        folder_lock._PATIENCE = 60
        for _ in range(5):
            with owned(tmp_path):
                inside.mkdir()  # fails where somebody is in
                time.sleep(0.002)
                inside.rmdir()

    children = [forked(enter) for _ in range(6)]
    assert [code_of(child) for child in children] == [0] * 6


def test_lock_of_a_file_that_was_just_removed_is_none(tmp_path, monkeypatch):
    """Between opening and locking it the holder leaves, and a third start makes another file."""
    first, third, take = FolderLock(tmp_path), FolderLock(tmp_path), folder_lock.file_lock.take
    first.acquire()

    def late(descriptor):
        monkeypatch.setattr(folder_lock.file_lock, "take", take)
        first.release()
        third.acquire()
        return take(descriptor)

    monkeypatch.setattr(folder_lock.file_lock, "take", late)
    with pytest.raises(UserError, match="is in use by"):
        free(tmp_path)
    third.release()
    assert list(tmp_path.iterdir()) == []


def test_fork_of_the_holder_does_not_keep_the_lock(tmp_path):
    """Workers that outlive a killed run."""
    pid_file = tmp_path.parent / "orphan"

    def hold_and_fork():
        lock = FolderLock(tmp_path)
        lock.acquire()
        orphan = forked(lambda: time.sleep(300))
        pid_file.write_text(str(orphan))
        os.kill(os.getpid(), signal.SIGKILL)

    assert code_of(forked(hold_and_fork)) == -signal.SIGKILL
    try:
        free(tmp_path)
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGKILL)


def test_fork_that_ends_does_not_release(tmp_path):
    lock = FolderLock(tmp_path)
    lock.acquire()
    assert code_of(forked(lock.release)) == 0
    with pytest.raises(UserError, match="is in use by"):
        free(tmp_path)
    lock.release()


# ---- other hosts ---------------------------------------------------------------------------------
def test_other_host_that_was_heard_of_lately_is_respected(tmp_path):
    leave_record(tmp_path, age=40)
    with pytest.raises(
        UserError,
        match=r"in use by process 7 on far, heard of 4\d s ago; if that is gone, the same command"
        rf" works in [78]\d s, or at once without {tmp_path / LOCK}",
    ):
        free(tmp_path)


def test_other_host_that_is_silent_is_taken_over(tmp_path):
    leave_record(tmp_path, age=folder_lock._TIMEOUT + 1)
    free(tmp_path)
    assert record_of(tmp_path)["pid"] == os.getpid()


def test_clock_that_was_set_back_delays_and_does_not_lock_out(tmp_path, monkeypatch):
    leave_record(tmp_path, age=-3600)
    with pytest.raises(UserError, match=r"heard of 0 s ago.* works in 1\d\d s"):
        free(tmp_path)
    monkeypatch.setattr(folder_lock, "_TIMEOUT", 0.1)
    time.sleep(0.2)
    free(tmp_path)


def test_two_hosts_that_take_over_at_once_are_not_both_let_in(tmp_path, monkeypatch):
    """The other one writes its name last; the kernel's lock does not tell them of each other."""
    leave_record(tmp_path, age=1e4)
    monkeypatch.setattr(folder_lock.time, "sleep", lambda _: leave_record(tmp_path, host="faster"))
    with pytest.raises(UserError, match="in use by process 7 on faster"):
        free(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_file_without_a_name_is_free_after_a_moment(tmp_path, content):
    """Its maker was killed before it wrote."""
    (tmp_path / LOCK).write_text(content)
    free(tmp_path)


def test_lock_that_was_copied_with_its_folder_is_free(tmp_path):
    leave_record(tmp_path, inode=1)
    free(tmp_path)


def test_copied_folder_of_this_host_is_free_where_there_are_no_locks(tmp_path, no_locks):
    leave_record(tmp_path, **folder_lock._own_record(os.open("/", os.O_RDONLY)))
    free(tmp_path)


@pytest.fixture
def no_locks(monkeypatch):
    monkeypatch.setattr(folder_lock.file_lock, "take", lambda descriptor: None)


def test_live_process_is_respected_where_there_are_no_locks(tmp_path, no_locks, holder):
    with pytest.raises(UserError, match=f"in use by process {holder} on "):
        free(tmp_path)
    os.kill(holder, signal.SIGKILL)
    os.waitid(os.P_PID, holder, os.WEXITED | os.WNOWAIT)
    free(tmp_path)


def test_number_of_a_dead_process_may_be_another_ones(tmp_path, no_locks):
    boot = folder_lock._boot()
    leave_record(tmp_path, boot=boot, pid=os.getpid(), started="1")
    free(tmp_path)


def test_process_of_another_container_is_told_by_its_signs_of_life(tmp_path, no_locks):
    leave_record(tmp_path, boot=folder_lock._boot(), pids="pid:[1]", pid=10**9)
    with pytest.raises(UserError, match="heard of 0 s ago"):
        free(tmp_path)
    leave_record(tmp_path, age=1e4, boot=folder_lock._boot(), pids="pid:[1]", pid=os.getpid())
    free(tmp_path)


# ---- holding -------------------------------------------------------------------------------------
def lives(folder, act):
    """Exit code of a process whose heart beats fast while ``act`` happens to its lock."""

    def live():
        folder_lock._HEARTBEAT = 0.01
        lock = FolderLock(folder)
        lock.acquire()
        act()
        time.sleep(0.3)
        lock.release()

    return code_of(forked(live))


def test_holder_gives_signs_of_life(tmp_path):
    def act():
        os.utime(tmp_path / LOCK, (0, 0))
        deadline = time.monotonic() + 60
        while (tmp_path / LOCK).stat().st_mtime < time.time() - 100:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    assert lives(tmp_path, act) == 0


def test_holder_that_was_taken_over_ends(tmp_path, capfd):
    assert lives(tmp_path, lambda: leave_record(tmp_path) or time.sleep(60)) == 1
    err = capfd.readouterr().err
    assert "was taken over by process 7 on far" in err
    assert err.count("\n") == 1
    assert record_of(tmp_path)["host"] == "far"


def test_lock_that_somebody_removed_is_put_back(tmp_path):
    def act():
        (tmp_path / LOCK).unlink()
        wait_for(tmp_path / LOCK)

    assert lives(tmp_path, act) == 0
    assert list(tmp_path.iterdir()) == []


# ---- a run ---------------------------------------------------------------------------------------
def tree(folder):
    """Name -> content and time of change; but that of the lock, which is a sign of life."""
    return {
        str(p.relative_to(folder)): (p.name != LOCK and p.stat().st_mtime_ns, p.read_bytes())
        for p in folder.rglob("*")
        if p.is_file()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Words of a command that has run, and the folder."""
    folder = tmp_path_factory.mktemp("run")
    args = [*SHORT, "sample.tokens=0", f"run_dir={folder}"]
    assert cli(args) == ExitCode.finished
    assert not (folder / LOCK).exists()
    return args, folder


def test_same_command_twice_leaves_the_first_ones_files_alone(finished, capsys):
    """FAULTS A4."""
    args, folder = finished
    with owned(folder):
        before = tree(folder)
        assert cli([*args, "train.steps=3"]) == ExitCode.user_error
        assert tree(folder) == before
    err = capsys.readouterr().err
    assert err.startswith(f"error: run_dir={folder} is in use by process {os.getpid()} on ")
    assert err.count("\n") == 1


def test_evaluation_reads_in_the_folder_of_a_run_that_trains(finished):
    """It has written a line behind its newest checkpoint, and writes the next one."""
    args, folder = finished
    (folder / "checkpoints" / ".writing_step_00000009_x").mkdir()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(json.loads(lines[-1]) | {"step": 3}) + "\n")
    with owned(folder):
        before = tree(folder)
        assert cli([*args, "train.eval_only=true"]) == ExitCode.finished
        after = tree(folder)
        assert after.pop("evaluation.json")
        assert after == before
        assert (folder / "checkpoints" / ".writing_step_00000009_x").is_dir()


def test_files_of_the_moment_do_not_make_a_folder_foreign(tmp_path):
    """FAULTS E4: what another rank's probe leaves for a moment; on NFS it has another name."""
    for name in (".nfs000001", ".probe_abc", LOCK):
        (tmp_path / name).touch()
    assert cli([*SHORT, "sample.tokens=0", "train.steps=1", f"run_dir={tmp_path}"]) == 0


def test_rank_that_does_not_hold_the_lock_learns_of_a_refusal(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "is_main", lambda: False)
    monkeypatch.setattr(folder_lock, "same_everywhere", lambda mine: mine or "rank 0's line")
    with pytest.raises(UserError, match="rank 0's line"), owned(tmp_path):
        pytest.fail("it was let in")
    assert list(tmp_path.iterdir()) == []


def refused(rank, world, folder):
    with pytest.raises(UserError, match="is in use by"), owned(folder):
        pytest.fail("it was let in")


@pytest.mark.slow
def test_all_ranks_learn_that_the_folder_is_in_use(tmp_path):
    with owned(tmp_path):
        run_distributed(refused, 2, tmp_path)
