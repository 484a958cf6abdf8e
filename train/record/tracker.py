"""What a run hands its records to while it trains (``train/display/``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Tracker(Protocol):
    """Takes each step's record. Only rank 0 has some; none feeds anything back into the run."""

    def show(self, record: Mapping[str, Any]) -> None:
        """Report one step."""
        ...

    def rewind(self, step: int) -> None:
        """The steps after ``step`` were given up; step + 1 comes next."""
        ...

    def before_save(self) -> dict[str, Any]:
        """A checkpoint of the last step comes: bring the steps to disk.

        Returns:
            JSON values that a resumed run gets from the checkpoint.
        """
        ...

    def close(self) -> None:
        """Flush and let go."""
        ...


class Screen(Protocol):
    """What people watch: it tells of steps that take long, and leaves when the run ends anyhow."""

    def microbatch(self, step: int, number: int, of: int, seconds: float) -> None:
        """Microbatch ``number`` of ``of`` comes, ``seconds`` after the step began."""
        ...

    def close(self) -> None:
        """Leave the screen to others; more than once does no harm."""
        ...
