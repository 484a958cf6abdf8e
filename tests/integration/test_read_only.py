"""A disk that may only be read is one line, whatever command would write there; exit code 2.

The disk is a tmpfs mounted read-only; without the right to mount, calls below the folder fail
as they would there. A disk that becomes read-only in the middle of a run, as a failing one does, is
the run's failure: exit code 1, and it goes on when it can be written again.
"""

import builtins
import io
import os
import subprocess

import pytest

import scripts.prepare
import scripts.report
from tests.endurance import life
from tests.endurance.disk import Disk
from tests.studies.folders import leave_run
from tests.train.test_pretrain_cli import SHORT
from train.config.command_line import compose_run
from train.errors import ExitCode
from train.pretrain import cli
from train.record.recorder import Recorder


@pytest.fixture
def refuse(monkeypatch):
    """``refuse(folder)`` gives a :class:`Disk` that is in order until its event is LOCKED."""
    for name in ("rename", "replace", "link", "symlink", "unlink", "remove", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, getattr(os, name))  # what install() sets is undone
    for name in ("write", "pwrite", "ftruncate", "open", "fsync", "fdatasync"):
        monkeypatch.setattr(os, name, getattr(os, name))
    for module in (builtins, io):
        monkeypatch.setattr(module, "open", module.open)

    def install(folder):
        disk = Disk(folder, life.Event(), None, lambda fact: None)
        disk.install()
        return disk

    return install


@pytest.fixture
def read_only(tmp_path, refuse):
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", folder], check=False)
    if done.returncode:  # it takes a right that not everyone has
        refuse(folder).event = life.Event(life.LOCKED)
    yield folder
    if not done.returncode:
        subprocess.run(["umount", folder], check=True)


def write_text(folder):
    path = folder / "words.txt"
    path.write_text("".join(f"words of paragraph {n}\n\n" for n in range(99)))
    return str(path)


COMMANDS = {
    "pretrain, its folder": lambda disk, tmp: cli([*SHORT, f"run_dir={disk}/run"]),
    "pretrain, its cache": lambda disk, tmp: cli(
        [*SHORT, f"run_dir={tmp}/run", f"data.cache_dir={disk}/cache"]
    ),
    "pretrain, a look": lambda disk, tmp: cli([*SHORT, f"run_dir={disk}/run", "dry_run=true"]),
    "report": lambda disk, tmp: scripts.report.main(
        [str(leave_run(tmp / "left", compose_run(SHORT), {2: 3.0})), "--out", f"{disk}/out"]
    ),
    "prepare": lambda disk, tmp: scripts.prepare.main(
        [write_text(tmp), "--unit", "paragraph", "--tokenizer", "byte", "--out", f"{disk}/out",
         "--validation-bytes", "100", "--cache-dir", f"{tmp}/cache"]
    ),
}  # fmt: skip

KEYS = {
    "pretrain, its folder": "run_dir=",
    "pretrain, its cache": "data.cache_dir: ",
    "pretrain, a look": "run_dir=",
    "report": "out/report.html cannot be written: ",
    "prepare": "--out",
}


@pytest.mark.parametrize("what", COMMANDS)
def test_a_read_only_disk_is_one_line(what, read_only, tmp_path, capsys):
    assert COMMANDS[what](read_only, tmp_path) == ExitCode.user_error
    told = capsys.readouterr().err
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert str(read_only) in line
    assert "Read-only file system" in line
    assert KEYS[what] in line
    assert "Traceback" not in told


def test_a_disk_that_becomes_read_only_ends_a_run_in_one_line_and_it_goes_on(
    tmp_path, capsys, monkeypatch, refuse
):
    write, disk = Recorder.write, refuse(tmp_path / "run")

    def write_to_a_failing_disk(recorder, *args):
        disk.event = life.Event(life.LOCKED)
        return write(recorder, *args)

    command = [*SHORT, f"run_dir={tmp_path}/run", f"data.cache_dir={tmp_path}/cache"]
    with monkeypatch.context() as failing:
        failing.setattr(Recorder, "write", write_to_a_failing_disk)
        assert cli(command) == ExitCode.failure
    told = capsys.readouterr().err
    assert "error: run_dir: Read-only file system: the disk of" in told
    assert "is read-only now; the same command goes on when it can be written" in told
    assert "Traceback" not in told
    disk.event = life.Event()
    assert cli(command) == ExitCode.finished
