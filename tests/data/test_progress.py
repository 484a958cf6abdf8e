"""Work in several processes: results in order, and no process outlives the one that asked."""

import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from data.progress import progress_map
from train.errors import ROOT

PARENT = """
import sys
from functools import partial
from data.progress import progress_map
from tests.data.test_progress import hold
if __name__ == "__main__":
    progress_map(partial(hold, sys.argv[1]), [0, 1], [1, 1], 2, "hold")
"""


def hold(folder, number):
    """Keep a lock, which the system takes back when the process ends, however it does."""
    file = open(f"{folder}/{number}", "w")
    fcntl.flock(file, fcntl.LOCK_EX)
    os.rename(file.name, f"{file.name}.held")
    time.sleep(200)


def test_results_come_in_order():
    assert progress_map(abs, [-3, 2, -1], [1, 1, 1], 1, "x") == [3, 2, 1]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent(tmp_path, how):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], cwd=ROOT)
    held = [tmp_path / f"{number}.held" for number in range(2)]
    while not all(path.exists() for path in held):
        assert parent.poll() is None
        time.sleep(0.02)
    parent.send_signal(how)
    parent.wait()
    assert all(comes_free(path) for path in held)


def comes_free(path):
    with path.open() as file:
        for _ in range(1000):  # a good minute less than the worker would sleep
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
            else:
                return True
    return False
