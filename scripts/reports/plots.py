"""Figures of a study: curves with bands, learning rates, paired differences, steps to a loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_hex
from matplotlib.figure import Figure

from scripts.studies.law import Law, Prediction
from scripts.studies.results import ArmResult, CatchUp, Rung, StudyResults, curve_of
from scripts.studies.statistics import Paired
from train.record.ranking import BITS, LOSS, Group, Ranking

_COLOURS = (
    "#1f5fbf", "#d1495b", "#2e8b57", "#e08e0b", "#7b4fa6", "#5b6770", "#12a4b5", "#8a5a2b",
    "#d957b0", "#8f9a00",
)  # fmt: skip
_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Line:
    """How one of several things is drawn."""

    colour: str
    style: str


def lines(count: int) -> list[Line]:
    """Of each of ``count`` things, no two alike."""
    if count <= len(_COLOURS) * len(_STYLES):
        return [Line(colour, style) for style in _STYLES for colour in _COLOURS][:count]
    hues = [
        to_hex(tuple(hsv_to_rgb((i / count, 0.9, 0.5 + 0.35 * (i % 2))).tolist()))
        for i in range(count)
    ]
    return [Line(hue, _STYLES[i % len(_STYLES)]) for i, hue in enumerate(hues)]


def _axes(title: str, x: str, y: str, height: float = 4.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def draw_curves(arms: Iterable[ArmResult]) -> Figure:
    """Validation loss over steps: mean and range over seeds, training loss behind it."""
    figure, axes = _axes("mean over seeds, band: lowest to highest seed", "step", "nats per token")
    arms = [arm for arm in arms if arm.trained]
    for line, arm in zip(lines(len(arms)), arms, strict=True):
        colour, style = line.colour, line.style
        train = _by_step(
            {r["step"]: r["loss"] for r in run.records if r["loss"] is not None}
            for run in arm.trained
        )
        steps, means = list(train), [statistics.fmean(v) for v in train.values()]
        axes.plot(steps, _smooth(means), color=colour, alpha=0.35, linewidth=1)
        points = _by_step(curve_of(run) for run in arm.trained)
        steps = list(points)
        means = [statistics.fmean(v) for v in points.values()]
        axes.plot(steps, means, color=colour, linestyle=style, marker="o", markersize=4,
                  label=arm.name)  # fmt: skip
        lowest, highest = ([pick(v) for v in points.values()] for pick in (min, max))
        axes.fill_between(steps, lowest, highest, color=colour, alpha=0.2)
    axes.plot([], [], color="grey", alpha=0.5, linewidth=1, label="training loss, smoothed")
    drawn = (float(v) for line in axes.lines for v in np.asarray(line.get_ydata()))
    finite = [v for v in drawn if math.isfinite(v)]
    if finite:
        axes.set_ylim(min(finite) - 0.05, statistics.quantiles(finite, n=20)[-2])
    axes.legend()
    return figure


def draw_groups(ranking: Ranking) -> Figure:
    """Each configuration over trained tokens: mean of its seeds, a band from lowest to highest.

    Dots are validation. Training losses stand behind them where they compare.
    """
    compare = not ranking.unlike
    measure = LOSS if compare else BITS
    groups = ranking.groups
    unit = "nats per token" if compare else "bits per byte"
    title = "dots: validation; band: lowest to highest seed"
    title += "; line: training loss, smoothed" if compare else ""
    figure, axes = _axes(title, "tokens", unit, height=4.2 + 0.12 * max(0, len(groups) - 6))
    for line, group in zip(lines(len(groups)), groups, strict=True):
        label = _short(group.label) + " (other text)" * (group.text != groups[0].text)
        style: dict[str, Any] = {"color": line.colour, "linestyle": line.style}
        axes.plot([], [], **style, marker="o", markersize=4, label=label)
        if compare:
            _band(axes, _points(group, "loss"), style, smooth=True)
        _band(axes, _points(group, measure), style | {"marker": "o", "markersize": 4})
    axes.legend(fontsize="small", ncols=1 + len(groups) // 20)
    return figure


def _points(group: Group, field: str) -> dict[int, list[float]]:
    """Tokens -> values of all seeds that have them."""
    return _by_step(
        {r["tokens"]: r[field] for r in run.records if r.get(field) is not None and "tokens" in r}
        for run in group.runs
    )


def _band(
    axes: Axes, points: Mapping[int, list[float]], style: Mapping[str, Any], smooth: bool = False
) -> None:
    if not points:
        return
    means = [statistics.fmean(v) for v in points.values()]
    axes.plot(list(points), _smooth(means) if smooth else means,
              **({**style, "alpha": 0.5, "linewidth": 1} if smooth else style))  # fmt: skip
    lowest, highest = ([pick(v) for v in points.values()] for pick in (min, max))
    if not smooth and any(map(len, points.values())) and lowest != highest:
        axes.fill_between(list(points), lowest, highest, color=style["color"], alpha=0.2)


def _short(label: str) -> str:
    return label if len(label) <= 60 else f"{label[:57]}..."


def draw_search(arms: Iterable[ArmResult], steps: int) -> Figure:
    """Validation loss of the search over the learning rate; the chosen one is ringed."""
    figure, axes = _axes(f"search, {steps} steps, one seed", "learning rate", "validation loss")
    arms = list(arms)
    for line, arm in zip(lines(len(arms)), arms, strict=True):
        colour = line.colour
        tried = {rate: loss for rate, loss in arm.choice.tried.items() if math.isfinite(loss)}
        axes.plot(list(tried), list(tried.values()), color=colour, linestyle=line.style, marker="o",
                  label=arm.name)  # fmt: skip
        best = arm.choice.best
        if best in tried:
            axes.plot([best], [tried[best]], "o", markersize=14, mfc="none", color=colour)
    axes.set_xscale("log")
    axes.legend()
    return figure


def draw_differences(results: StudyResults) -> Figure:
    """Each seed's difference to the baseline, the mean and its confidence interval."""
    tests = [(c.arm, c.test) for c in results.comparisons]
    rows: list[tuple[str, Paired]] = [(name, test) for name, test in tests if test is not None]
    if results.again_test is not None:
        rows.append(("A/A", results.again_test))
    figure, axes = _axes(
        f"paired by seed; bar: {1 - results.study.level:.0%} interval",
        f"validation loss minus that of {results.study.baseline} (nats per token)",
        "",
        height=1.6 + 0.7 * len(rows),
    )
    drawn = lines(len(rows) + 1)[1:]  # the first is the baseline's
    for place, (name, test) in enumerate(rows):
        colour = "grey" if name == "A/A" else drawn[place].colour
        axes.plot(list(test.differences.values()), [place] * len(test.differences), "o",
                  color=colour, alpha=0.5, markersize=5)  # fmt: skip
        axes.errorbar(test.mean, place, xerr=test.half_width, fmt="D", color=colour, capsize=4)
    axes.axvline(0, color="black", linewidth=1)
    if results.floor:
        axes.axvspan(-results.floor, results.floor, color="grey", alpha=0.15, label="noise floor")
        axes.legend()
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    return figure


def draw_catch_up(found: CatchUp, arm: ArmResult, to: ArmResult) -> Figure:
    """Final losses of runs of several lengths, beside the loss to reach."""
    figure, axes = _axes("final loss of runs with their own decay", "steps of the run", "nats")
    points = {n: list(losses.values()) for n, losses in found.final.items() if losses}
    means = [statistics.fmean(v) for v in points.values()]
    axes.plot(list(points), means, color=_COLOURS[0], marker="o", label=arm.name)
    for steps, losses in points.items():
        axes.plot([steps] * len(losses), losses, ".", color=_COLOURS[0], alpha=0.5)
    target = list(found.target.values())
    axes.axhline(statistics.fmean(target), color=_COLOURS[1], label=f"{to.name}, full length")
    axes.axhspan(min(target), max(target), color=_COLOURS[1], alpha=0.15)
    axes.legend()
    return figure


def draw_ladder(rungs: Sequence[Rung]) -> Figure:
    """Ratio of steps to equal loss over the tokens of a run; each seed, and the mean."""
    figure, axes = _axes("each seed, and their mean", "tokens of a run", "ratio of steps")
    for rung in rungs:
        ratios = list(rung.ratios.values())
        axes.plot([rung.tokens] * len(ratios), ratios, "o", color=_COLOURS[0], alpha=0.5)
    means = [statistics.fmean(rung.ratios.values()) for rung in rungs]
    axes.plot([rung.tokens for rung in rungs], means, color=_COLOURS[0], marker="D")
    axes.set_xscale("log")
    return figure


def draw_law(
    law: Law, points: Mapping[float, Sequence[float]], predicted: Prediction | None
) -> Figure:
    """Final losses over a run's FLOPs, the law through them, and the point that it predicts."""
    figure, axes = _axes("final loss of each seed", "training FLOPs of a run", "nats per token")
    for flops, losses in points.items():
        axes.plot([flops] * len(losses), losses, "o", color=_COLOURS[0], alpha=0.6)
    line = np.geomspace(min(points), 3 * max(points), 100)
    label = f"exponent {law.exponent.value:.3g}"
    axes.plot(line, [law.loss(float(x)) for x in line], color=_COLOURS[0], label=label)
    if predicted is not None:
        said = predicted.predicted
        bar = [[said.value - said.low], [said.high - said.value]]
        axes.errorbar(predicted.flops, said.value, yerr=bar, fmt="x", capsize=4,
                      color=_COLOURS[1], label="predicted from the others")  # fmt: skip
    axes.set_xscale("log")
    axes.legend()
    return figure


def _by_step(curves: Iterable[Mapping[int, float]]) -> dict[int, list[float]]:
    """Step -> values of all curves that have it, in order of steps."""
    found: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in curve.items():
            found.setdefault(step, []).append(value)
    return dict(sorted(found.items()))


def _smooth(values: Sequence[float], keep: float = 0.8) -> list[float]:
    """Exponential average, started at the first value."""
    out: list[float] = []
    for value in values:
        out.append(value if not out else keep * out[-1] + (1 - keep) * value)
    return out
