"""A scaling law: loss over training FLOPs, ``L(C) = E + A (C / C0)^-alpha``, with its uncertainty.

``C0`` is the geometric mean of the points, so that A is the reducible loss there. For a given alpha
the rest is a linear least-squares fit, so alpha is found on a grid, nothing can get stuck, and
thousands of refits cost a moment. The uncertainty is that of the seeds alone: losses are drawn
again about the measured means with the pooled deviation of the seeds, and each draw is fitted. It
says nothing of a law that does not hold; so the last point is also predicted from the others.
"""

# Legend: R draws, P points, G values of alpha on the grid
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scripts.studies.sequential import Array

_ALPHAS = np.geomspace(0.01, 1.0, 600)
_DRAWS = 2000  # refits behind an interval


@dataclass(frozen=True)
class Estimated:
    """A number with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        irreducible: E, nats per token.
        reducible: A, nats per token at ``centre``.
        exponent: alpha.
        centre: C0, FLOPs.
        deviation: pooled over the points, of one seed; nats.
    """

    irreducible: Estimated
    reducible: Estimated
    exponent: Estimated
    centre: float
    deviation: float

    def loss(self, flops: float) -> float:
        """What the law says for a run of so many FLOPs."""
        away = (flops / self.centre) ** -self.exponent.value
        return self.irreducible.value + self.reducible.value * away


@dataclass(frozen=True)
class Prediction:
    """A point that the fit did not see.

    Attributes:
        flops: of its runs.
        predicted: mean loss of its seeds, with the interval in which it should lie.
        measured: that mean.
    """

    flops: float
    predicted: Estimated
    measured: float

    @property
    def holds(self) -> bool:
        """Whether the measured loss lies inside."""
        return self.predicted.low <= self.measured <= self.predicted.high


def fit_law(points: Mapping[float, Sequence[float]], level: float, draws: int = _DRAWS) -> Law:
    """Fit a law.

    Args:
        points: FLOPs of a run -> final losses of its seeds; at least four, each with as many seeds
            as two or more, all finite.
        level: of the intervals, a fraction.
        draws: refits behind an interval.

    Raises:
        ValueError: fewer points or seeds.
    """
    flops, means, errors, deviation, degrees = _summary(points)
    centre = float(np.exp(np.log(flops).mean()))
    best = _fit(means[None], flops / centre)
    many = _fit(_draw(means, errors, degrees, draws), flops / centre)
    irreducible, reducible, exponent = (
        _interval(float(one[0]), drawn, level) for one, drawn in zip(best, many, strict=True)
    )
    return Law(irreducible, reducible, exponent, centre, deviation)


def predict_last(
    points: Mapping[float, Sequence[float]], level: float, draws: int = _DRAWS
) -> Prediction:
    """The costliest point, predicted from the others; arguments as :func:`fit_law`, five points."""
    last = max(points)
    rest = {flops: losses for flops, losses in points.items() if flops != last}
    flops, means, errors, deviation, degrees = _summary(rest)
    centre = float(np.exp(np.log(flops).mean()))
    one, many = (
        _fit(y, flops / centre) for y in (means[None], _draw(means, errors, degrees, draws))
    )
    away = last / centre
    said = [e + a * away**-alpha for e, a, alpha in (one, many)]
    generator = np.random.default_rng(41)  # the mean of the new point's own seeds varies too
    own = deviation / math.sqrt(len(points[last]))
    noisy = said[1] + own * generator.standard_t(degrees, len(said[1]))
    return Prediction(
        last, _interval(float(said[0][0]), noisy, level), float(np.mean(points[last]))
    )


def _summary(
    points: Mapping[float, Sequence[float]],
) -> tuple[Array, Array, Array, float, int]:
    """FLOPs, means, their standard errors, the pooled deviation and its degrees of freedom."""
    flops = sorted(points)
    if len(flops) < 4 or min(len(points[c]) for c in flops) < 2:
        raise ValueError(
            f"a law needs 4 points of 2 seeds, not {[len(v) for v in points.values()]}"
        )
    degrees = sum(len(points[c]) - 1 for c in flops)
    squares = sum(float(np.var(points[c], ddof=1)) * (len(points[c]) - 1) for c in flops)
    deviation = math.sqrt(squares / degrees)
    means = np.array([float(np.mean(points[c])) for c in flops])
    errors = np.array([deviation / math.sqrt(len(points[c])) for c in flops])
    return np.array(flops), means, errors, deviation, degrees


def _draw(means: Array, errors: Array, degrees: int, draws: int) -> Array:
    """Losses as other seeds might have given them; wider where few seeds say how wide."""
    generator = np.random.default_rng(31)
    normal_RP = generator.standard_normal((draws, len(means)))
    wider_R1 = np.sqrt(degrees / generator.chisquare(degrees, (draws, 1)))
    return means + errors * normal_RP * wider_R1


def _fit(loss_RP: Array, x_P: Array) -> tuple[Array, Array, Array]:
    """E, A and alpha of each row by least squares; neither E nor A below 0."""
    best_R = np.full(len(loss_RP), np.inf)
    found = np.zeros((3, len(loss_RP)))
    for alpha in _ALPHAS:
        basis_P = x_P**-alpha
        centred_P = basis_P - basis_P.mean()
        a_R = (loss_RP @ centred_P) / (centred_P @ centred_P)
        e_R = loss_RP.mean(-1) - a_R * basis_P.mean()
        through_R = (loss_RP @ basis_P) / (basis_P @ basis_P)  # the best A where E is 0
        a_R, e_R = np.where(e_R < 0, through_R, a_R), np.maximum(e_R, 0)
        flat_R = a_R < 0
        a_R, e_R = np.where(flat_R, 0, a_R), np.where(flat_R, loss_RP.mean(-1), e_R)
        residual_R = ((loss_RP - e_R[:, None] - a_R[:, None] * basis_P) ** 2).sum(-1)
        better_R = residual_R < best_R
        best_R = np.where(better_R, residual_R, best_R)
        found = np.where(better_R, np.stack([e_R, a_R, np.full_like(e_R, alpha)]), found)
    return found[0], found[1], found[2]


def _interval(value: float, draws: Array, level: float) -> Estimated:
    low, high = np.quantile(draws, [level / 2, 1 - level / 2])
    return Estimated(value, float(low), float(high))
