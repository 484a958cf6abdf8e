"""However a script's ``main`` ends, its exit code and its one line are those of the contract."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from data.errors import ConfigError, DiskError
from scripts.cli.command import command
from train.errors import ROOT, TrainingFailedError, UserError
from train.exchange.output_files import file_errors, write_bytes

pytestmark = pytest.mark.core


def ending(error):
    """A main that prints something and ends so."""

    @command()
    def main():
        sys.stdout.write("begun\n")
        if error is not None:
            raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (UserError("x=1:\n  y=2"), 2, "error: x=1: y=2\n"),
        (ConfigError("data.x=1"), 2, "error: data.x=1\n"),
        (DiskError("full"), 1, "error: full\n"),
        (TrainingFailedError("spoilt"), 1, "error: spoilt\n"),
        (KeyboardInterrupt(), 75, "SIGINT: stopped; the same command starts again\n"),
    ],
)
def test_each_end_has_its_code_and_one_line(error, code, line, capsys):
    assert ending(error)() == code
    assert capsys.readouterr() == ("begun\n", line)


def test_a_code_of_its_own_is_kept():
    assert command()(lambda: 1)() == 1


def test_other_exceptions_are_ours_and_pass():
    with pytest.raises(ValueError, match="ours"):
        ending(ValueError("ours"))()
    with pytest.raises(FileNotFoundError):
        ending(FileNotFoundError("ours"))()


def test_sigterm_is_answered_and_its_handler_given_back(capsys):
    before = signal.getsignal(signal.SIGTERM)

    @command()
    def main():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

    assert main() == 75
    assert capsys.readouterr().err == "SIGTERM: stopped; the same command starts again\n"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("error", [None, UserError("x")])
def test_a_reader_that_left_is_no_error(error, monkeypatch, capsys):
    """As behind ``| head``: nothing is said, also not at the exit of the interpreter."""
    there, here = os.pipe()
    os.close(there)
    with os.fdopen(here, "w", encoding="utf-8") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert ending(error)() == 1
        out.flush()
    assert capsys.readouterr().err == ""


def test_characters_that_the_terminal_lacks_are_escaped(monkeypatch, tmp_path):
    @command()
    def main():
        sys.stdout.write("\u20ac \udcff\n")

    with (tmp_path / "out").open("w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main() == 0
    assert (tmp_path / "out").read_text() == "\\u20ac \\udcff\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_error_of_the_input(number, tmp_path):
    def full():
        with file_errors(tmp_path):
            raise OSError(number, os.strerror(number))

    with pytest.raises(DiskError, match=r"cannot be written: .*goes on when there is room"):
        full()


def test_a_write_that_fails_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("train.exchange.output_files.aside_of", lambda path: tmp_path / "link")
    (tmp_path / "link").symlink_to("/dev/full")
    with pytest.raises(DiskError, match="x cannot be written: No space left on device"):
        write_bytes(tmp_path / "x", b"0" * 10**6)


def test_crash_of_native_code_says_where_python_was(tmp_path):
    (tmp_path / "crashing.py").write_text("import os\n\ndef main(words):\n    os.abort()\n")
    call = (
        "from scripts.cli.group import run_command\n"
        "run_command('v4', {'crash': 'crashing'}, {}, 'crash', [])"
    )
    done = subprocess.run(
        [sys.executable, "-c", call], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in done.stderr
    assert "crashing.py" in done.stderr
