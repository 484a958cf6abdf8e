"""Notices steps that fail, and decides what becomes of the run (reference C.3).

Everything is a function of losses and gradient norms of the global batch, which all ranks know to
the bit, and of the state here, which is saved with every checkpoint: all ranks decide alike, and a
resumed run decides as the one that was never stopped.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from parallel.engine import Shares
from train.config.recovery import Anticipatory, RecoveryConfig, Remedy
from train.step import StepPlan, StepResult

log = logging.getLogger(__name__)

_NORMAL = 1.4826  # standard deviation of a normal distribution over its median distance
_LEAST_DEVIATION = 0.01  # of the median: equal losses must not make everything a spike


@dataclass
class RecoveryState:
    """What the next decision depends on.

    Attributes:
        stage: the losses are of.
        losses: of the last steps that were no spikes, oldest first.
        failing: steps in a row that failed, up to the last one.
        skips: updates in a row that were not applied, up to the last one.
        loss_spikes: since the start, abandoned steps included.
        rollbacks: since the start.
        anticipate_until: last step that is routed by earlier weights.
    """

    stage: str = ""
    losses: list[float] = field(default_factory=list)
    failing: int = 0
    skips: int = 0
    loss_spikes: int = 0
    rollbacks: int = 0
    anticipate_until: int = 0


@dataclass(frozen=True)
class Verdict:
    """What becomes of the run after a step.

    Attributes:
        remedy: none, skip (done already), rollback or stop.
        reason: in words; empty where nothing failed.
        first_failed: the first of the failing steps in a row.
    """

    remedy: Remedy = Remedy.none
    reason: str = ""
    first_failed: int = 0


class Recovery:
    """Judges steps.

    Args:
        config: the ``train.recovery`` section.
    """

    def __init__(self, config: RecoveryConfig) -> None:
        self._on_nonfinite, self._on_spike = config.on_nonfinite, config.on_spike
        self._window, self._threshold = config.window, config.threshold
        self._patience = config.patience
        self._max_skips, self._max_rollbacks = config.max_skips, config.max_rollbacks
        self._anticipatory, self._anticipatory_steps = (
            config.anticipatory,
            config.anticipatory_steps,
        )
        self.skip_steps = config.skip_steps
        self.state = RecoveryState()

    # ---- judging -----------------------------------------------------------------------------
    def accepts(self, step: StepPlan, shares: Shares) -> bool:
        """Before the update: whether it may be applied, finite as it is."""
        loss = float(shares.losses["loss"])
        return self._on_spike is not Remedy.skip or not self._is_spike(step, loss)

    def after(self, step: StepPlan, result: StepResult) -> Verdict:
        """Take note of a step.

        Args:
            step: that was run.
            result: what came of it.
        """
        loss, total = float(result.shares.losses["loss"]), result.shares.total
        assert total is not None
        finite = math.isfinite(float(total)) and math.isfinite(result.update.grad_norm)
        spike = finite and self._is_spike(step, loss)
        reason = self._reason(step, loss, finite)
        state = self._of_stage(step)
        state.skips = 0 if result.update.applied else state.skips + 1
        state.loss_spikes += spike
        if finite and (not spike or self._on_spike is Remedy.none):
            state.losses = [*state.losses, loss][-self._window :]
        if finite and not spike:
            state.failing = 0
            return Verdict()
        state.failing += 1
        log.warning("%s", reason)
        return self._verdict(reason, finite, step.number - state.failing + 1)

    @property
    def suspects(self) -> bool:
        """Whether the last steps may be the beginning of what is rolled back or stopped."""
        return self.state.failing > 0 and self._on_spike in (Remedy.rollback, Remedy.stop)

    def anticipates(self, step: int) -> bool:
        """Whether step number ``step`` is routed by earlier weights."""
        if self._anticipatory is Anticipatory.after_rollback:
            return step <= self.state.anticipate_until
        return self._anticipatory is Anticipatory.always

    # ---- state -------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a checkpoint stood; one from before there was this: afresh."""
        self.state = RecoveryState(**state)

    def roll_back(self, step: int, saved: Mapping[str, Any]) -> None:
        """Take up the state that was saved after ``step``, and remember what has happened since."""
        now, self.state = self.state, RecoveryState(**saved)
        self.state.loss_spikes = now.loss_spikes
        self.state.rollbacks = now.rollbacks + 1
        self.state.anticipate_until = step + self._anticipatory_steps

    def _of_stage(self, step: StepPlan) -> RecoveryState:
        """The state, begun anew where another stage has begun: its losses are other losses."""
        if self.state.stage != step.stage.name:
            self.state.stage, self.state.losses, self.state.failing = step.stage.name, [], 0
        return self.state

    def _is_spike(self, step: StepPlan, loss: float) -> bool:
        losses = self._of_stage(step).losses
        if len(losses) < self._window or not math.isfinite(loss):
            return False
        return loss > statistics.median(losses) + self._threshold * deviation(losses)

    def _reason(self, step: StepPlan, loss: float, finite: bool) -> str:
        if not finite:
            return f"step {step.number} is not finite"
        losses = self._of_stage(step).losses or [loss]
        middle = statistics.median(losses)
        return (
            f"step {step.number} is a loss spike: {loss:.4f},"
            f" {(loss - middle) / deviation(losses):.1f} robust deviations above the median"
            f" {middle:.4f} of the last {len(losses)} losses"
        )

    def _verdict(self, reason: str, finite: bool, first_failed: int) -> Verdict:
        state = self.state
        remedy = self._on_spike if finite else self._on_nonfinite
        waits = finite and state.failing < self._patience
        if remedy in (Remedy.rollback, Remedy.stop) and waits:
            remedy = Remedy.none
        if remedy is Remedy.stop:
            key = "on_spike" if finite else "on_nonfinite"
            reason += f", as {state.failing} step(s) in a row failed: train.recovery.{key}=stop"
        if remedy is Remedy.skip and 0 < self._max_skips < state.skips:
            remedy = Remedy.stop
            reason += (
                f", and {state.skips} updates in a row were left out:"
                f" train.recovery.max_skips={self._max_skips}"
            )
        if remedy is Remedy.rollback and state.rollbacks >= self._max_rollbacks:
            remedy = Remedy.stop
            reason += (
                f", and the run was rolled back {state.rollbacks} time(s) before:"
                f" train.recovery.max_rollbacks={self._max_rollbacks}"
            )
        return Verdict(remedy, reason, first_failed)


def deviation(losses: list[float]) -> float:
    """Robust standard deviation of the noise in ``losses``, at least a hundredth of the median.

    It is taken from the differences of neighbours: a loss that falls fast spreads widely and has
    little noise all the same. (The difference of two equal noises has sqrt(2) times the deviation.)
    """
    steps = [b - a for a, b in pairwise(losses)] or [0.0]
    middle = statistics.median(steps)
    noise = _NORMAL * statistics.median(abs(x - middle) for x in steps) / math.sqrt(2)
    return max(noise, _LEAST_DEVIATION * abs(statistics.median(losses)))
