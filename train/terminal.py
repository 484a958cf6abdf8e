"""Sentences on a terminal end a row between words; in a log, a file or a pipe a line stays one."""

from __future__ import annotations

import logging
import os
import re
import sys
import textwrap
from typing import IO

NARROWEST = 40  # columns; below, the terminal itself breaks lines


def columns(stream: IO[str] | None = None) -> int | None:
    """Columns of the terminal that a stream (stderr) writes to; None: a file or a pipe."""
    try:
        return os.get_terminal_size((stream or sys.stderr).fileno()).columns or None
    except (OSError, ValueError):
        return None


def wrapped(text: str, stream: IO[str] | None = None) -> str:
    """A text as it is written to a stream (stderr): broken between words where that is a terminal.

    Rows of a table and words wider than the terminal are left to it.
    """
    width = columns(stream)
    if width is None:
        return text
    return "\n".join(_broken(line, max(width, NARROWEST)) for line in text.split("\n"))


def _broken(line: str, width: int) -> str:
    gaps = list(re.finditer(r"(?<=\S)  +(?=\S)", line))
    if len(line) <= width or len(gaps) > 1:
        return line
    # Below a name, as in "data    text: 12 k tokens", the text goes on where it began.
    indent = gaps[0].end() if gaps else 2 + len(line) - len(line.lstrip())
    rows = textwrap.wrap(
        line, width, subsequent_indent=" " * min(indent, width // 2), break_long_words=False,
        break_on_hyphens=False, expand_tabs=False, replace_whitespace=False,
    )  # fmt: skip
    return "\n".join(rows)


class TerminalFormatter(logging.Formatter):
    """Log lines that are sentences, each wrapped for stderr."""

    def format(self, record: logging.LogRecord) -> str:
        """As its parent's; a traceback keeps its lines."""
        text = super().format(record)
        return text if record.exc_info or record.stack_info else wrapped(text)


def log_to_stderr(level: int, form: str) -> None:
    """What ``logging.basicConfig`` does, in lines for people.

    Args:
        level: of what is told.
        form: of a line.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(TerminalFormatter(form))
    logging.basicConfig(level=level, handlers=[handler])
