"""Where the comparisons of a sequential study stand: which seeds each arm still needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from scripts.studies.config import AGAIN, StudyConfig
from scripts.studies.sequential import Standing, design, take_look
from scripts.studies.store import FinishedRun

RunsOf = Callable[[str, Sequence[int]], Mapping[int, FinishedRun]]


@dataclass(frozen=True)
class ArmStanding:
    """What is decided of an arm so far.

    Attributes:
        wanted: seeds it is to have by now.
        judged: seeds of the last look that is complete; 0: none yet.
        critical: |t| that was needed there.
        sign: +1 above the baseline, -1 below, 0 no verdict.
        end: why it gets no more seeds; empty while it is open.
    """

    wanted: int
    judged: int = 0
    critical: float = math.inf
    sign: int = 0
    end: str = ""


def others(study: StudyConfig) -> list[str]:
    """Arms that are compared with the baseline."""
    return [name for name in study.arms if name != study.baseline]


def standings(study: StudyConfig, found: RunsOf) -> dict[str, ArmStanding]:
    """Where the comparison of each arm stands, from the finished runs alone.

    Args:
        study: the config.
        found: the finished runs of an arm among some seeds, by seed.
    """
    arms, asked = others(study), study.sequential
    bounds = design(study.looks, study.level, len(arms), asked.spending, asked.futility)
    standing = Standing.fresh(1, len(arms))
    for look, n in enumerate(bounds.looks):
        if not standing.open_RA.any() or (losses := _losses(study, found, n, standing)) is None:
            break
        take_look(bounds, look, standing, *losses)
    done = int(standing.seeds_RA.max(initial=0))
    coming = next((n for n in bounds.looks if n > done), len(study.seeds))
    return {
        arm: ArmStanding(
            coming if standing.open_RA[0, i] else int(standing.seeds_RA[0, i]),
            int(standing.seeds_RA[0, i]), float(standing.needed_RA[0, i]),
            int(standing.sign_RA[0, i]), _end(standing, i, len(study.seeds)),
        )
        for i, arm in enumerate(arms)
    }  # fmt: skip


def _losses(
    study: StudyConfig, found: RunsOf, n: int, standing: Standing
) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Differences of the open arms and of the A/A pair on the first n seeds; None: not yet."""
    seeds, arms = study.seeds[:n], others(study)
    wanted = [study.baseline, *([AGAIN] if study.again else [])]
    wanted += [arm for arm, is_open in zip(arms, standing.open_RA[0], strict=True) if is_open]
    losses: dict[str, np.ndarray] = {}
    for arm in wanted:
        runs = found(arm, seeds)
        if len(runs) < n:
            return None
        losses[arm] = np.array([runs[seed].val_loss for seed in seeds])
    base_N, nothing = losses[study.baseline], np.zeros(n)
    with np.errstate(invalid="ignore"):
        x_AN = np.stack([losses[a] - base_N if a in losses else nothing for a in arms])
        again_N = losses[AGAIN] - base_N if study.again else None
    return x_AN[None], None if again_N is None else again_N[None]


def _end(standing: Standing, arm: int, seeds: int) -> str:
    """Why an arm of one study gets no more seeds."""
    if standing.open_RA[0, arm]:
        return ""
    if standing.lost_RA[0, arm]:
        return "a run diverged"
    if standing.sign_RA[0, arm]:
        return "verdict"
    return "all seeds" if standing.seeds_RA[0, arm] == seeds else "hardly a verdict to come"
