"""Reasons to stop early: a signal, or the wall clock. A run stops between steps and saves first."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from parallel.launch import is_launched, launched_rank
from train.errors import ExitCode

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def stop_with_launcher() -> None:
    """Let the system send SIGTERM when torchrun, or deepspeed's launcher, dies (Linux).

    A launcher that is killed cannot end its ranks: they would train on and hold the devices, while
    the same command starts again in the same folder.
    """
    if not is_launched() or sys.platform != "linux":
        return
    launcher = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:  # it died in between
        os.kill(os.getpid(), signal.SIGTERM)


class Stopped(SystemExit):
    """A signal ended what ran, and also ends what would come next, as the jobs of a sweep.

    Args:
        code: of what ran: a run whose last step was done when the signal came is finished.
    """

    def __init__(self, code: int = ExitCode.resumable) -> None:
        super().__init__(code)


def leave_on_signal() -> None:
    """Before the first step, and after the last, there is nothing to save: signals end it at once.

    Called before anything slow is imported. Raises :class:`Stopped` in this process; a worker that
    it has forked dies by the signal as it would have.
    """
    pid = os.getpid()

    def leave(number: int, _: FrameType | None) -> None:
        if os.getpid() != pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if launched_rank() == 0:
            name = signal.Signals(number).name
            told = "stopped, no step was running; the same command goes on"
            sys.stderr.write(f"{name}: {told}\n")
        raise Stopped

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)


class StopRequest:
    """Notices SIGTERM, Ctrl-C and the time limit, while it is entered as a context.

    A second Ctrl-C acts at once, as if this were not here.

    Args:
        time_limit_seconds: from construction on; 0 = no limit.

    Attributes:
        signalled: whether a signal came: nothing may come after this run.
    """

    def __init__(self, time_limit_seconds: float = 0.0) -> None:
        self._deadline = time.monotonic() + time_limit_seconds if time_limit_seconds else None
        self._reason = ""
        self._before: dict[int, Any] = {}
        self.signalled = False

    @property
    def reason(self) -> str:
        """Why to stop; empty: go on."""
        if not self._reason and self._deadline is not None and time.monotonic() >= self._deadline:
            self._reason = "the time limit"
        return self._reason

    def ask(self, reason: str) -> None:
        """Stop after the step that is running."""
        self._reason = self._reason or reason

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python refuses
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _notice(self, number: int, _: FrameType | None) -> None:
        if self.signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signalled = True
        self.ask(signal.Signals(number).name)
        log.info("%s: saving after this step, then leaving", signal.Signals(number).name)
