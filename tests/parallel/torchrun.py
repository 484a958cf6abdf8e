"""The real launcher on the real entry: a small job, its command, and what it leaves behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.helpers import ROOT
from train.metrics import read_metrics, unmeasured

ENTRY = ROOT / "train" / "pretrain.py"
TEXT_SHORT = "data.validation.bytes=2000"
SMALL_MODEL = [
    "model=v4_tiny", "model.num_hidden_layers=3", "model.compress_ratios=[0,4,16,0]",
    "model.layer_kinds=[swa,csa,hca]", "model.hidden_size=32",
]  # fmt: skip


def words(corpus: Path, steps: int) -> list[str]:
    """Overrides of a job of 8 rows of 64 tokens a step."""
    return [
        *SMALL_MODEL, "data=jsonl", f"data.sources.jsonl.path={corpus}",
        f"data.cache_dir={corpus.parent / 'cache'}", "data.tokenizer=byte", TEXT_SHORT,
        "data.validation.max_overlap=1", "train.seq_len=64", "train.global_batch_tokens=512",
        "train.micro_batch_size=1", f"train.steps={steps}", "train.checkpoint_every=2",
        "train.device=cpu", "train.eval_tokens=128", "sample.tokens=0",
    ]  # fmt: skip


def command(ranks: int, args: list[str], restarts: int = 0) -> list[str]:
    """torchrun as on a cluster: c10d rendezvous, here on a free port."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
        "--max-restarts", str(restarts), "--monitor-interval", "0.5", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", str(ENTRY), *args,
    ]  # fmt: skip


def launch(ranks: int, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a job to its end."""
    return subprocess.run(
        command(ranks, list(args)), capture_output=True, text=True, check=False, timeout=280
    )


def kill_rank(
    rank: int, step: int, folder: Path, args: list[str], ranks: int = 2, restarts: int = 0
) -> tuple[int, float, str]:
    """SIGKILL one rank once a step's line is written.

    Returns:
        Exit code of the launcher, seconds from the kill to its end, and what it printed.
    """
    log = folder.with_suffix(".log")
    job = command(ranks, [*args, f"run_dir={folder}"], restarts)
    with log.open("w") as file:
        launcher = subprocess.Popen(job, stdout=file, stderr=file)
    try:
        wait_for_line(folder / "metrics.jsonl", step, launcher, log)
        worker_of(launcher, rank).send_signal(signal.SIGKILL)
        killed = time.monotonic()
        code = launcher.wait(timeout=280)
        return code, time.monotonic() - killed, log.read_text()
    finally:
        if launcher.poll() is None:
            for process in psutil.Process(launcher.pid).children(recursive=True):
                process.kill()
            launcher.kill()
            launcher.wait()


def worker_of(launcher: subprocess.Popen[bytes], rank: int) -> psutil.Process:
    """The process that holds a rank."""
    children = psutil.Process(launcher.pid).children()
    return next(child for child in children if child.environ().get("RANK") == str(rank))


def wait_for_line(path: Path, step: int, launcher: subprocess.Popen[bytes], log: Path) -> None:
    """Until ``metrics.jsonl`` holds a step."""
    deadline = time.monotonic() + 200
    while len(read_metrics(path)) < step:
        assert launcher.poll() is None, f"left before the kill: {log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"no line {step} in time: {log.read_text()[-3000:]}"
        time.sleep(0.02)


def steps_of(folder: Path) -> list[dict[str, object]]:
    """All lines of ``metrics.jsonl`` without the measured fields."""
    return [unmeasured(record) for record in read_metrics(folder / "metrics.jsonl")]
