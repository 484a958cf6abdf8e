"""TensorBoard, as one of the places where metrics are shown besides their file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from train.errors import UserError


class TensorBoardTracker:
    """TensorBoard event files.

    Args:
        folder: where they are written.
        done: steps that the run has done; what an earlier start wrote behind them is hidden.
        history: reads these steps, oldest first, for a folder that has none of them.
    """

    def __init__(
        self, folder: Path, done: int, history: Callable[[], list[dict[str, Any]]]
    ) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  optional package
        except ImportError as error:
            raise UserError(
                "tensorboard=true needs the package tensorboard, which is not installed:"
                " pip install tensorboard"
            ) from error
        empty = not any(folder.glob("events.out.tfevents.*"))
        self._open = lambda step: SummaryWriter(str(folder), purge_step=step + 1)
        self._writer = self._open(done)
        if empty:
            for record in history():
                self.show(record)

    def show(self, record: Mapping[str, Any]) -> None:
        """Write every number of one step."""
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def rewind(self, step: int) -> None:
        """Hide the abandoned steps."""
        self._writer.close()
        self._writer = self._open(step)

    def before_save(self) -> dict[str, Any]:
        """Let no step up to the checkpoint be lost by a kill."""
        self._writer.flush()
        return {}

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()
