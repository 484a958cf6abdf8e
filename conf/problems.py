"""Errors that may hold several problems at once: whoever mends one should know of the others."""

from __future__ import annotations

from collections.abc import Iterable


class ProblemsError(ValueError):
    """One problem or several; its arguments are the lines, each for itself."""

    def __str__(self) -> str:
        """All of them, as one text."""
        return "; ".join(map(str, self.args))


def refuse(error: type[ProblemsError], problems: Iterable[str | None]) -> None:
    """Raise an error of all problems, where there are any.

    Args:
        error: to raise.
        problems: lines; None is no problem.
    """
    if found := [problem for problem in problems if problem]:
        raise error(*dict.fromkeys(found))
