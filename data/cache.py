"""Cache folders that are complete or absent, built once however many processes ask at once.

A builder works in ``NAME.partial`` under an exclusive file lock and the result appears by one
rename. Processes that ask meanwhile wait for the lock and then find it done. A killed builder
leaves its partial folder, which the next one continues or starts over. One that refuses its input
leaves nothing of its own: input that is mended is another, and has another folder. But what is
finished stays: a fault of the moment (a disk, a network) may be told as a refusal.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.errors import ConfigError, DiskError

ROOT = Path(__file__).resolve().parents[1]


def cache_root(cache_dir: str) -> Path:
    """The cache folder; relative paths lie under the repository root."""
    return ROOT / Path(cache_dir).expanduser()


def digest(value: Any) -> str:
    """Hex hash of a JSON value, independent of the order of its keys."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a ``.npy`` file as ``numpy.save`` does; a full disk is an ``OSError`` with its number.

    numpy writes past Python, and tells of a full disk by two counts.
    """
    header = np.lib.format.header_data_from_array_1_0(array)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")


def _lock_path(target: Path) -> Path:
    return target.parent / f".{target.name}.lock"


@contextmanager
def locked(target: Path, key: str) -> Iterator[None]:
    """Hold the lock that belongs to a path.

    Raises:
        ConfigError: the folder cannot be written; names ``key``.
        DiskError: its disk is full.
    """
    while True:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock_path(target).open("a")
        except OSError as error:
            raise_if_full(error, target.parent, key)
            raise ConfigError(
                f"{key}: cannot write to {target.parent}: {error.strerror}"
            ) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_at(lock, _lock_path(target)):
                yield
                return
        # Its holder has removed the file meanwhile: whoever comes later locks another.


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether an open file is still the one of a path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def build_once(
    target: Path,
    build: Callable[[Path], None],
    resume: str = "",
    key: str = "data.cache_dir",
) -> Path:
    """Return a cached folder, building it first where it is absent.

    Args:
        target: the folder.
        build: fills an empty folder (with ``resume``: possibly one that a killed build left).
        resume: keep what an interrupted build left instead of starting over; a glob of the files
            that each tell of a finished part.
        key: config key that chose the place, for messages.

    Raises:
        ConfigError: the place cannot be written.
        DiskError: its disk is full.
    """
    if target.is_dir():
        return target
    partial = target.with_name(target.name + ".partial")
    with locked(target, key):
        try:
            if not target.is_dir():
                _build(target, partial, build, resume, key)
        finally:
            if not partial.exists():
                _lock_path(target).unlink(missing_ok=True)
    return target


def _build(
    target: Path, partial: Path, build: Callable[[Path], None], resume: str, key: str
) -> None:
    """Build a folder under its lock; arguments as of :func:`build_once`."""
    if partial.exists() and not resume:
        shutil.rmtree(partial)
    own = not partial.exists()
    try:
        partial.mkdir(exist_ok=True)
        build(partial)
        partial.rename(target)
    except ConfigError:
        if own and not (resume and any(partial.glob(resume))):
            shutil.rmtree(partial)
        raise
    except OSError as error:
        raise_if_full(error, partial, key)
        raise


def raise_if_full(
    error: BaseException, folder: Path | str, key: str, or_read_only: bool = False
) -> None:
    """Turn an error of a full disk, or one that such an error caused, into a ``DiskError``.

    Args:
        error: what was raised, perhaps by a library.
        folder: where it was writing, in case the error does not say.
        key: config key that chose the place.
        or_read_only: it could be written before, so that one which no longer can is as good as
            full.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
            if full or (or_read_only and cause.errno == errno.EROFS):
                what = "full" if full else "read-only now"
                when = "there is room" if full else "it can be written"
                raise DiskError(
                    f"{key}: {cause.strerror}: the disk of {cause.filename or folder} is {what};"
                    f" the same command goes on when {when}"
                ) from error
        cause = cause.__cause__ or cause.__context__
