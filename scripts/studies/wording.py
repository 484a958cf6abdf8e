"""Numbers of a study as a report writes them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from scripts.studies.law import Estimated
from scripts.studies.statistics import Crossing, Spread, spread


def signed(value: float) -> str:
    """A difference of losses."""
    return f"{value:+.4f}"


def loss_text(value: float) -> str:
    """A loss, or that it diverged."""
    return f"{value:.4f}" if math.isfinite(value) else "diverged"


def listed(values: Iterable[Any]) -> str:
    """Values with commas."""
    return ", ".join(str(value) for value in values)


def estimated(number: Estimated) -> str:
    """A number with its interval."""
    return f"{number.value:.4g} ({number.low:.4g} to {number.high:.4g})"


def ratios_of(crossings: dict[int, Crossing] | Any, steps: int) -> Spread:
    """Steps to the other loss as shares of a run, over seeds."""
    return spread([crossing.steps / steps for crossing in crossings.values()], 0.05)


def ratio_text(crossings: Any, ratios: Spread) -> str:
    """Such a ratio, and whether it is a bound only."""
    bounds = {c.bound for c in crossings.values() if c.bound}
    text = f"{ratios.mean:.3f}"
    if len(crossings) > 1 and ratios.deviation:
        text += f" +- {ratios.half_width:.3f} (sigma {ratios.deviation:.3f})"
    if bounds == {"<"}:
        return f"at most {text}"
    if bounds == {">"}:
        return f"at least {text}"
    return f"{text}, some seeds outside the measured range" if bounds else text
