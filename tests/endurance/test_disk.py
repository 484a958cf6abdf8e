"""The disk of a life: every call that changes a run folder is counted, and can be struck.

Oracle: hand counts, and what the files hold afterwards. Strikes that end a process are tested in a
forked one.
"""

import builtins
import errno
import io
import json
import os
import shutil
import signal
from functools import partial

import pytest

from tests.endurance import checkpoints, disk, life
from tests.endurance.power import Volatile

pytestmark = pytest.mark.core
PATCHED = (
    "rename", "replace", "link", "symlink", "unlink", "remove", "rmdir", "mkdir", "open", "write",
    "pwrite", "ftruncate", "fsync", "fdatasync",
)  # fmt: skip


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a disk over a folder, for one test; it tells into ``told``."""
    for name in PATCHED:
        monkeypatch.setattr(os, name, getattr(os, name))
    for module in (builtins, io):
        monkeypatch.setattr(module, "open", module.open)
    root = tmp_path / "run"
    root.mkdir()

    def installed(event=life.Event(life.KILL, call=10**9), pinned=None):  # noqa: B008
        files = disk.Disk(root, event, pinned, told.append)
        files.install()
        return files, root

    told = installed.told = []
    return installed


def event(name, call, thread=life.MAIN, how=life.OTHER, **more):
    return life.Event(name, thread, call, how=how, **more)


def test_calls_are_counted_by_thread_and_kind(install, tmp_path):
    files, root = install()
    (root / "a").mkdir()
    with (root / "a" / "x").open("w") as file:
        file.write("one")
        file.flush()
        file.write("two")
        file.flush()
        os.fsync(file.fileno())
    (root / "a" / "x").rename(root / "a" / "y")
    shutil.rmtree(root / "a")
    (tmp_path / "elsewhere").write_text("not counted")
    assert (root.parent / "elsewhere").read_text() == "not counted"
    # mkdir, open, fsync, rename, unlink, rmdir
    assert files.calls == {"main other": 6, "main write": 2}


@pytest.mark.parametrize("mode", ["w", "wb", "a", "ab", "x", "r+", "w+b"])
def test_files_are_those_of_python(install, mode):
    _, root = install()
    path = root / "file"
    if mode == "r+":
        path.write_bytes(b"")
    content = b"a\nb\n" if "b" in mode else "a\nb\n"
    with path.open(mode) as file:
        assert file.write(content) == 4
        assert file.tell() == 4
    assert path.read_bytes() == b"a\nb\n"


def test_full_disk_has_room_again_after_some_calls(install):
    _, root = install(event(life.FULL, 2, how=life.WRITE, which=0))
    descriptor = os.open(root / "file", os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, b"there is room")
    for _ in range(3):
        with pytest.raises(OSError, match="No space left") as caught:
            os.write(descriptor, b", there is none")
        assert caught.value.errno == errno.ENOSPC
    os.write(descriptor, b", there is again")
    os.close(descriptor)
    assert (root / "file").read_text() == "there is room, there is again"
    assert install.told == ["struck write"]


def test_read_only_folder_refuses_every_change(install):
    _, root = install(event(life.READ_ONLY, 2))
    (root / "file").write_text("before")
    changes = (
        partial(os.mkdir, root / "new"),
        partial(os.rename, root / "file", root / "other"),
        partial(os.unlink, root / "file"),
        partial((root / "file").write_text, "after"),
    )
    for change in changes:
        with pytest.raises(OSError, match="Read-only file system"):
            change()
    assert (root / "file").read_text() == "before"


def publish(folder, step):
    path = folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(sealed({"format": 1, "step": step, "files": {}}))
    return path


def sealed(manifest):
    body = json.dumps(manifest, indent=1, sort_keys=True)
    manifest["sha256"] = checkpoints.hashlib.sha256(body.encode()).hexdigest()
    return json.dumps(manifest, indent=1, sort_keys=True) + "\n"


def test_pinned_checkpoint_stays(install):
    folder = install()[1]
    pinned = publish(folder, 1)
    install(event(life.PINNED, 1), pinned)
    with pytest.raises(OSError, match="not permitted"):
        pinned.rename(pinned.with_name("gone"))
    with pytest.raises(OSError, match="not permitted"):
        shutil.rmtree(pinned)
    assert checkpoints.good(folder / "checkpoints") == {1: pinned}
    assert install.told == ["struck rename"]


def test_removal_of_the_newest_good_checkpoint_is_told(install):
    _, folder = install()
    first, second, third = (publish(folder, step) for step in (1, 2, 3))
    (third / "manifest.json").write_text("damaged")
    first.rename(first.with_name("gone"))
    assert install.told == []
    second.rename(second.with_name("gone_too"))
    assert install.told == ["broken rename of step_00000002, which is the newest good checkpoint"]


def in_a_fork(body):
    """Exit code of a process that does ``body``; minus the signal."""
    pid = os.fork()
    if pid == 0:
        body()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize(
    ("name", "kept"), [(life.KILL, "durable, then ha"), (life.POWER, "durable")]
)
def test_power_takes_what_was_not_synced_and_a_kill_does_not(tmp_path, name, kept):
    def body():
        (tmp_path / "log").touch()
        files = disk.Disk(tmp_path, event(name, 3, how=life.WRITE), None, lambda _: None)
        files.install()
        with (tmp_path / "log").open("a", buffering=1) as file:
            file.write("durable")
            file.flush()
            os.fsync(file.fileno())
            file.write(", then ")
            file.flush()
            file.write("half of this"[:4])
            file.flush()

    assert in_a_fork(body) == -signal.SIGKILL
    assert (tmp_path / "log").read_text() == kept


def test_power_takes_names_that_their_folder_was_not_synced_for(tmp_path):
    """Made, renamed over another, removed, and a folder with what is in it."""
    old = {"kept": "durable", "other": "durable", "gone": "durable"}
    for name, text in old.items():
        (tmp_path / name).write_text(text)

    def change():
        (tmp_path / "new").write_text("not durable")
        (tmp_path / "new").rename(tmp_path / "kept")
        (tmp_path / "gone").unlink()
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "inside").write_text("not durable")

    def sync(path):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def body(also_sync):
        files = disk.Disk(tmp_path, event(life.POWER, 10**9), None, lambda _: None)
        files.install()
        change()
        if also_sync:
            for name in ("kept", "folder/inside", "folder", ""):
                sync(tmp_path / name)
        files._strike("now", lambda: None)

    assert in_a_fork(partial(body, False)) == -signal.SIGKILL
    assert contents(tmp_path) == old
    assert in_a_fork(partial(body, True)) == -signal.SIGKILL
    assert contents(tmp_path) == {
        "kept": "not durable", "other": "durable", "folder/inside": "not durable"
    }  # fmt: skip


def contents(folder):
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text() for path in found}


def test_a_file_that_another_process_made_of_a_removed_one_is_kept(tmp_path):
    """File systems give the numbers of removed files out again."""
    volatile = Volatile(str(tmp_path))
    with (tmp_path / "mine").open("wb") as file:
        volatile.writes(file.fileno(), anew=True)
        file.write(b"x" * 100)
    (tmp_path / "mine").unlink()  # by another process, which is not noted here
    (tmp_path / "theirs").write_bytes(b"y" * 100)
    volatile.lose()
    assert (tmp_path / "theirs").read_bytes() == b"y" * 100
