"""What a run will do, in numbers that follow from its config and its data; nothing is measured.

FLOPs are the model's own (``model/flops.py``, forward and backward): what is recomputed or padded
is not counted. So a share of a device's rate that is taken for a forecast is the MFU of the run.
"""

from __future__ import annotations

from collections.abc import Iterator

from model.flops import training_flops
from train.config.schema import RunConfig
from train.stages import Stage, StagePlan, loss_weights


def flops_per_token(run: RunConfig, stage: Stage) -> float:
    """FLOPs of forward and backward per position of a stage, before the learning rate decays."""
    weights = loss_weights(stage, run.train, decaying=False)
    phase = stage.indexer_phase.value
    return training_flops(
        run.model, stage.seq_len, phase, indexer_loss=weights.indexer > 0, mtp=weights.mtp > 0
    ).total


def stretches(plan: StagePlan, start: int = 0) -> Iterator[tuple[Stage, int]]:
    """The stages that are reached behind a position, each with the tokens trained in it.

    A step belongs to the stage in which it begins, also with the tokens behind that stage's end.

    Args:
        plan: of the run.
        start: tokens that are done.
    """
    begin = 0
    for stage in plan.reached():
        end = plan.tokens_at(min(plan.steps, plan.step_at(stage.until_tokens)))
        if end > max(start, begin):
            yield stage, end - max(start, begin)
        begin = end


def run_flops(run: RunConfig, plan: StagePlan, start: int = 0) -> float:
    """FLOPs of a run from a position to its end; arguments as of :func:`stretches`."""
    return sum(tokens * flops_per_token(run, stage) for stage, tokens in stretches(plan, start))


def quantity(value: float, digits: int = 3) -> str:
    """A number with the prefix that its size asks for: 5,512,345 is ``5.51 M``.

    Args:
        value: what is counted.
        digits: that count.
    """
    for factor, prefix in _PREFIXES:
        if abs(value) >= factor * (1 - 0.5 * 10**-digits):
            return f"{_digits(value / factor, digits)} {prefix}".rstrip()
    return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Seconds in the units that one would say."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    days = seconds / 86400
    return f"{_digits(days, 3)} days" if days < 3 * 365 else f"{days / 365:,.0f} years"


_PREFIXES = tuple((1000.0**n, prefix) for n, prefix in zip(
    range(8, -1, -1), ["Y", "Z", "E", "P", "T", "G", "M", "k", ""], strict=True
))  # fmt: skip


def _digits(value: float, digits: int) -> str:
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 1
    return f"{value:,.{max(0, digits - whole)}f}"
