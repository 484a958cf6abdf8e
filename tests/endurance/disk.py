"""Stands between a process and its run folder: counts what it writes, and strikes at the n-th call.

Counted are the calls that change something below the folder: opening a file to write, writing,
fsync, rename (and links), removal, mkdir. Writes are counted apart, since they are many. So is each
thread: the main one and the one that saves do the same in every run of a life, while which of the
two is first is chance. So a call of one thread is the finest instant that a seed can repeat.

Files are opened as Python's own objects over a raw file of ours, so that "the n-th write" is one
that the system would see. C++ that opens files by itself passes by; nothing in a run folder is
written so.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.endurance import checkpoints, life
from tests.endurance.power import REAL, Volatile

OPEN, FSYNC, RENAME, REMOVE, MKDIR = "open", "fsync", "rename", "remove", "mkdir"
WRITE = life.WRITE
_FILLS = (OPEN, WRITE, MKDIR)  # need room
_LASTS = (3, 30, 10**9)  # failing calls until there is room again
_STRIKES = (life.KILL, life.POWER, life.TERM, life.SECOND, life.EXPORT)
_real_open = io.open


class Disk:
    """The calls of this process.

    Args:
        root: the run folder; calls elsewhere pass.
        event: what happens, and at which call; one of another kind never strikes.
        pinned: a checkpoint that cannot be renamed or removed, if the event says so.
        note: told each fact that the parent is to know: that the event struck, or what broke.
    """

    def __init__(
        self, root: Path, event: life.Event, pinned: Path | None, note: Callable[[str], None]
    ) -> None:
        self.root, self.event, self.note = os.path.abspath(root), event, note
        self.pinned = str(pinned) if pinned else None
        self.calls: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._volatile = Volatile(self.root) if event.name == life.POWER else None
        self._struck, self._failing = False, 0  # happened; calls that will still fail
        self._off = False  # power

    def install(self) -> None:
        """From now on every call passes here."""
        builtins.open = io.open = self._open  # pyright: ignore[reportAttributeAccessIssue]
        for name in ("rename", "replace", "link", "symlink"):
            setattr(os, name, self._pair(name, RENAME))
        for name in ("unlink", "remove", "rmdir"):
            setattr(os, name, self._single(name, REMOVE))
        os.mkdir = self._single("mkdir", MKDIR)
        for name in ("write", "pwrite", "ftruncate"):
            setattr(os, name, self._to_descriptor(name))
        os.open, os.fsync, os.fdatasync = self._os_open, self._fsync, self._fsync

    def covers(self, path: str) -> bool:
        """Whether a path lies in the run folder, or is it."""
        return path == self.root or path.startswith(self.root + os.sep)

    def before(self, kind: str, path: str, half: Callable[[], None] = lambda: None) -> None:
        """Count a call and let happen what is to happen at it.

        Args:
            kind: of the call.
            path: below the root.
            half: does half of it: what a kill in the middle leaves.

        Raises:
            OSError: the disk is full, read-only, or the path cannot be removed.
        """
        if self._off:
            return
        with self._lock:
            main = threading.current_thread() is threading.main_thread()
            counter = f"{life.MAIN if main else life.SAVE} {WRITE if kind == WRITE else life.OTHER}"
            self.calls[counter] += 1
            event = self.event
            if (counter, self.calls[counter]) == (f"{event.thread} {event.how}", event.call):
                self._strike(kind, half)
            self._refuse(kind, path)
            if kind in (RENAME, REMOVE):
                self._judge_removal(kind, path)

    def _strike(self, kind: str, half: Callable[[], None]) -> None:
        name = self.event.name
        if name in _STRIKES or name in (life.FULL, life.READ_ONLY):
            self._struck = True
            self.note(f"struck {kind}")
        if name == life.FULL:
            self._failing = _LASTS[self.event.which % len(_LASTS)]
        if name in (life.KILL, life.POWER):
            half()
            if self._volatile:
                self._off = True
                self._volatile.lose()
            os.kill(os.getpid(), signal.SIGKILL)
        if name == life.TERM:
            os.kill(os.getpid(), signal.SIGTERM)
        if name in (life.SECOND, life.EXPORT):
            os.kill(os.getpid(), signal.SIGSTOP)

    def _refuse(self, kind: str, path: str) -> None:
        name = self.event.name
        if name == life.LOCKED or (name == life.READ_ONLY and self._struck):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        if name == life.FULL and self._failing > 0 and kind in _FILLS:
            self._failing -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        held = self.pinned
        if held and kind in (RENAME, REMOVE) and (path == held or path.startswith(held + os.sep)):
            if not self._struck:
                self._struck = True
                self.note(f"struck {kind}")
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), path)

    def _judge_removal(self, kind: str, path: str) -> None:
        """The newest good checkpoint stays, at every instant."""
        folder = Path(self.root, "checkpoints")
        inside = Path(path).relative_to(folder).parts if path.startswith(f"{folder}/") else ()
        if not inside or (kind == RENAME and len(inside) > 1):
            return
        step = checkpoints.step_of(inside[0])
        if step is not None and step == checkpoints.newest_good(folder):
            self.note(f"broken {kind} of {inside[0]}, which is the newest good checkpoint")

    def writes(self, descriptor: int, anew: bool = False) -> None:
        """Note that a file is about to be written."""
        if self._volatile:
            with self._lock:
                self._volatile.writes(descriptor, anew)

    # ---- the calls ---------------------------------------------------------------------------
    def _open(
        self, file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None,
        errors: str | None = None, newline: str | None = None, closefd: bool = True,
        opener: Any = None,
    ) -> Any:  # fmt: skip
        path = _path_of(file)
        if path is None or not self.covers(path) or not set(mode) & set("wax+"):
            return _real_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw_mode = mode.replace("b", "").replace("t", "")
        new = not os.path.lexists(path)
        if not isinstance(file, int):
            self.before(OPEN, path)
        raw = _RawFile(self, path, file, raw_mode, closefd, opener)
        if new and self._volatile:
            self._volatile.made(path)
        if buffering == 0:
            return raw
        layer = io.BufferedRandom if "+" in mode else io.BufferedWriter
        buffer = layer(raw, buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE)
        if "b" in mode:
            return buffer
        text = io.TextIOWrapper(buffer, encoding, errors, newline, line_buffering=buffering == 1)
        text.mode = mode  # pyright: ignore[reportAttributeAccessIssue]
        return text

    def _os_open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: Any = None) -> int:
        where = _path_of(path, dir_fd)
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        new = False
        if where is not None and writes and self.covers(where):
            self.before(OPEN, where)
            new = not os.path.lexists(where)
        descriptor = REAL["open"](path, flags, mode, dir_fd=dir_fd)
        if where is not None and new and self._volatile:
            self._volatile.made(where)
        return descriptor

    def _to_descriptor(self, name: str) -> Callable[..., Any]:
        def call(descriptor: int, *args: Any) -> Any:
            path = _path_of(descriptor)
            if path is not None and self.covers(path):
                self.writes(descriptor)
                self.before(WRITE, path)
            return REAL[name](descriptor, *args)

        return call

    def _fsync(self, descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        path = _path_of(number)
        if path is None or not self.covers(path):
            return REAL["fsync"](number)
        self.before(FSYNC, path)
        REAL["fsync"](number)
        if self._volatile:
            with self._lock:
                self._volatile.synced(number, path)
        return None

    def _single(self, name: str, kind: str) -> Callable[..., None]:
        def call(path: Any, *args: Any, dir_fd: Any = None, **more: Any) -> None:
            where, kept = _path_of(path, dir_fd), ""
            mine = where is not None and self.covers(where)
            if where is not None and mine:
                self.before(kind, where)
                kept = self._volatile.keep(where) if self._volatile and kind == REMOVE else ""
            REAL[name](path, *args, dir_fd=dir_fd, **more)
            if where is not None and mine and self._volatile:
                if kind == REMOVE:
                    self._volatile.removed(where, kept)
                else:
                    self._volatile.made(where)

        return call

    def _pair(self, name: str, kind: str) -> Callable[..., None]:
        def call(source: Any, target: Any, **more: Any) -> None:
            old = _path_of(source, more.get("src_dir_fd"))
            new = _path_of(target, more.get("dst_dir_fd"))
            mine = [path for path in (old, new) if path is not None and self.covers(path)]
            if mine:
                self.before(kind, mine[0])
            kept = self._volatile.keep(new) if self._volatile and len(mine) == 2 and new else ""
            REAL[name](source, target, **more)
            if self._volatile and old and new and len(mine) == 2:
                if name in ("rename", "replace"):
                    self._volatile.renamed(old, new, kept)
                else:
                    self._volatile.made(new)

        return call


class _RawFile(io.FileIO):
    """An open file of the run folder."""

    def __init__(
        self, disk: Disk, path: str, file: Any, mode: str, closefd: bool, opener: Any
    ) -> None:
        super().__init__(file, mode, closefd, opener)
        self._disk, self._path = disk, path
        if set(mode) & set("wx"):
            disk.writes(self.fileno(), anew=True)

    def write(self, content: Any) -> int:
        self._disk.writes(self.fileno())
        self._disk.before(WRITE, self._path, lambda: _write_half(self.fileno(), content))
        return super().write(content)

    def truncate(self, size: int | None = None) -> int:
        self._disk.before(WRITE, self._path)
        return super().truncate(size)


def _write_half(descriptor: int, content: Any) -> None:
    view = memoryview(content).cast("B")
    REAL["write"](descriptor, view[: len(view) // 2])


def _path_of(file: Any, dir_fd: int | None = None) -> str | None:
    """Absolute path of what a call names; None where it names none of the file system."""
    try:
        if isinstance(file, int):
            return os.readlink(f"/proc/self/fd/{file}")
        path = os.fsdecode(os.fspath(file))
        if dir_fd is not None and not os.path.isabs(path):
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        return os.path.abspath(path)
    except (OSError, TypeError):
        return None
