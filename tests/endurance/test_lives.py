"""Random lives of a run break no promise; with a fault put back they do.

A life is several starts of the training command in one folder, killed, damaged, moved, extended
(``tests/endurance/life.py``). Compared is to the bit with runs that nothing disturbed. The command
runs as a process of its own: it forks, which a test process with threads must not.
"""

import json
import subprocess
import sys

import pytest

from tests.endurance import planted

COMMAND = [sys.executable, "-m", "tests.endurance"]


def live(out, *words, seconds):
    return subprocess.run(
        [*COMMAND, "--out", str(out), *words], capture_output=True, text=True, check=False,
        timeout=seconds,
    )  # fmt: skip


def summary(out, name):
    return json.loads((out / name / "summary.json").read_text())


@pytest.mark.timeout(900)
def test_lives_break_no_promise(tmp_path):
    done = live(tmp_path, "--lives", "5", "--workers", "2", seconds=880)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = summary(tmp_path, "ranks_1")
    assert found["lives"] == 5
    assert found["starts"] >= 20
    assert found["broken"] == {}
    again = live(tmp_path, "--lives", "5", seconds=300)
    assert "5 lives were lived before" in again.stdout


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("ranks", "lives"), [(1, 60), (2, 12)])
def test_many_lives_break_no_promise(tmp_path, ranks, lives):
    words = ["--ranks", str(ranks), "--lives", str(lives), "--first", "1000", "--workers", "2"]
    done = live(tmp_path, *words, seconds=7000)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    print(json.dumps(summary(tmp_path, f"ranks_{ranks}")["events"]))  # noqa: T201  with pytest -s


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("fault", sorted(planted.FAULTS))
def test_fault_put_back_is_found_within_50_lives(tmp_path, fault):
    done = live(tmp_path, "--plant", fault, "--lives", "50", "--stop", seconds=7000)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    found = summary(tmp_path, f"ranks_1_{fault}")
    assert len(found["broken"]) == 1
    print(f"{fault}: life {found['lives']}: {found['broken']}")  # noqa: T201  with pytest -s
