"""How every script ends: exit codes as the trainer's, and one line for what is the user's.

0 finished, 1 failed, 2 the input cannot be, 75 stopped by Ctrl-C or SIGTERM. Any other exception is
a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ParamSpec

from parallel.last_word import tell_launcher
from parallel.launch import launched_rank
from train.errors import FAILURES, USER_ERRORS, ExitCode, ends_when_unread, lines_of
from train.terminal import log_to_stderr, wrapped

P = ParamSpec("P")


def command(
    log_level: int = logging.WARNING,
) -> Callable[[Callable[P, int | None]], Callable[P, int]]:
    """Make a script's ``main`` return an exit code, whatever ends it.

    Args:
        log_level: of what is told on stderr.
    """

    def decorate(main: Callable[P, int | None]) -> Callable[P, int]:
        @functools.wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> int:
            told = "%(levelname)s: %(message)s" if log_level > logging.INFO else "%(message)s"
            log_to_stderr(log_level, told)
            if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may know few characters
                sys.stdout.reconfigure(errors="backslashreplace")
            with _sigterm_interrupts():
                return ends_when_unread(lambda: _ended(lambda: main(*args, **kwargs)))

        return run

    return decorate


def _ended(work: Callable[[], int | None]) -> int:
    """Exit code of ``work``; its errors are told in one line."""
    try:
        code = work()
        return ExitCode.finished if code is None else code
    except USER_ERRORS as error:
        return tell(error, ExitCode.user_error)
    except FAILURES as error:
        return tell(error, ExitCode.failure)
    except KeyboardInterrupt as stop:
        name = stop.args[0] if stop.args else "SIGINT"
        sys.stderr.write(f"{name}: stopped; the same command starts again\n")
        return ExitCode.resumable


def tell(error: Exception, code: ExitCode) -> ExitCode:
    """Print an error, a line a problem, behind what was printed before; returns ``code``."""
    sys.stdout.flush()
    text = wrapped("".join(f"error: {line}\n" for line in lines_of(error)))
    sys.stderr.write(text)
    if launched_rank() == 0:
        tell_launcher(text)
    return code


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, in this process; children of a fork die by it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pid = os.getpid()

    def interrupt(number: int, _: FrameType | None) -> None:
        if os.getpid() != pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        raise KeyboardInterrupt("SIGTERM")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
