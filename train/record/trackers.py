"""Where metrics are shown besides their file: console, TensorBoard; W&B has a file of its own.

Only rank 0 builds these. None of them feeds anything back into the run.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from train.errors import UserError

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes each step's record."""

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


class Console:
    """A bar on a terminal, plain lines in a log.

    Args:
        steps: of the whole run.
        done: steps that an earlier start of the run took.
        every: steps between lines.
        bar: draw a bar; default: when stderr is a terminal.
    """

    def __init__(self, steps: int, done: int, every: int, bar: bool | None = None) -> None:
        self.steps, self.every = steps, every
        self._started, self._done_before = time.monotonic(), done
        drawn = sys.stderr.isatty() if bar is None else bar
        self._bar = tqdm(total=steps, initial=done, unit="step") if drawn else None

    def show(self, record: Mapping[str, Any]) -> None:
        """Advance the bar, or write a line every few steps and at each evaluation."""
        if self._bar is not None:
            self._bar.set_postfix_str(
                _line(record, ("loss", "val_loss", "val_loss_average", "lr", "tokens_per_second"))
            )
            self._bar.update()
            return
        step = record["step"]
        if step % self.every == 0 or step in (1, self.steps) or "val_loss" in record:
            spent = (time.monotonic() - self._started) / max(1, step - self._done_before)
            left = _clock(spent * (self.steps - step))
            log.info("step %d/%d %s left %s", step, self.steps, _line(record, _SHOWN), left)

    def rewind(self, step: int) -> None:
        """Draw the bar back."""
        if self._bar is not None:
            self._bar.n = step
            self._bar.refresh()

    def before_save(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def close(self) -> None:
        """Leave the bar on the screen."""
        if self._bar is not None:
            self._bar.close()


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


_SHOWN = (
    "loss", "loss_mtp", "loss_indexer", "val_loss", "val_bits_per_byte", "val_loss_average", "lr",
    "grad_norm",
    "skipped_steps", "rollbacks", "tokens_per_second", "mfu",
)  # fmt: skip
_HIDDEN_AT_ZERO = {"skipped_steps", "rollbacks", "loss_mtp", "loss_indexer"}


def _line(record: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return " ".join(
        f"{name} {record[name]:.4g}"
        for name in names
        if name in record and not (name in _HIDDEN_AT_ZERO and not record[name])
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
