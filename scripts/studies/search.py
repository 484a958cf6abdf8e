"""What a search has found: a learning rate that lies between others, and the keys behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from scripts.studies.cells import Cell


@dataclass(frozen=True)
class Choice:
    """What the search found for an arm.

    Attributes:
        tried: learning rate -> validation loss of the search's run (the mean, where every seed
            searches), ascending; only finished ones.
        missing: learning rates still to run, given what is known.
        best: the chosen one; None while runs are missing or where there is no answer.
        reason: why there is no answer.
    """

    tried: Mapping[float, float]
    missing: tuple[float, ...] = ()
    best: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Tuning:
    """What the search found behind the learning rate.

    Attributes:
        settings: the best overrides so far.
        tried: overrides -> validation loss of the search's run.
        missing: runs to do next; later keys depend on them.
    """

    settings: tuple[str, ...] = ()
    tried: Mapping[tuple[str, ...], float] = field(default_factory=dict)
    missing: tuple[Cell, ...] = ()


def choose(
    grid: Sequence[float],
    loss_of: Mapping[float, float],
    factor: float,
    extensions: int,
    beside: int = 1,
) -> Choice:
    """Choose a learning rate that lies between others, extending the grid where the edge is best.

    Args:
        grid: ascending.
        loss_of: validation loss of what has been run; infinite for a run that diverged.
        factor: between a new learning rate and the edge.
        extensions: how many may be added.
        beside: how many rates should lie on each side of the best; one must.
    """
    rates = list(grid)
    while True:
        tried = {rate: loss_of[rate] for rate in rates if rate in loss_of}
        missing = tuple(rate for rate in rates if rate not in loss_of)
        if missing:
            return Choice(tried, missing)
        best = min(rates, key=lambda rate: loss_of[rate])
        if not math.isfinite(loss_of[best]):
            return Choice(tried, reason="every run of the search diverged")
        below, above = rates.index(best), len(rates) - 1 - rates.index(best)
        used_up = len(rates) - len(grid) >= extensions
        if min(below, above) >= (1 if used_up else beside):
            return Choice(tried, best=best)
        if used_up:
            side = "lowest" if best == rates[0] else "highest"
            return Choice(
                tried,
                reason=f"the best learning rate, {best:g}, is the {side} of {len(rates)} tried"
                f" ({rates[0]:g} to {rates[-1]:g})",
            )
        new = rates[0] / factor if below < above else rates[-1] * factor
        rates = sorted([*rates, float(f"{new:.6g}")])
