"""A command in a pseudo-terminal of any width, and what its screen shows in the end."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Sequence


def recorded(command: Sequence[str], columns: int, env: dict[str, str] | None = None) -> str:
    """Everything that a command writes to a terminal so wide, control characters included."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    child = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, **(env or {})}
    )
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    assert child.wait() == 0, b"".join(parts).decode(errors="replace")
    return b"".join(parts).decode()


def screen(written: str, columns: int) -> list[tuple[str, bool]]:
    """The rows of an endless terminal after ``written``: text, and whether it ran over its end."""
    rows: list[list[str]] = [[]]
    wrapped = [False]
    row = column = 0
    for token in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|.", written, re.DOTALL):
        if token == "\r":
            column = 0
        elif token == "\n":
            row, column = row + 1, column
        elif token == "\x1b[A":
            row -= 1
        elif token.startswith("\x1b"):
            raise AssertionError(f"a sequence that this terminal does not know: {token!r}")
        else:
            if column == columns:
                wrapped[row], row, column = True, row + 1, 0
            while row >= len(rows):
                rows.append([])
                wrapped.append(False)
            line = rows[row]
            line.extend(" " * (column + 1 - len(line)))
            line[column] = token
            column += 1
        while row >= len(rows):
            rows.append([])
            wrapped.append(False)
    return [("".join(line).rstrip(), over) for line, over in zip(rows, wrapped, strict=True)]
