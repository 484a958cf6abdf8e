"""Verdicts at several looks: which seeds a study still needs, at an error rate that is kept.

After 3, 5, ... seeds each open arm is compared with the baseline by Student's t on paired
differences. Looking often would find differences that are none, so each look may spend a part of
the level only: ``level * (n / N) ** spending`` by the look at n of N seeds (Lan and DeMets 1983).
The t statistics of several looks share seeds; at few seeds no formula gives their joint
distribution, so critical values are quantiles of simulated ones. Several arms share the level by
Holm's steps, each step with the bounds of its own level (Maurer and Bretz 2013). An arm is stopped
when it has its verdict, when a run of it diverged, or when the seeds left would hardly bring a
verdict (predictive power; it only makes verdicts rarer). Student's t knows no units, so neither do
the bounds.

Every function works on many studies at once: the command decides one, the tests ten thousand.
"""

# Legend: R studies, A arms beside the baseline, N seeds, K looks
from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scripts.studies.statistics import t_quantile

Array = NDArray[np.float64]
_PATHS = 400_000  # simulated studies behind a critical value
_FUTURES = 20_000  # simulated continuations behind a predictive power


@dataclass(frozen=True)
class Design:
    """Looks and their bounds.

    Attributes:
        looks: seeds at each look, ascending.
        level: of all verdicts of a study together, a fraction.
        critical_KA: |t| that gives a verdict at a look while 1, 2, ... arms share the level.
        futile_K: |t| below which an arm is stopped.
    """

    looks: tuple[int, ...]
    level: float
    critical_KA: Array
    futile_K: Array


@functools.cache
def design(
    looks: tuple[int, ...], level: float, arms: int, spending: float, futility: float
) -> Design:
    """Bounds by simulation, the same at every call.

    Args:
        looks: seeds at each look, ascending, from 2.
        level: of the study's verdicts, two-sided, a fraction.
        arms: beside the baseline.
        spending: exponent; 1 spends the level evenly over the seeds, 3 hardly any of it early.
        futility: an arm is stopped whose predictive power is below this; 0: none is.
    """
    generator = np.random.default_rng(19)
    share_K = (np.array(looks) / looks[-1]) ** spending
    t_RK = np.abs(t_statistics(generator.standard_normal((_PATHS, looks[-1])), looks))
    critical_KA = np.stack([_critical(t_RK, looks, level / (a + 1), share_K) for a in range(arms)])
    critical_K = critical_KA[0]
    futile_K = np.array(
        [_futile(look, looks, critical_K, futility) for look in range(len(looks) - 1)] + [0.0]
    )
    return Design(looks, level, critical_KA.T, futile_K)


def t_statistics(x_N: Array, looks: tuple[int, ...]) -> Array:
    """Student's t of the first n values at each look; the last dim becomes K.

    Where all values are equal it is infinite, or 0 where they are 0.
    """
    found = []
    for n in looks:
        part = x_N[..., :n]
        mean, error = part.mean(-1), part.std(-1, ddof=1) / np.sqrt(n)
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(np.where(mean == 0, 0.0, mean / error))
    return np.stack(found, -1)


def _critical(t_RK: Array, looks: tuple[int, ...], level: float, share_K: Array) -> Array:
    """Bounds of one level: each look spends its part among the studies that are still open."""
    spent_K, paths = level * share_K, len(t_RK)
    bounds, crossed = [t_quantile(1 - spent_K[0] / 2, looks[0] - 1)], 0
    for look in range(len(looks)):
        if look:
            crossing = max(1, round(spent_K[look] * paths) - crossed)
            left = np.partition(t_RK[:, look], len(t_RK) - crossing)
            bounds.append(float(left[len(t_RK) - crossing]))
        keep = t_RK[:, look] < bounds[-1]
        crossed += int((~keep).sum())
        t_RK = t_RK[keep]
    return np.array(bounds)


def _futile(look: int, looks: tuple[int, ...], critical_K: Array, futility: float) -> float:
    """The |t| at which a later verdict has this predictive probability (bisection)."""
    low, high = 0.0, float(critical_K[look])
    if futility <= 0 or _predictive(low, look, looks, critical_K) >= futility:
        return 0.0
    for _ in range(20):
        middle = (low + high) / 2
        below = _predictive(middle, look, looks, critical_K) < futility
        low, high = (middle, high) if below else (low, middle)
    return low


def _predictive(t: float, look: int, looks: tuple[int, ...], critical_K: Array) -> float:
    """Probability of crossing at a later look, after ``t``, under a flat prior.

    The posterior of Student's t: sigma^2 is (n - 1) over a chi-squared, the mean normal about the
    observed one; the seeds to come are drawn from it.
    """
    n, generator = looks[look], np.random.default_rng(29)
    mean, s = t / np.sqrt(n), 1.0  # observed, in units of the observed deviation
    sigma_R = s * np.sqrt((n - 1) / generator.chisquare(n - 1, _FUTURES))
    mu_R = mean + sigma_R / np.sqrt(n) * generator.standard_normal(_FUTURES)
    coming = generator.standard_normal((_FUTURES, looks[-1] - n))
    coming = mu_R[:, None] + sigma_R[:, None] * coming
    crossed = np.zeros(_FUTURES, bool)
    for later in range(look + 1, len(looks)):
        total = looks[later]
        new = coming[:, : total - n]
        mean_R = (n * mean + new.sum(-1)) / total
        squares_R = (n - 1) * s**2 + n * mean**2 + (new**2).sum(-1) - total * mean_R**2
        t_R = mean_R / np.sqrt(squares_R / (total - 1) / total)
        crossed |= np.abs(t_R) >= critical_K[later]
    return float(crossed.mean())


# ---- decisions -----------------------------------------------------------------------------------
@dataclass
class Standing:
    """Where each arm of each study stands.

    Attributes:
        sign_RA: +1 above the baseline, -1 below, 0 no verdict (yet).
        open_RA: whether it gets seeds beyond the last look.
        lost_RA: whether a run of it, or of its baseline, diverged.
        seeds_RA: that it was judged on.
        needed_RA: |t| that a verdict needed there; infinite before the first look.
    """

    sign_RA: NDArray[np.int8]
    open_RA: NDArray[np.bool_]
    lost_RA: NDArray[np.bool_]
    seeds_RA: NDArray[np.int64]
    needed_RA: Array

    @classmethod
    def fresh(cls, studies: int, arms: int) -> Standing:
        """Before the first look."""
        shape = (studies, arms)
        return cls(
            np.zeros(shape, np.int8), np.ones(shape, bool), np.zeros(shape, bool),
            np.zeros(shape, np.int64), np.full(shape, np.inf),
        )  # fmt: skip


def take_look(
    bounds: Design, look: int, standing: Standing, x_RAN: Array, again_RN: Array | None
) -> None:
    """Judge the open arms on the first seeds; changes ``standing``.

    Args:
        bounds: of the study.
        look: which one, from 0.
        standing: of all arms before it.
        x_RAN: loss of an arm minus the baseline's, by seed; closed arms may hold anything.
        again_RN: the same of the A/A pair; None: a verdict needs no noise floor.
    """
    n = bounds.looks[look]
    part = x_RAN[..., :n]
    finite_RA = np.asarray(np.isfinite(part).all(-1))
    part = np.where(finite_RA[..., None], part, 0.0)
    size_RA = np.abs(t_statistics(part, (n,))[..., 0])
    mean_RA = part.mean(-1)
    floor_R1 = np.zeros((len(part), 1))
    if again_RN is not None:  # as statistics.noise_floor
        rms_R = np.sqrt((again_RN[:, :n] ** 2).mean(-1))
        floor_R1 = (t_quantile(1 - bounds.level / 2, n) * rms_R / np.sqrt(n))[:, None]
        finite_RA = finite_RA & np.isfinite(floor_R1)
    standing.seeds_RA[standing.open_RA] = n
    standing.lost_RA |= standing.open_RA & ~finite_RA
    standing.open_RA &= finite_RA
    arms = x_RAN.shape[1]
    for _ in range(arms):  # Holm: each verdict leaves its part of the level to the others
        sharing_R1 = arms - (standing.sign_RA != 0).sum(-1, keepdims=True)
        needed_R1 = bounds.critical_KA[look][np.maximum(sharing_R1, 1) - 1]
        standing.needed_RA = np.where(standing.open_RA, needed_R1, standing.needed_RA)
        new_RA = standing.open_RA & (size_RA >= needed_R1) & (np.abs(mean_RA) > floor_R1)
        standing.sign_RA[new_RA] = np.sign(mean_RA[new_RA]).astype(np.int8)
        standing.open_RA &= ~new_RA
        if not new_RA.any():
            break
    standing.open_RA &= size_RA >= bounds.futile_K[look]
    if look == len(bounds.looks) - 1:
        standing.open_RA[:] = False


def take_all_looks(bounds: Design, x_RAN: Array, again_RN: Array | None) -> Standing:
    """Whole studies at once."""
    standing = Standing.fresh(*x_RAN.shape[:2])
    for look in range(len(bounds.looks)):
        take_look(bounds, look, standing, x_RAN, again_RN)
    return standing


# ---- stated power --------------------------------------------------------------------------------
def simulate(
    bounds: Design, effects: tuple[float, ...], again: bool, studies: int, seed: int = 7
) -> Standing:
    """Simulated studies whose arms lie this far from the baseline, in sigmas of a pair.

    Arms share the noise of the baseline's runs, as in a study: the differences of two arms are
    correlated by a half. The A/A pair has the spread of any pair.
    """
    generator = np.random.default_rng(seed)
    shape = (studies, len(effects), bounds.looks[-1])
    base_RN = generator.standard_normal((studies, bounds.looks[-1])) * np.sqrt(0.5)
    own_RAN = generator.standard_normal(shape) * np.sqrt(0.5)
    again_RN = generator.standard_normal((studies, bounds.looks[-1])) * np.sqrt(0.5) - base_RN
    x_RAN = own_RAN - base_RN[:, None] + np.array(effects)[:, None]
    return take_all_looks(bounds, x_RAN, again_RN if again else None)


@functools.cache
def effect_found(
    looks: tuple[int, ...], level: float, arms: int, spending: float, futility: float,
    again: bool, power: float,
) -> float:  # fmt: skip
    """Effect, in sigmas of a pair, whose sign a study finds with this probability.

    One arm has the effect, the others none: Holm's steps then help it least.
    """
    bounds = design(looks, level, arms, spending, futility)
    low, high = 0.0, 1.0
    while high < 1e3 and _power(bounds, high, arms, again) < power:
        low, high = high, 2 * high
    for _ in range(12):
        middle = (low + high) / 2
        found = _power(bounds, middle, arms, again) >= power
        low, high = (low, middle) if found else (middle, high)
    return high


def _power(bounds: Design, effect: float, arms: int, again: bool) -> float:
    effects = (effect, *[0.0] * (arms - 1))
    return float((simulate(bounds, effects, again, 4000).sign_RA[:, 0] == 1).mean())
