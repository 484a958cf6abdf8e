"""Forks processes from a warm parent, watches them, and lets none be left behind.

The parent has imported torch and the trainer, once; it has one thread, so that a fork of it is a
process like one that was started, but for the four seconds that starting it takes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.endurance.broken import BrokenError
from tests.endurance.child import leave
from train.errors import ExitCode

PATIENCE = 180.0  # seconds for one start; nothing in a life takes so long
_GRACE = 1.0  # seconds that other ranks have to tell the same error
_NOTICE = 60.0  # seconds in which they must have noticed that one is gone
_TIDY = 5.0  # seconds until a process of a session that has ended is gone
_LOOK = 0.003
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Process:
    """One forked process.

    Args:
        body: what it does, given a function by which it tells facts; returns its exit code.
        log: file for what it prints; beside it lies a file of its facts.
        environment: what is added to the parent's.
    """

    def __init__(
        self,
        body: Callable[[Callable[[str], None]], int],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log, self._facts = log, log.with_suffix(".facts")
        self.code: int | None = None
        self.stopped = False
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            leave(lambda: self._become(body, environment or {}))

    def _become(
        self, body: Callable[[Callable[[str], None]], int], environment: Mapping[str, str]
    ) -> int:
        parent = os.getppid()
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return 1
        os.environ.update(environment)
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        facts, write = os.open(self._facts, os.O_WRONLY | os.O_CREAT | os.O_APPEND), os.write
        return body(lambda fact: write(facts, f"{fact}\n".encode()) and None)

    def look(self) -> bool:
        """Whether it has ended; notices that it was stopped."""
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if not pid:
                break
            if os.WIFSTOPPED(status):
                self.stopped = True
            elif os.WIFCONTINUED(status):
                self.stopped = False
            else:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def send(self, number: int) -> None:
        """Send a signal, if it still lives."""
        if not self.look():
            os.kill(self.pid, number)

    @property
    def stands_still(self) -> bool:
        """Whether it has stopped itself, as its event wants."""
        return self.stopped and any(fact.startswith("struck") for fact in self.facts())

    def printed(self) -> str:
        """All that it printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def facts(self) -> list[str]:
        """What it told."""
        return self._facts.read_text().splitlines() if self._facts.exists() else []

    def left_behind(self) -> bool:
        """Whether a process of its session lives on after it."""
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return True


class _Waited:
    """Seconds since the first question, without those in which this process was suspended."""

    def __init__(self) -> None:
        self._last, self._sum = 0.0, 0.0

    def seconds(self) -> float:
        now = time.monotonic()
        self._sum += min(now - self._last, 0.5) if self._last else 0.0
        self._last = now
        return self._sum


class Job:
    """The ranks of one start, and what a launcher does with them.

    Args:
        ranks: the processes. They tell ``joined`` when all have found each other.
    """

    def __init__(self, ranks: Sequence[Process]) -> None:
        self.ranks = ranks
        self._ended: set[int] = set()  # ranks that the launcher ended

    def wait(self, until_stopped: bool = False) -> bool:
        """Wait for the end of all ranks.

        As torchrun, it ends the others when one was refused, or left before they had found each
        other. Later it expects them to notice, and to leave by themselves.

        Args:
            until_stopped: or until one stops: then all are stopped.

        Returns:
            Whether they have ended.

        Raises:
            BrokenError: they do not end.
        """
        waited, alone = _Waited(), _Waited()
        while not all([rank.look() for rank in self.ranks]):
            if until_stopped and any(rank.stands_still for rank in self.ranks):
                self._stop()
                return False
            if any(rank.code for rank in self.ranks):
                seconds = alone.seconds()
                if seconds > _GRACE and not self._must_leave():
                    self._end_others()
                elif seconds > _NOTICE:
                    self._give_up("though another left")
            if waited.seconds() > PATIENCE:
                self._give_up("at all")
            time.sleep(_LOOK)
        for rank in self.ranks:
            self._expect_nothing_left(rank)
        return True

    def go_on(self) -> None:
        """Let stopped ranks run again."""
        for rank in self.ranks:
            rank.send(signal.SIGCONT)
            rank.stopped = False

    def kill(self) -> None:
        """End all at once."""
        for rank in self.ranks:
            rank.send(signal.SIGKILL)
        self.wait()

    @property
    def codes(self) -> list[int]:
        """Exit codes by rank; minus the signal of one that was killed, 1 if by the launcher."""
        codes = [rank.code if rank.code is not None else 0 for rank in self.ranks]
        return [1 if rank in self._ended else code for rank, code in enumerate(codes)]

    def facts(self) -> list[str]:
        """What the ranks told."""
        return [fact for rank in self.ranks for fact in rank.facts()]

    def printed(self) -> str:
        """What all ranks printed, in turn."""
        return "".join(rank.printed() for rank in self.ranks)

    def _must_leave(self) -> bool:
        """Whether a rank notices by itself that another is gone."""
        refused = any(rank.code == ExitCode.user_error for rank in self.ranks)
        return not refused and all("joined" in rank.facts() for rank in self.ranks)

    def _end_others(self) -> None:
        self._ended |= {number for number, rank in enumerate(self.ranks) if not rank.look()}
        for rank in self.ranks:
            rank.send(signal.SIGKILL)

    def _stop(self) -> None:
        for rank in self.ranks:
            rank.send(signal.SIGSTOP)
        while not all(rank.look() or rank.stopped for rank in self.ranks):
            time.sleep(_LOOK)

    def _give_up(self, because: str) -> None:
        for rank in self.ranks:
            rank.send(signal.SIGUSR1)
        time.sleep(1.0)
        running = [number for number, rank in enumerate(self.ranks) if not rank.look()]
        for rank in self.ranks:
            rank.send(signal.SIGKILL)
        raise BrokenError(f"rank(s) {running} did not end {because}", self.printed())

    def _expect_nothing_left(self, rank: Process) -> None:
        waited = _Waited()
        while rank.left_behind():
            if waited.seconds() > _TIDY:
                os.killpg(rank.pid, signal.SIGKILL)
                raise BrokenError("a process was left behind", rank.printed())
            time.sleep(_LOOK)
