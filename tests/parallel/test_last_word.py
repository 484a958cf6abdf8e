"""What a rank says stands below all that its launcher says, read through a pipe as by ``tail``."""

import json
import os
import subprocess
import sys

import pytest

from parallel.last_word import tell_launcher
from train.errors import ROOT

RANK = "from parallel.last_word import tell_launcher; tell_launcher('error: a\\nerror: b\\n')"
# Waits for its rank and prints a frame, as torchrun does; the last line is its own.
LAUNCHER = """
import subprocess, sys
code = subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode
sys.stderr.write(f'frame: rank left with {code}\\n=====\\n')
"""


def printed(**variables):
    """All that a launcher and its rank print, whose environment says so."""
    environment = {n: v for n, v in os.environ.items() if "TORCHELASTIC" not in n}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, RANK],
        env={**environment, **variables}, cwd=ROOT, check=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.stdout.splitlines()


FRAME = ["frame: rank left with 0", "====="]


@pytest.mark.parametrize(
    ("variables", "below"),
    [
        ({"TORCHELASTIC_RUN_ID": "1"}, ["error: a", "error: b"]),
        ({"CROSS_RANK": "0"}, ["error: a", "error: b"]),
        ({}, []),
        ({"TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_RESTART_COUNT": "0",
          "TORCHELASTIC_MAX_RESTARTS": "3"}, []),
        ({"TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_RESTART_COUNT": "3",
          "TORCHELASTIC_MAX_RESTARTS": "3"}, ["error: a", "error: b"]),
    ],
)  # fmt: skip
def test_the_lines_of_a_rank_stand_below_its_launchers(variables, below):
    assert printed(**variables) == [*FRAME, *below]


def test_the_error_file_holds_the_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    tell_launcher("error: a\nerror: b\n")
    told = json.loads((tmp_path / "error.json").read_text())
    assert told["message"]["message"] == "error: a\nerror: b"
