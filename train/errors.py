"""Exit codes, and what counts as the user's error (reference P.1).

Input that cannot be is told in one line with exit code 2. Each package raises its own
``ConfigError`` for it and ``train/`` its :class:`UserError`; :data:`USER_ERRORS` are exactly these.
Any other exception, a plain ``ValueError`` included, is a fault of ours and keeps its traceback.
What libraries and the operating system raise is translated where it enters.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import TypeVar

import data.errors
import model.errors
import optim.errors
import parallel.errors
import quant.errors
from conf.problems import ProblemsError, refuse

ROOT = Path(__file__).resolve().parents[1]
T = TypeVar("T")


class ExitCode(IntEnum):
    """What the process tells its caller."""

    finished = 0
    failure = 1
    user_error = 2
    resumable = 75  # stopped early on purpose; the same command continues


class UserError(ProblemsError):
    """Input that cannot be, whoever noticed first; its text is the one line that the user reads."""


USER_ERRORS: tuple[type[ProblemsError], ...] = (
    UserError, data.errors.ConfigError, model.errors.ConfigError, optim.errors.ConfigError,
    parallel.errors.ConfigError, quant.errors.ConfigError,
)  # fmt: skip


class DoesNotFitError(UserError):
    """The run needs more memory than a rank has; the last of its problems says so.

    Attributes:
        table: what it needs, what there is, and what would fit.
    """

    def __init__(self, *problems: str, table: str) -> None:
        super().__init__(*problems)
        self.table = table


class TrainingFailedError(RuntimeError):
    """The run cannot go on and need not be debugged: steps failed, and it was to stop then."""


# Told in one line, exit code 1: nothing to debug, and nothing wrong with the input.
FAILURES: tuple[type[Exception], ...] = (TrainingFailedError, data.errors.DiskError)


class Problems:
    """What checks refuse, gathered, so that whoever mends one problem knows of the others.

    A check is made on what earlier ones left: where something is refused already, one that trips
    over it in another way is passed over.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.misfit: DoesNotFitError | None = None

    def __bool__(self) -> bool:
        return bool(self.lines) or self.misfit is not None

    def of(self, check: Callable[[], T]) -> T | None:
        """What a check returns; None where it refuses, or trips over what is refused already."""
        try:
            return check()
        except DoesNotFitError as error:
            self.misfit = error
        except USER_ERRORS as error:
            self.lines += map(str, error.args)
        except Exception:
            if not self:
                raise
        return None

    def refuse(self) -> None:
        """Raise all of them together, where there are any.

        Raises:
            UserError: the problems; a misfit is the last of them, and brings its table.
        """
        if self.misfit is not None:
            lines = dict.fromkeys([*self.lines, *map(str, self.misfit.args)])
            raise DoesNotFitError(*lines, table=self.misfit.table)
        refuse(UserError, self.lines)


def check_all(*checks: Callable[[], object]) -> None:
    """Make every check, and raise what they refuse together.

    Args:
        checks: each raises one of :data:`USER_ERRORS`, or returns.

    Raises:
        UserError: the problems of all of them.
    """
    problems = Problems()
    for check in checks:
        problems.of(check)
    problems.refuse()


def lines_of(error: BaseException) -> list[str]:
    """The problems of an error, a line each."""
    problems = error.args if isinstance(error, USER_ERRORS) else ()
    return [one_line(UserError(problem)) for problem in problems] or [one_line(error)]


def one_line(error: BaseException) -> str:
    """Text of an error, printable, with its white space, line ends included, folded."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.encode("utf-8", "backslashreplace").decode()  # half of a surrogate pair


def ends_when_unread(work: Callable[[], int]) -> int:
    """Exit code of a command; it ends without a word when nobody reads its output any more.

    What is still buffered is written here, and not while the interpreter ends, where a reader that
    is gone (``| head``) would give a message that nobody asked for.

    Args:
        work: the command; a ``SystemExit`` of a parser of options is its end too.
    """
    try:
        try:
            return work()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.failure
