"""Files that commands write: complete or absent, and never over what the command did not write."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.errors import DiskError
from train.checkpoint.file_lock import take
from train.errors import UserError, one_line

_LOCK = ".writing.lock"  # in a folder that is being written; a kill leaves it, unlocked


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place at the end.

    Whatever opened it last, it gets the mode of a new file, and its content is on the disk before
    it is seen under its name.

    Raises:
        UserError: the place cannot be written.
        DiskError: its disk is full.
    """
    aside = aside_of(path)
    with file_errors(path):
        try:
            with aside.open("wb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            yield aside
            aside.chmod(mode)
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            aside.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise


def aside_of(path: Path) -> Path:
    """Where a file is written before it takes its place; a kill leaves it."""
    return path.with_name(f".{path.name}.writing")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file.

    Raises:
        UserError: the place cannot be written.
    """
    with replacing(path) as aside:
        aside.write_bytes(content)


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """The text of a JSON file."""
    return (json.dumps(values, indent=2, allow_nan=False) + "\n").encode()


def make_folder(path: Path) -> None:
    """Make a folder, and those above it.

    Raises:
        UserError: the place cannot be written.
    """
    with file_errors(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Let the system's errors name what could not be written.

    Raises:
        DiskError: it is full.
        UserError: for any other ``OSError``.
    """
    try:
        yield
    except OSError as error:
        text = f"{path} cannot be written: {error.strerror or one_line(error)}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError(f"{text}; the same command goes on when there is room") from error
        raise UserError(text) from error


@contextmanager
def alone_in(target: Path) -> Iterator[None]:
    """Make a folder, and keep other commands from writing into it meanwhile.

    Raises:
        UserError: another one is writing into it, or it cannot be made.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"target {target} is a file")
    make_folder(target)
    path = target / _LOCK
    with file_errors(path):
        file = path.open("ab")
    with file:
        # One that has just ended took the name away from under the lock.
        if take(file.fileno()) is False or not _is_named(path, file.fileno()):
            raise UserError(f"target {target} is being written by another command")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _is_named(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def check_target(
    target: Path, files: Mapping[str, bytes], others: Collection[str], what: str
) -> None:
    """Refuse a folder that holds anything but an earlier part of the same work.

    Args:
        target: of :func:`alone_in`.
        files: small ones, by name: where one is there, it must be what would be written.
        others: names of the rest, which the caller looks into.
        what: the work, for the message.

    Raises:
        UserError: names the folder and the first file that is not ours.
    """
    known = {*files, *others}
    known |= {_LOCK, *(aside_of(target / name).name for name in known)}
    try:
        for path in sorted(target.iterdir()):
            foreign = path.name in files and path.read_bytes() != files[path.name]
            if foreign or path.name not in known:
                raise UserError(
                    f"target {target} holds {path.name}, which is not of this {what}: choose an"
                    " empty folder"
                )
    except OSError as error:
        raise UserError(f"target {target} cannot be read: {one_line(error)}") from error
