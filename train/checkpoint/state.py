"""What a checkpoint holds: everything from which a run goes on bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from data.loader import Loader
from parallel.engine import Engine
from train.checkpoint.average import WeightAverage, require, saved_model
from train.checkpoint.files import STATE, DamagedCheckpointError, step_of
from train.checkpoint.finite import first_not_finite
from train.checkpoint.reader import read, saved_tensors, together
from train.config.schema import Weights
from train.errors import USER_ERRORS, UserError, one_line
from train.recovery.anticipation import Anticipation
from train.recovery.judge import Recovery
from train.step import StepPlan


@dataclass
class Progress:
    """Where a run stands, between steps.

    Attributes:
        step: optimizer steps done.
        tokens: positions trained, padding included.
        skipped_steps: steps whose update was left out.
    """

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0


@dataclass
class RunState:
    """What changes while a run trains, and how it is saved and taken up again.

    Attributes:
        engine: holds weights and optimizer.
        loader: its position in the data.
        average: of the weights, if asked for.
        recovery: judges steps by those before.
        anticipation: holds experts chosen ahead.
        progress: where the run stands.
        identity: the record of what the run is, as JSON.
    """

    engine: Engine
    loader: Loader
    average: WeightAverage | None
    recovery: Recovery
    anticipation: Anticipation
    progress: Progress = field(default_factory=Progress)
    identity: dict[str, Any] = field(default_factory=dict)

    def advance(self, step: StepPlan, applied: bool) -> None:
        """Take note of a step that was done, whether or not its update was applied."""
        if self.average is not None and applied:
            self.average.update()
        done = self.progress
        tokens = step.tokens + step.batch_tokens
        self.progress = Progress(step.number, tokens, done.skipped_steps + (not applied))

    # ---- saving ------------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint but the choices ahead, by layout-free name."""
        return self.engine.state() | (self.average.state() if self.average is not None else {})

    def values(self) -> dict[str, Any]:
        """JSON values of a checkpoint."""
        return {
            "identity": self.identity,
            "progress": asdict(self.progress),
            "loader": self.loader.state_dict(),
            "recovery": self.recovery.state_dict(),
        }

    # ---- reading -----------------------------------------------------------------------------
    def load(self, folder: Path) -> Mapping[str, Any]:
        """Go on where a checkpoint stands. Collective.

        Returns:
            All JSON values that were saved.

        Raises:
            DamagedCheckpointError: it cannot be read.
            UserError: it is of another model, or a number of it is not finite.
        """
        saved = together(lambda: saved_tensors(folder))
        ahead = self.anticipation.allocate(saved, step_of(folder) or 0)
        tensors = self.tensors()
        state = _read_finite(folder, tensors | ahead, partial=False)
        self.engine.take_up(tensors)
        with as_written(folder):
            self._take_up(state)
            self.loader.load_state_dict(state["loader"])
        return state

    def load_evaluated(self, folder: Path, weights: Weights) -> Mapping[str, Any]:
        """Stand where a checkpoint does, to evaluate it; the data may be other data. Collective.

        Args:
            folder: the checkpoint.
            weights: which of it.
        """
        state = self.load_weights(folder, weights)
        with as_written(folder):
            self._take_up(state)
        return state

    def load_weights(self, folder: Path, weights: Weights) -> Mapping[str, Any]:
        """Take weights, expert biases and hash tables alone. Collective.

        Args:
            folder: the checkpoint.
            weights: which of it.

        Raises:
            UserError: it holds no such weights, or as :meth:`load`.
        """
        require(weights, folder, together(lambda: saved_tensors(folder)), "train.weights")
        state = self.engine.state()
        model = saved_model(state, self.engine.model, weights)
        values = _read_finite(folder, model, partial=True)
        self.engine.take_up(state)
        return values

    def roll_back(self, folder: Path) -> None:
        """Weights, optimizer and progress of a checkpoint; the data goes on. Collective."""
        tensors = self.tensors()
        state = read(folder, tensors, partial=True)
        self.engine.take_up(tensors)
        self.progress = Progress(**state["progress"])
        self.recovery.roll_back(self.progress.step, state.get("recovery", {}))
        self.anticipation.forget()
        self.loader.forget_ahead()

    def _take_up(self, state: Mapping[str, Any]) -> None:
        self.progress = Progress(**state["progress"])
        self.recovery.load_state_dict(state.get("recovery", {}))


@contextmanager
def as_written(folder: Path) -> Iterator[None]:
    """Take up what a state says.

    Raises:
        DamagedCheckpointError: it holds another thing than this code writes.
    """
    try:
        yield
    except USER_ERRORS:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpointError(
            f"checkpoint {folder}: file {STATE} is not as this code writes it:"
            f" {type(error).__name__}: {one_line(error)}"
        ) from error


def _read_finite(folder: Path, tensors: Mapping[str, Tensor], partial: bool) -> dict[str, Any]:
    """Read a checkpoint from which one can go on. Collective."""
    state = read(folder, tensors, partial)
    if spoilt := first_not_finite(tensors):
        raise UserError(f"checkpoint {folder}: its {spoilt} is not finite")
    return state
