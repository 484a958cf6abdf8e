"""Files that a command writes at its end: checked before it begins, never over others' content."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from train.errors import UserError, one_line
from train.exchange.output_files import make_folder, write_bytes

PNG = "Matplotlib"  # the mark of every picture that we draw


def check_output(option: str, path: Path, mark: str) -> None:
    """Refuse to write over anything but an earlier file of the same command.

    Args:
        option: that named the place.
        path: of the file; it may be absent or empty.
        mark: text that stands in every file which the command writes there.

    Raises:
        UserError: names option and file.
    """
    try:
        if path.is_dir():
            raise UserError(f"{option}: {path} is a folder, wanted is a file")
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be read: {one_line(error)}") from error
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if reason := _unwritable(above):
        raise UserError(f"{option}: {path} cannot be written: {above}: {os.strerror(reason)}")
    if content and mark.encode() not in content:
        raise UserError(f"{option}: {path} holds something else than an earlier result of this"
                        " command: name a new file")  # fmt: skip


def _unwritable(folder: Path) -> int:
    """Number of the error that a file in it would meet; 0: none that is known before."""
    if not folder.is_dir():
        return errno.ENOTDIR
    if os.access(folder, os.W_OK):
        return 0
    return errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES


def write_text(path: Path, text: str) -> None:
    """Write a file, complete or not at all, and the folder that it lies in.

    Raises:
        UserError: the place cannot be written.
        DiskError: its disk is full.
    """
    make_folder(path.parent)
    write_bytes(path, text.encode())


def write_json(path: Path, values: Any, indent: int = 1) -> None:
    """The same of JSON values."""
    write_text(path, json.dumps(values, indent=indent, allow_nan=False) + "\n")
