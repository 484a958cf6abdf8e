"""The learning rate as pure functions of the step and the tokens seen; nothing to save or resume.

DeepSeek-V4 section 4.2.2 (reference C.2): linear warm-up in steps, a constant peak, a cosine tail.
``tokens`` counts what was consumed *before* the step at hand, over the whole global batch, so the
first step has 0. What hangs on the tail (MTP weight, expert bias) and the batch ramp belong to the
stages of ``train``, which ask :func:`decay_started`.
"""

from __future__ import annotations

import math

from optim.config import OptimConfig, ScheduleConfig, ScheduleKind
from optim.errors import ConfigError


def learning_rate(config: OptimConfig, *, step: int, tokens: int, total_tokens: int) -> float:
    """Learning rate of a step: the peak times the warm-up factor times the factor of the shape.

    Args:
        config: the ``optim`` section.
        step: number of the step that is about to run, the first is 1.
        tokens: consumed before it.
        total_tokens: of the whole run; at and beyond it the factor stays at ``end_lr_ratio``.
    """
    return config.lr * warmup(config.schedule, step) * decay(config.schedule, tokens, total_tokens)


def warmup(schedule: ScheduleConfig, step: int) -> float:
    """Factor that rises linearly from 1 / warmup_steps at step 1 to 1 at step warmup_steps."""
    return min(1.0, step / schedule.warmup_steps) if schedule.warmup_steps else 1.0


def decay(schedule: ScheduleConfig, tokens: int, total_tokens: int) -> float:
    """Factor in [end_lr_ratio, 1] by the kind of schedule."""
    kind, end = ScheduleKind(schedule.kind), schedule.end_lr_ratio
    if kind is ScheduleKind.constant:
        return 1.0
    start = 0.0 if kind is ScheduleKind.cosine else decay_start(schedule, total_tokens)
    progress = _progress(tokens, start, total_tokens)
    if kind is ScheduleKind.wsd:
        return 1.0 + (end - 1.0) * progress
    return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def decay_start(schedule: ScheduleConfig, total_tokens: int) -> float:
    """Tokens at which the tail begins (for the cosine kind: from which the run counts as late)."""
    return float(schedule.decay_start_tokens or schedule.decay_start * total_tokens)


def decay_started(schedule: ScheduleConfig, tokens: int, total_tokens: int) -> bool:
    """Whether the step at hand lies in the tail; a constant schedule has none."""
    if ScheduleKind(schedule.kind) is ScheduleKind.constant:
        return False
    return tokens >= decay_start(schedule, total_tokens)


def check_run_length(schedule: ScheduleConfig, total_tokens: int, prefix: str = "optim") -> None:
    """Refuse a tail that the run ends before, which would be ignored without a word.

    Raises:
        ValueError: names both values.
    """
    start = schedule.decay_start_tokens
    if start >= total_tokens and ScheduleKind(schedule.kind) is not ScheduleKind.constant:
        raise ConfigError(
            f"{prefix}.schedule.decay_start_tokens={start} must be below the run's {total_tokens}"
            " tokens"
        )


def _progress(tokens: int, start: float, end: int) -> float:
    if tokens < start:
        return 0.0
    return 1.0 if tokens >= end else (tokens - start) / (end - start)
