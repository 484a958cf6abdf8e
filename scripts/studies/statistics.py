"""The statistics of a study: paired Student's t, its noise floor, and steps to a given loss.

Nothing here knows runs or files. Student's distribution is scipy's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from scipy.special import stdtr, stdtrit


class Finding(StrEnum):
    """What a comparison says of an arm's loss beside the baseline's."""

    below = "below"
    above = "above"
    none = "no verdict"


@dataclass(frozen=True)
class Paired:
    """Differences of two arms over the seeds that both have.

    Attributes:
        differences: arm minus baseline, by seed.
        mean: of them.
        deviation: of one difference; sample standard deviation.
        half_width: of the mean's two-sided confidence interval at 1 - level.
        p: two-sided, of the mean being 0.
    """

    differences: Mapping[int, float]
    mean: float
    deviation: float
    half_width: float
    p: float


def paired(arm: Mapping[int, float], baseline: Mapping[int, float], level: float) -> Paired | None:
    """Student's t on paired differences; None with fewer than two finite pairs.

    Args:
        arm: seed -> loss.
        baseline: seed -> loss.
        level: of the test, a fraction.
    """
    both = {seed: arm[seed] - baseline[seed] for seed in sorted(arm.keys() & baseline.keys())}
    both = {seed: value for seed, value in both.items() if math.isfinite(value)}
    n = len(both)
    if n < 2:
        return None
    mean, deviation = statistics.fmean(both.values()), statistics.stdev(both.values())
    error = deviation / math.sqrt(n)
    half_width = t_quantile(1 - level / 2, n - 1) * error
    if error == 0:
        return Paired(both, mean, deviation, half_width, 1.0 if mean == 0 else 0.0)
    return Paired(both, mean, deviation, half_width, t_two_sided(mean / error, n - 1))


def noise_floor(again: Paired, pairs: int, level: float) -> float:
    """Smallest mean difference of ``pairs`` pairs that equal arms would not show by themselves.

    Args:
        again: an A/A pair. Its true mean is 0, so its spread is taken about 0.
        pairs: of the comparison that is judged.
        level: of the test, a fraction.
    """
    values = again.differences.values()
    spread = math.sqrt(sum(value * value for value in values) / len(values))
    return t_quantile(1 - level / 2, len(values)) * spread / math.sqrt(pairs)


def judge(test: Paired, level: float, floor: float = 0.0) -> Finding:
    """A verdict needs both: a significant mean, and one above the noise floor."""
    if test.p >= level or abs(test.mean) <= floor:
        return Finding.none
    return Finding.below if test.mean < 0 else Finding.above


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: p values that hold for the whole family of comparisons."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


@dataclass(frozen=True)
class Crossing:
    """Where a falling curve meets a loss.

    Attributes:
        steps: at the crossing, or the first or last measured where it lies outside.
        bound: ``""``, ``"<"`` (already below at the first point) or ``">"`` (not yet at the last).
    """

    steps: float
    bound: str = ""


def steps_to_reach(curve: Mapping[int, float], target: float) -> Crossing:
    """First steps at which a curve is at or below ``target``; linear in log(steps) between points.

    Args:
        curve: steps -> loss, at least one point.
        target: the loss to reach.
    """
    steps = sorted(curve)
    if curve[steps[0]] <= target:
        return Crossing(steps[0], "" if curve[steps[0]] == target else "<")
    for before, after in pairwise(steps):
        high, low = curve[before], curve[after]
        if low <= target:
            part = (high - target) / (high - low)
            return Crossing(before * (after / before) ** part)
    return Crossing(steps[-1], ">")


def extrapolate(points: Mapping[float, float], at: float) -> float:
    """The power law through points (least squares in logarithms), further along.

    Args:
        points: x -> y, both above 0, at least two.
        at: an x.
    """
    x, y = ([math.log(v) for v in values] for values in (points.keys(), points.values()))
    middle, level = statistics.fmean(x), statistics.fmean(y)
    steepness = sum((a - middle) * b for a, b in zip(x, y, strict=True))
    slope = steepness / sum((a - middle) ** 2 for a in x)
    return math.exp(level + slope * (math.log(at) - middle))


@dataclass(frozen=True)
class Spread:
    """A mean with its uncertainty.

    Attributes:
        mean: of the values.
        deviation: of one value; 0 of a single one.
        half_width: of the mean's two-sided confidence interval; infinite of a single value.
    """

    mean: float
    deviation: float
    half_width: float


def spread(values: Sequence[float], level: float) -> Spread:
    """Mean, sample deviation and confidence interval by Student's t."""
    n = len(values)
    if n < 2:
        return Spread(values[0] if values else math.nan, 0.0, math.inf)
    deviation = statistics.stdev(values)
    half_width = t_quantile(1 - level / 2, n - 1) * deviation / math.sqrt(n)
    return Spread(statistics.fmean(values), deviation, half_width)


# ---- Student's t ---------------------------------------------------------------------------------
def t_two_sided(t: float, degrees: int) -> float:
    """Probability that |T| exceeds ``|t|`` under Student's distribution."""
    return float(2 * stdtr(degrees, -abs(t)))


def t_quantile(probability: float, degrees: int) -> float:
    """Value below which Student's distribution lies with this probability."""
    return float(stdtrit(degrees, probability))
