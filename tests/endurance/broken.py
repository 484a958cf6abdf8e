"""What a life raises that breaks a promise."""

from __future__ import annotations


class BrokenError(AssertionError):
    """An invariant does not hold.

    Args:
        what: in one line.
        printed: by the processes that were at it.
    """

    def __init__(self, what: str, printed: str = "") -> None:
        super().__init__(what)
        self.what, self.printed = what, printed


def expect(holds: bool, what: str, printed: str = "") -> None:
    """Raise unless it holds.

    Raises:
        BrokenError: it does not.
    """
    if not holds:
        raise BrokenError(what, printed)
