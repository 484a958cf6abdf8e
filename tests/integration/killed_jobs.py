"""Starts the command again and again without paying for its imports each time.

Every start is a fork of a process that has made them (``tests/preloaded.py``): a real process of
its own that runs ``pretrain.cli`` and dies by a real SIGKILL from outside.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from tests.helpers import warm_context
from train import pretrain
from train.errors import ExitCode

_LOOK = 0.001  # seconds between two looks at the run folder


def run_command(words: list[str], log: Path, environment: dict[str, str]) -> None:
    """The body of a start; what it prints goes to ``log``."""
    os.environ.clear()  # that of the process they are forked from is the first test's
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = ["pretrain.py"]
    torch.set_num_threads(1)  # spinning threads on shared cores cost 10x
    os._exit(pretrain.cli(words))


def start(words: list[str], log: Path) -> ForkServerProcess:
    """Start the command in the background."""
    given = (words, log, dict(os.environ))
    process = warm_context().Process(target=run_command, args=given, daemon=True)
    process.start()
    return process


def run_to_end(words: list[str], log: Path) -> None:
    """Run the command; anything but exit code 0 is a failure."""
    process = start(words, log)
    process.join(1200)
    assert process.exitcode == ExitCode.finished, log.read_text()[-3000:]


def kill_at_random(words: list[str], folder: Path, rng: random.Random, log: Path) -> str:
    """Start the command and SIGKILL it at a random instant.

    Returns:
        Where it was hit: ``start``, ``step``, ``save`` (a hidden folder was left), or ``finished``
        if it ended before.
    """
    clean(folder)
    process = start(words, log)
    try:
        wait_for_moment(process, folder, rng)
    finally:
        process.kill()
        process.join()
    if process.exitcode == ExitCode.finished:
        return "finished"
    assert process.exitcode == -signal.SIGKILL, log.read_text()[-3000:]
    if list((folder / "checkpoints").glob(".writing_*")):
        return "save"
    return "step" if size_of(folder) else "start"


def wait_for_moment(process: ForkServerProcess, folder: Path, rng: random.Random) -> None:
    """Until a time after the start, a few lines of metrics, or a save that began; and a bit."""
    kind = rng.choice(("time", "lines", "save", "save"))
    if kind == "time":
        process.join(rng.uniform(0, 3))
        return
    lines, before = rng.randint(1, 2), size_of(folder)
    seen = 0
    while process.is_alive() and seen < lines:
        if kind == "lines" and size_of(folder) != before:
            seen, before = seen + 1, size_of(folder)
        elif kind == "save" and any((folder / "checkpoints").glob(".writing_*")):
            seen = lines
        time.sleep(_LOOK)
    time.sleep(rng.uniform(0, 0.03))


def size_of(folder: Path) -> int:
    """Bytes of the metrics file."""
    path = folder / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def clean(folder: Path) -> None:
    """Take hidden folders of the kill before away from the sight of :func:`kill_at_random`."""
    for path in (folder / "checkpoints").glob(".writing_*"):
        path.rename(path.with_name(path.name.replace(".writing_", ".removing_")))
