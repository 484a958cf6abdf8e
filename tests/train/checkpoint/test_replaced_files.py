"""A small file of a run is replaced whole, and nothing is left beside it.

Oracle: the folder before and after.
"""

import errno
import os

import pytest

from train.checkpoint.files import replace_durably
from train.recovery.stop import Stopped

ENDS = [Stopped(), OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", ENDS, ids=["signal", "full disk", "Ctrl-C"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_ends_a_replacement_leaves_the_file_as_it_was(tmp_path, monkeypatch, call, error):
    path = tmp_path / "metrics.jsonl"
    replace_durably(path, "before")

    def end(*_):
        raise error

    monkeypatch.setattr(os, call, end)
    with pytest.raises(type(error)):
        replace_durably(path, "after")
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "before"


def test_remains_of_a_kill_are_written_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    (tmp_path / ".metrics.jsonl.writing").write_text("half of what was to be, and longer")
    replace_durably(path, "after")
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "after"
