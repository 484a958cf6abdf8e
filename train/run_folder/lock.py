"""One run at a time writes to a run folder.

The lock is a file in the folder. It is locked for the kernel, which frees it with the process that
holds it, however that ends; and it says who that is, for file systems whose locks do not reach from
host to host: there the holder touches it every few seconds, and a file that was not touched for
long is taken over. Ages are told by the file system's clock alone, so hosts may disagree about the
time. A holder that finds another one's name in the file, after it was suspended for long, ends at
once: whatever it wrote now would be the other's damage.

Those who only read a run folder need no lock (``train/checkpoint/hold.py``).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import secrets
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parallel.collectives import is_main, same_everywhere
from train.checkpoint import file_lock
from train.errors import UserError, one_line
from train.run_folder.folder import LOCK, PROBE
from train.terminal import wrapped

log = logging.getLogger(__name__)

_HEARTBEAT = 10.0  # seconds between two signs of life
_TIMEOUT = 120.0  # seconds without one after which another host's lock is free
_PATIENCE = 5.0  # seconds that a holder is given to end: its job may just have been killed
_SETTLE = 2.0  # seconds until what was written here is seen on other hosts


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold a run folder, which exists. Collective; rank 0 holds it for all.

    Raises:
        UserError: another run does; on all ranks.
    """
    lock, problem = FolderLock(folder), ""
    try:
        if is_main():
            try:
                lock.acquire()
            except UserError as error:
                problem = str(error)
        problem = same_everywhere(problem)
        if problem:
            raise UserError(problem)
        yield
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a process writes to a folder, as far as one who only reads can tell."""
    path = folder / LOCK
    holder = _read(path)
    if not holder:
        return False
    if holder.get("boot") == _boot() and holder.get("pids") == _pid_namespace():
        return _started(holder.get("pid")) == holder.get("started")
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime < _TIMEOUT
    return False


class FolderLock:
    """The lock of one folder.

    Args:
        folder: of the run; exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / LOCK
        self._descriptor, self._record = -1, dict[str, Any]()
        self._released, self._thread = threading.Event(), threading.Thread()

    def acquire(self) -> None:
        """Take the lock, that of a dead process too.

        Raises:
            UserError: somebody else has it; names the folder and who.
        """
        # A job that torchrun restarts may have lost rank 0 with its host, whose lock outlives it.
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        deadline = time.monotonic() + (_TIMEOUT + _HEARTBEAT if restarted else _PATIENCE)
        while problem := self._take():
            if time.monotonic() > deadline:
                raise UserError(f"run_dir={self._folder} {problem}")
            time.sleep(0.05)
        lock = weakref.ref(self)  # a child must not keep it when this process is killed
        os.register_at_fork(after_in_child=lambda: (mine := lock()) and mine._close())
        self._thread = threading.Thread(target=self._live, name="folder-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let go; nothing where it is not held."""
        try:
            self._let_go()
        except BaseException:  # a signal that ends this process too
            self._let_go()
            raise

    def _let_go(self) -> None:
        if self._descriptor < 0:  # a fork of the holder has closed it
            return
        self._released.set()
        if self._thread.is_alive():
            self._thread.join(_PATIENCE)
        with contextlib.suppress(OSError):
            if _read(self._path) == self._record:
                self._path.unlink()
        self._close()

    # ---- taking ------------------------------------------------------------------------------
    def _take(self) -> str:
        """Try once; what is in the way, empty where the lock was taken."""
        try:
            fresh, descriptor = _open(self._path)
            problem = "is in use"
            try:
                problem = self._write_name(descriptor, fresh)
            except BaseException:  # a signal that ends this start too
                if fresh:
                    self._path.unlink(missing_ok=True)
                raise
            finally:
                if problem:
                    os.close(descriptor)
        except OSError as error:
            raise UserError(
                f"run_dir={self._folder}: {LOCK} cannot be written: {one_line(error)}"
            ) from error
        return problem

    def _write_name(self, descriptor: int, fresh: bool) -> str:
        """Lock the open file and write who this is; what is in the way, or empty."""
        reached, holder = file_lock.take(descriptor), _read(self._path)
        if reached is False:
            return f"is in use by {_name(holder)}"
        if not _is_file_of(descriptor, self._path):
            return "is in use by another start of this moment"  # which has just removed the file
        # With this kernel's lock, a holder of this kernel is dead. Any other may live elsewhere.
        unsure = not fresh and (reached is None or holder.get("boot") != _boot())
        if unsure and (problem := self._lives(holder, os.fstat(descriptor))):
            return problem
        record = _own_record(descriptor)
        _write(descriptor, record)
        if unsure or reached is None:  # two may be as far
            time.sleep(_SETTLE)
            if (holder := _read(self._path)) != record:
                return f"is in use by {_name(holder)}"
        self._descriptor, self._record = descriptor, record
        return ""

    def _lives(self, holder: dict[str, Any], file: os.stat_result) -> str:
        """Why a holder of whom no kernel's lock tells may be alive; empty: it is not."""
        if holder and holder.get("inode") != file.st_ino:
            return ""  # the file is a copy, as its folder is
        here = holder.get("boot") == _boot() and holder.get("pids") == _pid_namespace()
        if here and holder.get("started") is not None:
            alive = _started(holder.get("pid")) == holder["started"]
            return f"is in use by {_name(holder)}" if alive else ""
        age = _now(self._folder) - file.st_mtime
        if age < -1:  # the clock was set back: it counts from now on
            os.utime(self._path)
            age = 0.0
        left = (_TIMEOUT if holder else 2 * _SETTLE) - age
        if left < 0:
            return ""
        return (
            f"is in use by {_name(holder)}, heard of {max(age, 0):.0f} s ago; if that is gone, the"
            f" same command works in {left:.0f} s, or at once without {self._path}"
        )

    # ---- holding -----------------------------------------------------------------------------
    def _live(self) -> None:
        """Give signs of life until the lock is released."""
        while not self._released.wait(_HEARTBEAT):
            try:
                holder = _read(self._path)
                if holder == self._record:
                    os.utime(self._path)
                elif holder:
                    self._leave(holder)
                elif not self._path.exists():
                    self._renew()
            except (OSError, UserError) as error:  # the file system is away, or the folder is
                log.warning("%s: no sign of life: %s", self._path, one_line(error))

    def _renew(self) -> None:
        """Somebody removed the file: put it back, unless another start was faster."""
        before = self._descriptor
        if not self._take():
            os.close(before)
            log.warning("%s was removed, and is put back", self._path)

    def _leave(self, holder: dict[str, Any]) -> None:
        """End the process, of which nothing may be written any more."""
        sys.stderr.write(wrapped(
            f"error: run_dir={self._folder} was taken over by {_name(holder)}, as this process gave"
            f" no sign of life for {_TIMEOUT:.0f} s; it ends here\n"
        ))  # fmt: skip
        sys.stderr.flush()
        os._exit(1)

    def _close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


# ---- the file ------------------------------------------------------------------------------------
def _open(path: Path) -> tuple[bool, int]:
    """Open the lock, made where there is none: whether it was made, and its descriptor."""
    while True:
        try:
            return True, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            try:
                return False, os.open(path, os.O_RDWR)
            except FileNotFoundError:
                continue  # it was released in between


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _read(path: Path) -> dict[str, Any]:
    """Who holds the lock; empty where nobody does, or has not written it yet."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(descriptor: int, record: dict[str, Any]) -> None:
    content = json.dumps(record, allow_nan=False).encode()
    os.pwrite(descriptor, content, 0)
    os.ftruncate(descriptor, len(content))
    os.fsync(descriptor)


def _now(folder: Path) -> float:
    """What time it is for the file system."""
    with tempfile.TemporaryFile(dir=folder, prefix=PROBE) as file:
        os.utime(file.fileno())
        return os.fstat(file.fileno()).st_mtime


# ---- who this is ---------------------------------------------------------------------------------
def _own_record(descriptor: int) -> dict[str, Any]:
    return {
        "inode": os.fstat(descriptor).st_ino,
        "host": platform.node(),
        "pid": os.getpid(),
        "boot": _boot(),
        "pids": _pid_namespace(),
        "started": _started(os.getpid()),
        "nonce": secrets.token_hex(8),
    }


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"


def _boot() -> str:
    """Names this start of this kernel, however many hosts it pretends to be (containers)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


def _pid_namespace() -> str:
    """In which process numbers mean the same."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: object) -> str | None:
    """When a process was started, in ticks of this kernel; None: there is none, or it is dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
