"""Every command of the README runs: extracted from it, the long ones shortened by overrides.

A command is a line of any block, however it is marked, that begins with a program. One that the
table below does not know fails the test, as does a row whose command is gone. A torchrun line runs
on as many processes as it says, a ``v4`` line as a fork (``tests/forked.py``).
The block on a user's own text is run by ``test_first_hour.py``.
"""

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.forked import run_forked
from tests.helpers import ROOT
from tests.integration.first_hour import readme_commands

SHORT = ["train.steps=2", "train.eval_tokens=2048", "sample.tokens=0", "train.device=cpu"]

# command -> (what is added to it, exit code, part of what it prints)
COMMANDS = {
    "make pretrain": ([*SHORT, "model=v4_tiny"], 0, "bits per byte"),
    "make quick": (None, 0, "pytest"),
    "make test": (None, 0, "pytest"),
    "torchrun --nproc-per-node 2 train/pretrain.py model=v4_tiny parallel.ep=2"
    " train.micro_batch_size=2 run_dir=runs/two_ranks": (SHORT, 0, "2 ranks (dp_shard=2 ep=2)"),
    "torchrun train/pretrain.py +model=v4_flash": ([], 1, "290,942,289,362 parameters"),
    "v4 plan experiment=gpu_24gb --card rtx4090": ([], 0, "917,687,980 parameters"),
    "v4 pretrain experiment=gpu_24gb": (
        [*SHORT, "model=v4_tiny", "data=default"],
        0,
        "bits per byte",
    ),
}


PROGRAMS = r"\s*\$?\s*(make|v4|torchrun|python|pip|source|sbatch|git) "


def all_commands():
    blocks = re.findall(r"```(.*?)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [(mark, line) for mark, block in blocks for line in block.splitlines() if line.strip()]
    return [line for mark, line in lines if mark == "bash" or re.match(PROGRAMS, line)]


def test_readme_holds_the_commands_that_are_tested():
    assert [c for c in all_commands() if c not in readme_commands()] == list(COMMANDS)


def test_readme_can_be_read_in_one_sitting():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    assert text.count("--help") <= 3


def in_folder(words, folder):
    """The command with its folder moved away from the user's runs."""
    if not {"pretrain", "train/pretrain.py"} & {*words}:
        return words
    words = [w for w in words if not w.startswith("run_dir=")]
    return [*words, f"run_dir={folder}/run", "data.cache_dir=.cache/data"]


def assert_ended(done, code, printed):
    output = done.stdout + done.stderr
    assert done.returncode == code, output[-3000:]
    assert printed in output, output[-3000:]


@pytest.mark.parametrize("command", list(COMMANDS))
def test_readme_command_runs(command, tmp_path):
    added, code, printed = COMMANDS[command]
    words = shlex.split(command)
    if words[0] == "v4":
        done = run_forked([*in_folder(words[1:], tmp_path), *added], OMP_NUM_THREADS="1")
        assert_ended(done, code, printed)
        return
    if words[0] == "make":
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
        dry = ["make", "-n", *words[1:]]
        recipe = subprocess.run(
            dry, cwd=ROOT, env=outside, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        if added is None:  # the tests do not run themselves
            assert any(printed in line for line in recipe)
            return
        words = ["python", *shlex.split(recipe[-1])[1:]]
    launcher = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"],
    }[words[0]]
    line = [*launcher, *in_folder(words[1:], tmp_path), *added]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert_ended(done, code, printed)
    if "+model=v4_flash" in command:
        assert done.stderr.splitlines()[-1].startswith("error: model.name=v4_flash needs")
        assert "smallest layouts that would fit:" in done.stderr
        assert "exitcode  : 2" in done.stderr  # that of the launcher is 1
