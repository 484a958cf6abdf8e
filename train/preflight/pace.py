"""How long a run will take: told once, after its third step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from train.config.schema import RunConfig
from train.preflight.forecast import duration, flops_per_token, quantity, run_flops
from train.stages import StagePlan

log = logging.getLogger(__name__)
DAY = 86400.0  # seconds
_FIRST, _LAST = 1, 3  # steps of this start between which time is taken: the first one warms up


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
    """Takes the time of a start's first steps.

    Args:
        run: the config.
        plan: its stages.
        clock: seconds.
    """

    def __init__(
        self, run: RunConfig, plan: StagePlan, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run, self._plan, self._clock = run, plan, clock
        self._steps = 0
        self._began = (0.0, 0)

    def step_done(self, step: int, tokens: int) -> str | None:
        """Note a step; after the third of this start, log what is left and return the line.

        Args:
            step: number of the step.
            tokens: position behind it.
        """
        self._steps += 1
        if self._steps == _FIRST:
            self._began = (self._clock(), tokens)
        began, before = self._began
        left = self._plan.steps - step
        if self._steps != _LAST or left < 1 or tokens <= before:
            return None
        spent = self._clock() - began
        behind = run_flops(self._run, self._plan, tokens)
        seconds = spent * behind / (run_flops(self._run, self._plan, before) - behind)
        line = (
            f"expected: {duration(seconds)} for the {left:,} steps left, at"
            f" {spent / (_LAST - _FIRST):.3g} s a step"
        )
        log.info("%s", line)
        if seconds > DAY:
            log.warning(
                "more than a day: train.time_limit_seconds=N saves and leaves in time, and the same"
                " command goes on; train.steps=%d is what a day holds",
                step + int(left * DAY / seconds),
            )  # fmt: skip
        return line
