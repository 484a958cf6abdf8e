"""Commands as forks of a process that has a run's imports: processes of their own, begun at once.

For tests of what a command does. Those of how it starts, and of launchers, start it as a user does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from scripts.__main__ import main
from scripts.layout_trials.asked import free_port
from tests.helpers import ROOT, warm_context


def _command(words: Sequence[str], cwd: Path, environment: dict[str, str], out: str) -> None:
    os.environ.clear()  # that of the process they are forked from is the first test's
    os.environ.update(environment)
    os.chdir(cwd)
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{out}.{stream}", os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(1)
    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_forked(
    words: Sequence[str], cwd: Path = ROOT, seconds: float = 280, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of ``v4`` to its end.

    Args:
        words: its name, then its arguments.
        cwd: where.
        seconds: after which it is killed, which fails the test and shows what it said.
        environment: beside that of this process.
    """
    return run_ranks(words, 1, cwd, seconds, **environment)[0]


def run_ranks(
    words: Sequence[str], ranks: int, cwd: Path = ROOT, seconds: float = 280, **environment: str
) -> list[subprocess.CompletedProcess[str]]:
    """The same on several ranks, with the variables that torchrun sets; on one rank with none.

    The others are killed where one fails and they do not end.
    """
    port = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as out:
        started = []
        for rank in range(ranks):
            own = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks), **port,
            } if ranks > 1 else {}  # fmt: skip
            given = (words, cwd, {**os.environ, **own, **environment}, f"{out}/{rank}")
            started.append(warm_context().Process(target=_command, args=given))
            started[-1].start()
        try:
            ended = wait_for(started, seconds)
        finally:
            for process in started:
                process.kill()
                process.join()
        done = [
            subprocess.CompletedProcess(
                [*words], process.exitcode or 0,
                *(_text(Path(f"{out}/{rank}.{stream}")) for stream in ("stdout", "stderr")),
            )
            for rank, process in enumerate(started)
        ]  # fmt: skip
    tails = "".join(f"\n-- rank {n}\n{rank.stderr[-2000:]}" for n, rank in enumerate(done))
    assert not ended, f"{' '.join(words)}: {ended}{tails}"
    return done


def wait_for(started: Sequence[BaseProcess], seconds: float, after: float = 20.0) -> str:
    """Until all have ended, or a while after one has failed, for which the others may wait.

    Args:
        started: one process a rank.
        seconds: for all together.
        after: seconds that others have to end by themselves once one has failed.

    Returns:
        Why it was left before all had ended; empty: they have.
    """
    until = time.monotonic() + seconds
    failed = ""
    while left := [process for process in started if process.exitcode is None]:
        codes = {rank: process.exitcode for rank, process in enumerate(started)}
        if not failed and any(codes.values()):
            failed = f"a rank failed and others went on, exit codes by rank {codes}"
            until = min(until, time.monotonic() + after)
        if time.monotonic() >= until:
            return failed or f"beyond {seconds} s"
        wait([process.sentinel for process in left], max(0.0, until - time.monotonic()))
    return ""


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""  # none of a rank killed before it began
