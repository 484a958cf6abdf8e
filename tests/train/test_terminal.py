"""Sentences for people end rows between words on a terminal, here a real one, and nowhere else."""

import fcntl
import io
import logging
import os
import struct
import sys
import termios

import pytest

from scripts.__main__ import main as v4
from scripts.cli.command import tell
from train.errors import ExitCode, UserError
from train.terminal import TerminalFormatter, columns, wrapped

pytestmark = pytest.mark.core
SENTENCE = (
    "data.sources.text.path=mine is one file and data.sources.text.unit=document: of one document"
    " nothing can be held out; data.sources.text.unit=paragraph divides it"
)
NAMED = "data    text: 12.0 k training tokens, 0.852 epochs, and more that has no room in this row"
ROW = "v4_tiny              keys               0.123         0.456        -   0.0156 and so on"


@pytest.fixture(params=[60, 200])
def terminal(request):
    """A stream into a terminal so wide, and what was written to it."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, request.param, 0, 0))
    stream = os.fdopen(theirs, "w")

    def rows():
        stream.flush()
        os.write(theirs, b"\0")  # the end: a terminal hands on what it has, maybe in parts
        got = b""
        while not got.endswith(b"\0"):
            got += os.read(ours, 1 << 16)
        return got[:-1].decode().replace("\r\n", "\n").splitlines()

    yield stream, request.param, rows
    stream.close()
    os.close(ours)


def test_sentences_end_rows_between_words(terminal):
    stream, width, _ = terminal
    assert columns(stream) == width
    rows = wrapped(SENTENCE, stream).splitlines()
    assert max(map(len, rows)) <= width
    assert " ".join(" ".join(rows).split()) == SENTENCE, "no word is cut"
    assert all(row.startswith("  ") for row in rows[1:])
    named = wrapped(NAMED, stream).splitlines()
    assert all(row.startswith(" " * 8) for row in named[1:])
    assert (len(rows) > 1 and len(named) > 1) == (width == 60)
    long = "a/" * 100
    assert wrapped(f"saved {long}", stream).splitlines()[-1].strip().endswith(long)
    assert wrapped(ROW, stream) == ROW


def test_what_is_no_terminal_gets_whole_lines(tmp_path):
    with (tmp_path / "log").open("w") as log:
        for stream in (log, io.StringIO()):
            assert columns(stream) is None
            assert wrapped(SENTENCE, stream) == SENTENCE


def test_errors_and_log_lines_are_wrapped(terminal, monkeypatch):
    stream, width, rows = terminal
    monkeypatch.setattr(sys, "stderr", stream)
    assert tell(UserError(SENTENCE, "another"), ExitCode.user_error) == 2
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s", (SENTENCE,), None)
    stream.write(TerminalFormatter("%(message)s").format(record) + "\n")
    assert v4(["no-such-command-of-ours"]) == 2
    written = rows()
    assert max(map(len, written)) <= width
    text = " ".join(" ".join(written).split())
    assert f"error: {SENTENCE} error: another {SENTENCE} error: v4 has no command" in text
