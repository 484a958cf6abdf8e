"""Every command of the README runs: extracted from it, the long ones shortened by overrides.

A command that the table below does not know fails the test, as does a row whose command is gone.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["train.steps=2", "train.eval_tokens=2048", "sample.tokens=4", "train.device=cpu"]

# command -> (what is added to it, exit code, part of what it prints)
COMMANDS = {
    "make pretrain": ([*SHORT, "model=v4_micro"], 0, "bits per byte"),
    "make quick": (None, 0, "pytest"),
    "make test": (None, 0, "pytest"),
    "python train/pretrain.py experiment=debug_cpu": (SHORT, 0, "step 2/2"),
    "python train/pretrain.py model=v4_tiny optim=adamw optim.lr=1e-3 run_dir=runs/tiny_adamw": (
        SHORT, 0, "step 2/2"),
    "python train/pretrain.py -m model=v4_tiny optim=muon,adamw": (SHORT, 0, "step 2/2"),
    "torchrun --nproc-per-node 1 train/pretrain.py model=v4_tiny quant=fp4_qat run_dir=runs/qat": (
        SHORT, 0, "step 2/2"),
    "torchrun train/pretrain.py +model=v4_flash": ([], 1, "290,942,289,362 parameters"),
    "python train/pretrain.py --help": ([], 0, "model: v4_flash"),
    "python train/pretrain.py --cfg job": ([], 0, "hidden_size"),
    "python scripts/twins.py v4_nano": ([], 0, "plain"),
    "python scripts/bench.py efficiency --out runs/efficiency": ([], 0, "V3.2"),
    "python scripts/prepare_data.py --help": ([], 0, "--workers"),
    "python scripts/export_hf.py --help": ([], 0, "usage"),
    "python scripts/import_hf.py --help": ([], 0, "usage"),
    "python scripts/score.py --help": ([], 0, "usage"),
    "python scripts/checkpoints.py --help": ([], 0, "usage"),
    "python scripts/samples.py --help": ([], 0, "usage"),
    "python scripts/bench.py checkpoint --help": ([], 0, "usage"),
    "python scripts/generate.py --help": ([], 0, "usage"),
    "python scripts/study.py --help": ([], 0, "muon_vs_adamw"),
    "python scripts/report.py --help": ([], 0, "usage"),
    "python scripts/bench.py optim --help": ([], 0, "usage"),
    "python scripts/bench.py step --help": ([], 0, "usage"),
    "python scripts/bench.py quant --help": ([], 0, "usage"),
    "python scripts/bench.py recovery --help": ([], 0, "usage"),
    "python scripts/bench.py timeline --help": ([], 0, "usage"),
    "python scripts/layouts.py --help": ([], 0, "usage"),
    "python -m tests.endurance --help": ([], 0, "usage"),
    "python scripts/study.py study=muon_vs_adamw --dry-run": ([], 0, "minutes in turn"),
}  # fmt: skip


def readme_commands():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_readme_holds_the_commands_that_are_tested():
    assert readme_commands() == list(COMMANDS)


def in_folder(words, folder):
    """The command with its folder moved away from the user's runs."""
    if "train/pretrain.py" not in words or words[-1] in ("--help", "job"):
        return [w.replace("runs/", f"{folder}/") for w in words]
    words = [w for w in words if not w.startswith("run_dir=")]
    return [*words, f"run_dir={folder}/run", "data.cache_dir=.cache/data"]


@pytest.mark.parametrize("command", list(COMMANDS))
def test_readme_command_runs(command, tmp_path):
    added, code, printed = COMMANDS[command]
    words = shlex.split(command)
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
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--master-port", "0"],
    }[words[0]]
    line = [*launcher, *in_folder(words[1:], tmp_path), *added]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == code, output[-3000:]
    assert printed in output, output[-3000:]
