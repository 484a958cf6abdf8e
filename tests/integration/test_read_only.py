"""A disk that may only be read is one line, whatever command would write there; exit code 2.

The disk is real: a tmpfs mounted read-only. Needs the right to mount. One that becomes read-only in
the middle of a run, as a failing disk does, is the run's failure: exit code 1, and it goes on.
"""

import errno
import os
import subprocess

import pytest

import scripts.prepare
import scripts.report
from tests.integration.test_full_disk import mount
from tests.studies.folders import leave_run
from tests.train.test_pretrain_cli import SHORT
from train.config.command_line import compose_run
from train.errors import ExitCode
from train.pretrain import cli
from train.record.recorder import Recorder


@pytest.fixture
def read_only(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "ro", "none", folder)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


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


@pytest.mark.parametrize("what", COMMANDS)
def test_a_read_only_disk_is_one_line(what, read_only, tmp_path, capsys):
    assert COMMANDS[what](read_only, tmp_path) == ExitCode.user_error
    told = capsys.readouterr().err
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert str(read_only) in line
    assert "Read-only file system" in line
    assert "Traceback" not in told


def test_a_disk_that_becomes_read_only_ends_a_run_in_one_line(tmp_path, capsys, monkeypatch):
    def refuse(recorder, *args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(tmp_path / "run/metrics.jsonl"))

    monkeypatch.setattr(Recorder, "write", refuse)
    assert cli([*SHORT, f"run_dir={tmp_path}/run"]) == ExitCode.failure
    told = capsys.readouterr().err
    assert "error: run_dir: Read-only file system: the disk of" in told
    assert "is read-only now; the same command goes on when it can be written" in told
    assert "Traceback" not in told
