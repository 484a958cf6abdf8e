"""Where metrics are shown besides their file: console, Weights & Biases, TensorBoard.

Only rank 0 builds these. None of them feeds anything back into the run.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Takes each step's record."""

    def show(self, record: Mapping[str, Any]) -> None:
        """Report one step."""
        ...

    def rewind(self, step: int) -> None:
        """The steps after ``step`` were given up; step + 1 comes next."""
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
                _line(record, ("loss", "val_loss", "lr", "tokens_per_second"))
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

    def close(self) -> None:
        """Leave the bar on the screen."""
        if self._bar is not None:
            self._bar.close()


class WandbTracker:
    """Weights & Biases. A resumed run sends its repeated steps again; they equal what was sent.

    Args:
        mode: offline or online.
        project: the project.
        entity: team or user; empty: the account's own.
        name: of the run.
        folder: run folder; keeps the id, so that a resume continues the same W&B run.
        config: the resolved config.
    """

    def __init__(
        self, mode: str, project: str, entity: str, name: str, folder: Path, config: dict[str, Any]
    ) -> None:
        import wandb  # noqa: PLC0415  a second to import, and most runs never use it

        remembered = folder / "wandb_id.txt"
        known = remembered.read_text(encoding="utf-8").strip() if remembered.exists() else None
        self._run = wandb.init(
            mode="offline" if mode == "offline" else "online",
            project=project,
            entity=entity or None,
            name=name,
            id=known,
            resume="allow",
            dir=str(folder),
            config=config,
        )
        remembered.write_text(self._run.id + "\n", encoding="utf-8")

    def show(self, record: Mapping[str, Any]) -> None:
        """Log one step under its own number."""
        self._run.log(dict(record), step=record["step"])

    def rewind(self, step: int) -> None:
        """W&B only goes forward: it shows the abandoned steps, then what comes after them."""

    def close(self) -> None:
        """Finish the upload."""
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard event files.

    Args:
        folder: where they are written.
        resume_step: steps from here on that an earlier start wrote are hidden.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  optional package
        except ImportError as error:
            raise ValueError(
                "tensorboard=true needs the package tensorboard, which is not installed:"
                " pip install tensorboard"
            ) from error
        self._open = lambda step: SummaryWriter(str(folder), purge_step=step + 1)
        self._writer = self._open(resume_step)

    def show(self, record: Mapping[str, Any]) -> None:
        """Write every number of one step."""
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def rewind(self, step: int) -> None:
        """Hide the abandoned steps."""
        self._writer.close()
        self._writer = self._open(step)

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


_SHOWN = (
    "loss", "loss_mtp", "loss_indexer", "val_loss", "val_bits_per_byte", "lr", "grad_norm",
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
