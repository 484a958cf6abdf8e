"""Exit codes, and what counts as the user's error (DESIGN section 1, point 5).

Our code raises ``ValueError`` for input that cannot be and ``assert`` for its own invariants. A
``ValueError`` that some library raised from within is a fault of ours, so it keeps its traceback:
:func:`is_user_error` tells them apart by the file that raised.
"""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_OURS = tuple(
    str(ROOT / package) + "/"
    for package in ("train", "model", "optim", "parallel", "quant", "data")
)


class ExitCode(IntEnum):
    """What the process tells its caller."""

    finished = 0
    failure = 1
    user_error = 2
    resumable = 75  # stopped early on purpose; the same command continues


class UserError(ValueError):
    """Input that cannot be, whoever noticed first; its text is the one line that the user reads."""


class DoesNotFitError(UserError):
    """The run needs more memory than a rank has.

    Attributes:
        table: what it needs, what there is, and what would fit.
    """

    def __init__(self, message: str, table: str) -> None:
        super().__init__(message)
        self.table = table


class TrainingFailedError(RuntimeError):
    """The run cannot go on and need not be debugged: steps failed, and it was to stop then."""


def is_user_error(error: BaseException) -> bool:
    """Whether the text of ``error`` is meant for the user: a ``ValueError`` that we raised."""
    if isinstance(error, UserError):
        return True
    if not isinstance(error, ValueError) or error.__traceback__ is None:
        return False
    frame = error.__traceback__
    while frame.tb_next is not None:
        frame = frame.tb_next
    return frame.tb_frame.f_code.co_filename.startswith(_OURS)


def one_line(error: BaseException) -> str:
    """Text of an error with its white space, line ends included, folded."""
    return " ".join(str(error).split()) or type(error).__name__
