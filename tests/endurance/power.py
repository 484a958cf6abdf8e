"""What a loss of power takes from a run folder: all that was not made durable.

The strictest reading of POSIX: the bytes of a file are durable as far as it was synced; a name is
durable in its folder (made, removed, or renamed) once that folder was synced. Most file systems do
better; a promise that holds here holds on all of them. The run folder itself is taken to be there.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress

REAL = {name: getattr(os, name) for name in dir(os)}  # as they are before a disk is installed


class Volatile:
    """What one process has changed and not synced.

    Args:
        root: the run folder.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._durable: dict[tuple[int, int], int] = {}  # file that was written -> its durable bytes
        self._open: dict[tuple[int, int], int] = {}  # the same -> open: its inode is its own
        self._names: list[tuple[str, Callable[[], None]]] = []  # folder, what undoes the change
        self._kept_in = f"{root}.kept_{os.getpid()}"  # removed files, as further links to them
        self._count = 0

    # ---- noting ------------------------------------------------------------------------------
    def writes(self, descriptor: int, anew: bool = False) -> None:
        """What comes behind the present end of a file is not on the disk yet."""
        found = os.fstat(descriptor)
        key = found.st_dev, found.st_ino
        if key not in self._open:
            self._open[key] = REAL["dup"](descriptor)
        if anew or key not in self._durable:
            self._durable[key] = 0 if anew else found.st_size

    def synced(self, descriptor: int, path: str) -> None:
        """The disk has this file, or the names in this folder."""
        found = os.fstat(descriptor)
        key = found.st_dev, found.st_ino
        self._durable.pop(key, None)
        if key in self._open:
            REAL["close"](self._open.pop(key))
        self._names = [change for change in self._names if change[0] != path]

    def keep(self, path: str) -> str:
        """Before a file may go: keep its content; where. Empty: there is no file."""
        if not os.path.isfile(path):
            return ""
        if not self._count:
            REAL["mkdir"](self._kept_in)
        self._count += 1
        kept = os.path.join(self._kept_in, str(self._count))
        REAL["link"](path, kept)
        return kept

    def made(self, path: str) -> None:
        """A file or a folder has a new name."""

        def undo() -> None:
            if stat.S_ISDIR(os.lstat(path).st_mode):
                shutil.rmtree(path)
            else:
                REAL["unlink"](path)

        if path != self._root:
            self._names.append((os.path.dirname(path), undo))

    def removed(self, path: str, kept: str) -> None:
        """A file is gone, which :meth:`keep` has kept, or a folder."""

        def undo() -> None:
            if kept:
                REAL["link"](kept, path)
            else:
                REAL["mkdir"](path)

        self._names.append((os.path.dirname(path), undo))

    def renamed(self, source: str, target: str, kept: str) -> None:
        """Something has another name, under which :meth:`keep` may have kept what was there."""

        def undo() -> None:
            REAL["rename"](target, source)
            if kept:
                REAL["link"](kept, target)

        self._names.append((os.path.dirname(target), undo))

    # ---- losing ------------------------------------------------------------------------------
    def lose(self) -> None:
        """Bring the folder to the state that the disk is sure to have."""
        for folder, _, names in os.walk(self._root):
            for name in names:
                path = os.path.join(folder, name)
                found = os.lstat(path)
                durable = self._durable.get((found.st_dev, found.st_ino), found.st_size)
                if durable < found.st_size:
                    os.truncate(path, durable)
        for _, undo in reversed(self._names):
            with suppress(OSError):  # in a folder that is itself gone
                undo()
