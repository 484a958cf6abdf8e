"""Whether the best learning rate stays where it is while a model grows: analysis, figure, text.

Every rate of a grid trains on every seed, so that the optimum has an error. Losses near the lowest
are fitted by a parabola in log(rate), the seeds' levels apart; its vertex is the best rate.
Intervals come from draws of the fitted numbers (normal, wider where few residuals say how wide). A
draw whose parabola has no lowest point, or one beyond the fitted rates, may go up to a factor of 2
beyond them; where more than one draw in two hundred has no lowest point, all may: what is flat says
nothing. They are intervals of the seeds and of this form, for one corpus and the given lengths.
Of a fit that is lowest outside its rates only the side is known: that gives no verdict, nor does an
arm whose search has not ended.
"""

# Legend: N runs (rates times seeds), K fitted numbers, R draws
from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from matplotlib.figure import Figure

from scripts.reports.document import Picture, ReportPart, Table
from scripts.reports.plots import lines
from scripts.studies.law import Estimated
from scripts.studies.results import ArmResult, StudyResults
from scripts.studies.sequential import Array

_DRAWS = 4000
_FLAT = 0.005  # share of draws without a valley from which on there is none
_NEAR = 2.01  # rates within this factor of the lowest mean are fitted


class Transfer(StrEnum):
    """Whether two best rates lie within the stated factor of each other."""

    holds = "within"  # the whole interval of their ratio is
    refused = "not within"  # none of it is
    open = "no verdict, its interval reaches over"
    outside = "no verdict, a fit is lowest outside its rates"


@dataclass(frozen=True)
class Optimum:
    """The best learning rate of one arm.

    Attributes:
        rate: of the vertex, with its interval.
        curvature: nats for a factor of 2 away from it; 0 where the fit is not a valley.
        deviation: of a loss about the fit, nats.
        fitted: rates that the fit saw.
        log_draws: log2 of the vertex in each draw.
        inside: whether the fit is a valley whose vertex lies among the fitted rates.
    """

    rate: Estimated
    curvature: float
    deviation: float
    fitted: tuple[float, ...]
    log_draws: Array
    inside: bool


@dataclass(frozen=True)
class Step:
    """From the smallest to the largest of the arms that differ in one thing.

    Attributes:
        along: what grows.
        arms: their names, by size.
        ratio: best rate of the first over that of the last.
        verdict: by the study's factor.
    """

    along: str
    arms: tuple[str, ...]
    ratio: Estimated
    verdict: Transfer


def find_optimum(
    losses: Mapping[float, Mapping[int, float]], level: float, draws: int = _DRAWS, stream: int = 0
) -> Optimum | None:
    """Fit the valley of an arm; None with fewer than three rates that all seeds finished.

    Args:
        losses: rate -> seed -> final loss. A rate at which a run diverged is left out.
        level: of the interval, a fraction.
        draws: behind the interval.
        stream: arms whose draws are held against each other need streams of their own.
    """
    seeds = sorted({seed for by_seed in losses.values() for seed in by_seed})
    whole = {
        rate: [by_seed[seed] for seed in seeds]
        for rate, by_seed in sorted(losses.items())
        if len(by_seed) == len(seeds) and all(map(math.isfinite, by_seed.values()))
    }
    if len(whole) < 3 or len(seeds) < 2:
        return None
    lowest = min(whole, key=lambda rate: statistics.fmean(whole[rate]))
    rates = [r for r in whole if max(r / lowest, lowest / r) <= _NEAR]
    if len(rates) < 3:  # a coarse grid: the lowest and its neighbours
        at = min(max(list(whole).index(lowest), 1), len(whole) - 2)
        rates = list(whole)[at - 1 : at + 2]
    x_N = np.repeat(np.log2(rates) - math.log2(lowest), len(seeds))
    y_N = np.array([loss for rate in rates for loss in whole[rate]])
    level_NS = np.tile(np.eye(len(seeds)), (len(rates), 1))
    basis_NK = np.column_stack([x_N, x_N**2, level_NS])
    fit_K: Array = np.linalg.lstsq(basis_NK, y_N, rcond=None)[0].astype(np.float64)
    degrees = len(y_N) - basis_NK.shape[1]
    variance = float(((y_N - basis_NK @ fit_K) ** 2).sum()) / degrees
    spread_22 = variance * np.linalg.inv(basis_NK.T @ basis_NK)[:2, :2]
    generator = np.random.default_rng([73, stream])
    normal_R2 = generator.standard_normal((draws, 2)) @ _root(spread_22).T
    wider_R1 = np.sqrt(degrees / generator.chisquare(degrees, (draws, 1)))
    low, high = float(x_N.min()), float(x_N.max())
    drawn_R2 = fit_K[:2] + normal_R2 * wider_R1
    many_R = _vertex(drawn_R2, low - 1, high + 1)
    if np.mean(drawn_R2[:, 1] <= 0) > _FLAT:
        many_R = generator.uniform(low - 1, high + 1, draws)
    best = float(_vertex(fit_K[None, :2], low, high)[0])
    ends = np.quantile(many_R, [level / 2, 1 - level / 2])
    found = (lowest * 2.0**at for at in (best, *map(float, ends)))
    curvature = max(0.0, float(fit_K[1]))
    at_R = many_R + math.log2(lowest)
    inside = low <= _vertex(fit_K[None, :2], -math.inf, math.inf)[0] <= high
    return Optimum(
        Estimated(*found), curvature, math.sqrt(variance), tuple(rates), at_R, bool(inside)
    )


def _root(spread_22: Array) -> Array:
    """A matrix whose product with its transpose is a covariance; of none, zeros."""
    values_2, vectors_22 = np.linalg.eigh(spread_22)
    return vectors_22 * np.sqrt(np.maximum(values_2, 0))


def _vertex(ab_R2: Array, low: float, high: float) -> Array:
    """Where ``a x + b x^2`` is lowest between two ends; the end to which it falls if no valley."""
    a_R, b_R = ab_R2.T
    with np.errstate(divide="ignore", invalid="ignore"):
        valley_R = np.clip(-a_R / (2 * b_R), low, high)
    return np.where(b_R > 0, valley_R, np.where(a_R > 0, low, high))


def optima(results: StudyResults) -> dict[str, Optimum]:
    """Arm -> its best rate, of the arms whose search has ended inside its grid."""
    level = results.study.level
    found = {
        name: find_optimum(_losses(arm), level, stream=i)
        for i, (name, arm) in enumerate(sorted(results.arms.items()))
        if arm.choice.best is not None
    }
    return {name: one for name, one in found.items() if one is not None}


def transfers(results: StudyResults, found: Mapping[str, Optimum]) -> list[Step]:
    """One step for each thing that grows, where both ends have their best rate."""
    ask, steps = results.study.transfer, []
    for along, names in ask.along.items():
        first, last = names[0], names[-1]
        if first in found and last in found:
            held = hold(found[first], found[last], results.study.level, ask.factor)
            steps.append(Step(along, tuple(names), *held))
    return steps


def hold(first: Optimum, last: Optimum, level: float, factor: float) -> tuple[Estimated, Transfer]:
    """The ratio of two best rates, and whether it lies within a factor."""
    log_R = first.log_draws - last.log_draws
    ends = np.quantile(log_R, [level / 2, 1 - level / 2])
    value = first.rate.value / last.rate.value
    ratio = Estimated(value, *(2.0 ** float(end) for end in ends))
    both = first.inside and last.inside
    return ratio, verdict_of(ratio, factor) if both else Transfer.outside


def verdict_of(ratio: Estimated, factor: float) -> Transfer:
    """The whole interval decides."""
    if 1 / factor <= ratio.low and ratio.high <= factor:
        return Transfer.holds
    if ratio.high < 1 / factor or ratio.low > factor:
        return Transfer.refused
    return Transfer.open


def _losses(arm: ArmResult) -> dict[float, dict[int, float]]:
    return {
        rate: {seed: run.val_loss for seed, run in runs.items()}
        for rate, runs in arm.searched.items()
    }


# ---- a report ------------------------------------------------------------------------------------
def transfer_line(results: StudyResults) -> str:
    """The answer in one line."""
    steps = transfers(results, optima(results))
    factor = results.study.transfer.factor
    return "; ".join(
        f"over {step.along} ({step.arms[0]} to {step.arms[-1]}) the best rates have the ratio"
        f" {_text(step.ratio)}: {_said(step.verdict, factor)}"
        for step in steps
    )


def _said(verdict: Transfer, factor: float) -> str:
    outside = verdict is Transfer.outside
    return verdict.value if outside else f"{verdict.value} a factor of {factor:g}"


def transfer_section(results: StudyResults) -> list[ReportPart]:
    """Best rates, their ratios, and the loss over the rate of every arm."""
    found, level = optima(results), results.study.level
    interval = f"({1 - level:.0%} interval)"
    rows = [
        [
            arm.name, f"{arm.parameters:,}", f"{arm.tokens:,}", _text(one.rate),
            f"{one.curvature:.4f}", f"{one.deviation:.4f}", _rates(one.fitted),
            f"{min(map(statistics.fmean, _finite(arm))):.4f}",
        ]
        for arm in results.arms.values()
        if (one := found.get(arm.name)) is not None
    ]  # fmt: skip
    head = ["arm", "parameters", "tokens", f"best rate {interval}", "nats a factor of 2 away",
            "sigma about the fit", "rates fitted", "lowest mean loss"]  # fmt: skip
    blocks: list[ReportPart] = [
        f"Every rate trains on every seed ({', '.join(map(str, results.study.seeds))}). Losses"
        " within a factor of 2 of the lowest mean are fitted by a parabola in log(rate), a level"
        " for each seed; the best rate is its vertex. A verdict asks the whole interval of the"
        f" ratio: inside a factor of {results.study.transfer.factor:g}, or outside. There is a"
        f" verdict for each thing that grows, each at its own level of {level:.0%}; arms in between"
        " are shown, not tested.",
        Table(head, rows),
    ]
    steps = [
        [step.along, ", ".join(step.arms), _text(step.ratio), step.verdict.value]
        for step in transfers(results, found)
    ]
    blocks.append(Table(["over", "arms", f"ratio, first to last {interval}", "verdict"], steps))
    if found:
        caption = "final loss over the learning rate; band: interval of the best rate"
        blocks.append(Picture("transfer", caption, draw_transfer(results, found)))
    return blocks


def _finite(arm: ArmResult) -> list[list[float]]:
    values = [list(by_seed.values()) for by_seed in _losses(arm).values()]
    return [v for v in values if v and all(map(math.isfinite, v))]


def _rates(rates: Sequence[float]) -> str:
    return f"{rates[0]:.3g} to {rates[-1]:.3g}"


def _text(number: Estimated) -> str:
    return f"{number.value:.3g} ({number.low:.3g} to {number.high:.3g})"


def draw_transfer(results: StudyResults, found: Mapping[str, Optimum]) -> Figure:
    """One panel for each thing that grows: seeds, their mean, and where the best rate lies."""
    along = results.study.transfer.along
    figure = Figure(figsize=(4.6 * len(along), 4.4), layout="constrained")
    panels = figure.subplots(1, len(along), squeeze=False)[0]
    for axes, (name, arms) in zip(panels, along.items(), strict=True):
        for line, arm in zip(lines(len(arms)), arms, strict=True):
            losses = sorted(_losses(results.arms[arm]).items())
            whole = {r: [*by.values()] for r, by in losses if all(map(math.isfinite, by.values()))}
            for rate, values in whole.items():
                axes.plot([rate] * len(values), values, ".", color=line.colour, alpha=0.5)
            means = [statistics.fmean(values) for values in whole.values()]
            axes.plot(list(whole), means, line.style, color=line.colour, label=arm)
            if arm in found:
                best = found[arm].rate
                axes.axvspan(best.low, best.high, color=line.colour, alpha=0.12)
                axes.axvline(best.value, color=line.colour, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_title(f"over {name}")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("nats per token")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure
