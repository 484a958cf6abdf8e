"""The real launcher on the real entry: a small job, its command, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from scripts.layout_trials.asked import free_port
from tests.helpers import ROOT
from train.record.metrics import read_metrics, unmeasured

# torchrun sets it where it starts several ranks and leaves it where it starts one.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
ENTRY = ROOT / "train" / "pretrain.py"
SMALL_MODEL = [
    "model=v4_tiny", "model.num_hidden_layers=3", "model.compress_ratios=[0,4,16,0]",
    "model.layer_kinds=[swa,csa,hca]", "model.hidden_size=32",
]  # fmt: skip


def words(corpus: Path, steps: int) -> list[str]:
    """Overrides of a job of 8 rows of 64 tokens a step."""
    return [
        *SMALL_MODEL, "data=jsonl", f"data.sources.jsonl.path={corpus}",
        f"data.cache_dir={corpus.parent / 'cache'}", "data.tokenizer=byte",
        "data.validation.bytes=2000", "data.validation.max_overlap=1", "train.seq_len=64",
        "train.global_batch_tokens=512", "train.micro_batch_size=1", f"train.steps={steps}",
        "train.checkpoint_every=2", "train.device=cpu", "train.eval_tokens=128", "sample.tokens=0",
    ]  # fmt: skip


def command(
    ranks: int,
    args: list[str],
    restarts: int = 0,
    nodes: int = 1,
    endpoint: str = "localhost:0",
    entry: Path = ENTRY,
) -> list[str]:
    """torchrun as on each node of a cluster: c10d rendezvous."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc-per-node",
        str(ranks), "--max-restarts", str(restarts), "--monitor-interval", "0.5",
        "--rdzv-id", "job", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, str(entry),
        *args,
    ]  # fmt: skip


def launch(ranks: int, *args: str, seconds: float = 280) -> subprocess.CompletedProcess[str]:
    """Run a job to its end; one that takes longer is killed with its ranks."""
    job = subprocess.Popen(
        command(ranks, list(args)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=ONE_THREAD,
    )  # fmt: skip
    try:
        output = job.communicate(timeout=seconds)
    finally:
        end(job)
    return subprocess.CompletedProcess(job.args, job.returncode, *output)


def kill_rank(
    rank: int,
    step: int,
    folder: Path,
    args: list[str],
    ranks: int = 2,
    restarts: int = 0,
    nodes: int = 1,
) -> tuple[int, float, str]:
    """SIGKILL one rank once a step's line is written.

    Args:
        rank: which.
        step: whose line is awaited.
        folder: of the run; beside it stands what the launchers print.
        args: of the job.
        ranks: of each node.
        restarts: that torchrun may try.
        nodes: launchers, all on this machine, that meet as those of a cluster do.

    Returns:
        The worst exit code of the launchers, seconds from the kill to their end, and what they
        printed.
    """
    log = folder.with_suffix(".log")
    endpoint = "localhost:0" if nodes == 1 else f"localhost:{free_port()}"
    job = command(ranks, [*args, f"run_dir={folder}"], restarts, nodes, endpoint)
    with log.open("w") as file:
        launchers = [
            subprocess.Popen(job, stdout=file, stderr=file, env=ONE_THREAD) for _ in range(nodes)
        ]
    try:
        wait_for_line(folder / "metrics.jsonl", step, launchers, log)
        worker_of(launchers, rank).send_signal(signal.SIGKILL)
        killed = time.monotonic()
        code = max(launcher.wait(timeout=280) for launcher in launchers)
        return code, time.monotonic() - killed, log.read_text()
    finally:
        for launcher in launchers:
            end(launcher)


def end(launcher: subprocess.Popen[Any]) -> None:
    """Kill what a failed test left behind; each rank is a session of its own."""
    if launcher.poll() is None:
        for process in psutil.Process(launcher.pid).children(recursive=True):
            process.kill()
        launcher.kill()
        launcher.wait()


def worker_of(launchers: list[subprocess.Popen[bytes]], rank: int) -> psutil.Process:
    """The process that holds a rank."""
    workers = [child for one in launchers for child in psutil.Process(one.pid).children()]
    return next(worker for worker in workers if worker.environ().get("RANK") == str(rank))


def wait_for_line(
    path: Path,
    step: int,
    launchers: list[subprocess.Popen[bytes]],
    log: Path,
    seconds: float = 200,
) -> None:
    """Until ``metrics.jsonl`` holds a step."""
    deadline = time.monotonic() + seconds
    while len(read_metrics(path)) < step:
        for launcher in launchers:
            assert launcher.poll() is None, f"left before the kill: {log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"no line {step} in time: {log.read_text()[-3000:]}"
        time.sleep(0.02)


def steps_of(folder: Path) -> list[dict[str, object]]:
    """All lines of ``metrics.jsonl`` without the measured fields."""
    return [unmeasured(record) for record in read_metrics(folder / "metrics.jsonl")]
