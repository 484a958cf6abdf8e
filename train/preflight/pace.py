"""How long a run will take: told after its third step, and again in each later stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from train.config.schema import RunConfig
from train.preflight.forecast import (
    duration,
    flops_per_token,
    quantity,
    run_flops,
    stretches,
)
from train.stages import Stage, StagePlan

log = logging.getLogger(__name__)
DAY = 86400.0  # seconds
_TIMED = (1, 3)  # steps between which time is taken: the first one warms up
_TIMED_COMPILED = (3, 5)  # audited steps run their operations as well, and graphs are built then


def long_run(run: RunConfig, plan: StagePlan, rate: float) -> Iterator[str]:
    """What is known to take more than a day, whatever the kernels.

    Args:
        run: the config.
        plan: its stages.
        rate: of matmuls on all devices together, FLOPs per second.
    """
    seconds = run_flops(run, plan) / rate
    if seconds > DAY:
        first = plan.stages[0]
        step = first.batch_tokens(0) * flops_per_token(run, first) / rate
        yield (
            f"a long run: at the full rate of matmuls measured here ({quantity(rate)}FLOP/s) its"
            f" {plan.steps:,} steps take {duration(seconds)}, the first one {duration(step)}, and"
            " training does not reach that rate; v4 plan tells of other machines"
        )


class Pace:
    """Takes the time of the first steps of a start, and of each stage that begins later.

    Args:
        run: the config.
        plan: its stages.
        clock: seconds.
    """

    def __init__(
        self, run: RunConfig, plan: StagePlan, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run, self._plan, self._clock = run, plan, clock
        self._stage: Stage | None = None  # of the last step
        self._steps = 0  # of this start in that stage
        self._began = (0.0, 0)
        self._behind: int | None = None  # position behind the last step

    def step_done(self, step: int, tokens: int) -> str | None:
        """Note a step; after the third of this start or of a stage, log what is left.

        Args:
            step: number of the step.
            tokens: position behind it.

        Returns:
            The line that was logged.
        """
        before = self._plan.tokens_at(step - 1) if self._behind is None else self._behind
        stage, self._behind = self._plan.stage(before), tokens
        self._steps = self._steps + 1 if stage is self._stage else 1
        self._stage = stage
        first, last = _TIMED_COMPILED if self._run.train.compile else _TIMED
        if self._steps == first:
            self._began = (self._clock(), tokens)
        began, timed_from = self._began
        if self._steps != last or step >= self._plan.steps or tokens <= timed_from:
            return None
        spent = self._clock() - began
        timed = (tokens - timed_from) * flops_per_token(self._run, stage)
        left = self._plan.steps - step
        parts = [
            (one.name, spent * count * flops_per_token(self._run, one) / timed)
            for one, count in stretches(self._plan, tokens)
        ]
        seconds = sum(needed for _, needed in parts)
        line = (
            f"expected: {duration(seconds)} for the {left:,} steps left, at"
            f" {spent / (last - first):.3g} s a step"
        )
        if len(parts) > 1:
            line += "; by stage: " + ", ".join(f"{name} {duration(s)}" for name, s in parts)
        log.info("%s", line)
        if seconds > DAY:
            log.warning(
                "more than a day: train.time_limit_seconds=N saves and leaves in time, and the same"
                " command goes on; train.steps=%d is what a day holds",
                step + int(left * DAY / seconds),
            )  # fmt: skip
        return line
