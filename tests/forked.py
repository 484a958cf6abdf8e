"""Commands as forks of a process that has a run's imports: processes of their own, begun at once.

For tests of what a command does. Those of how it starts, and of launchers, start it as a user does.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
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
        seconds: after which it is killed, which fails the test.
        environment: beside that of this process.
    """
    return run_ranks(words, 1, cwd, seconds, **environment)[0]


def run_ranks(
    words: Sequence[str], ranks: int, cwd: Path = ROOT, seconds: float = 280, **environment: str
) -> list[subprocess.CompletedProcess[str]]:
    """The same on several ranks, with the variables that torchrun sets; on one rank with none."""
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
            for process in started:
                process.join(seconds)
                assert process.exitcode is not None, f"{' '.join(words)} ran beyond {seconds} s"
        finally:
            for process in started:
                process.kill()
        return [
            subprocess.CompletedProcess(
                [*words], process.exitcode or 0,
                *(Path(f"{out}/{rank}.{s}").read_text() for s in ("stdout", "stderr")),
            )
            for rank, process in enumerate(started)
        ]  # fmt: skip
