"""The ``deepspeed`` launcher starts a run as torchrun does, on a CPU too.

It adds ``--local_rank=N`` to the command line and sets no variable of torchrun's; on a CPU it
starts as many processes as ``LOCAL_SIZE`` says.
"""

import json
import re
import subprocess
import sys

import pytest

from parallel.errors import ConfigError
from parallel.launch import launched_here, without_local_rank
from scripts.layout_trials.asked import free_port
from tests.integration.small_run import write_corpus
from tests.parallel.torchrun import ENTRY, ONE_THREAD, launch, words
from train.record.metrics import read_metrics, unmeasured


def deepspeed(*args):
    """Two ranks on this machine, to their end."""
    env = {n: v for n, v in ONE_THREAD.items() if n not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port",
        str(free_port()), str(ENTRY), *args,
    ]  # fmt: skip
    return subprocess.run(
        command, env=env | {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"},
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip


def metrics_of(folder):
    return [unmeasured(r) for r in read_metrics(folder / "metrics.jsonl")]


def test_launcher_runs_two_ranks_to_the_end(tmp_path):
    folder = tmp_path / "run"
    asked = [*words(write_corpus(tmp_path), 2), "engine=deepspeed_zero2"]
    done = deepspeed(*asked, f"run_dir={folder}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [r["step"] for r in metrics_of(folder)] == [1, 2]
    assert json.loads((folder / "receipt.json").read_text())["layout"]["dp_shard"] == 2


@pytest.mark.slow
def test_launcher_is_as_torchrun_in_bits_and_exit_codes(tmp_path):
    asked = [*words(write_corpus(tmp_path), 3), "engine=deepspeed_zero3"]
    assert deepspeed(*asked, f"run_dir={tmp_path / 'a'}").returncode == 0
    assert launch(2, *asked, f"run_dir={tmp_path / 'b'}").returncode == 0
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")
    refused = deepspeed(*asked, "train.steps=-1", f"run_dir={tmp_path / 'c'}")
    assert refused.returncode == 2
    # Said by rank 0, and once more below the launcher's last line.
    said = re.findall(r"^error: .*", refused.stderr, re.M)
    assert said == ["error: train.steps=-1 must be 0 or more"] * 2


@pytest.mark.core
def test_local_rank_on_the_command_line_is_taken_off_or_named(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert without_local_rank(["--local_rank=1", "seed=1"]) == ["seed=1"]
    assert without_local_rank(["--local-rank=1"]) == []
    with pytest.raises(ConfigError, match="--local_rank=0, but environment variable LOCAL_RANK=1"):
        without_local_rank(["--local_rank=0"])


@pytest.mark.core
def test_processes_of_a_machine_are_counted_by_either_launcher(monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launched_here() == 1
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert launched_here() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert launched_here() == 4
