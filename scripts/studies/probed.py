"""What a study's models answer: each seed's run is asked once it is trained, beside its loss.

``v4 probe`` asks, and leaves ``probe.json`` in the run's folder; a study's archive has it beside
the receipt. An answer counts as far where what it tells lies beyond the reach of stacked windows,
in every arm: arms of more layers or wider windows relay farther, and all are judged by the same
questions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from scripts.studies.config import AGAIN
from scripts.studies.protocol import Protocol
from scripts.studies.sections import ProbeConfig
from scripts.studies.statistics import Paired, holm, paired
from scripts.studies.store import FinishedRun
from train.errors import ROOT


@dataclass(frozen=True)
class FarAnswers:
    """Right answers beyond the windows' reach, and each arm beside the baseline.

    Attributes:
        questions: that every run was asked, beyond the reach of every one; perhaps none.
        chance: of a guess.
        shares: arm -> seed -> fraction that is right.
        tests: arm -> differences to the baseline by seed, and Holm's corrected p.
        unasked: arm -> seeds of runs that have not answered.
    """

    questions: int
    chance: float
    shares: Mapping[str, Mapping[int, float]]
    tests: Mapping[str, tuple[Paired, float]]
    unasked: Mapping[str, list[int]]


def far_answers(
    asked: ProbeConfig, runs: Mapping[str, Mapping[int, FinishedRun]], baseline: str, level: float
) -> FarAnswers | None:
    """What the runs answered; None where no question was asked, or none has been answered.

    Args:
        asked: the questions.
        runs: arm -> seed -> finished run.
        baseline: that the others are compared with.
        level: of the tests.
    """
    answers = {
        arm: {seed: found for seed, run in by_seed.items() if (found := answers_of(run, asked))}
        for arm, by_seed in runs.items()
    }
    every = [found for by_seed in answers.values() for found in by_seed.values()]
    if not every:
        return None
    unasked = {
        arm: missing
        for arm, by_seed in runs.items()
        if (missing := [seed for seed in by_seed if seed not in answers[arm]])
    }
    places = [
        place for place in every[0] if all(found.get(place, {}).get("beyond") for found in every)
    ]
    far = [every[0][place] for place in places]
    questions = sum(cell["count"] for cell in far)
    if not questions:
        return FarAnswers(0, 0.0, {}, {}, unasked)
    shares = {
        arm: {
            seed: sum(found[x]["correct"] * found[x]["count"] for x in places) / questions
            for seed, found in by_seed.items()
        }
        for arm, by_seed in answers.items()
    }
    others = [arm for arm in shares if arm != baseline]
    tests = {arm: paired(shares[arm], shares[baseline], level) for arm in others}
    done = {arm: test for arm, test in tests.items() if test is not None}
    corrected = holm([test.p for test in done.values()])
    chance = sum(cell["chance"] * cell["count"] for cell in far) / questions
    return FarAnswers(
        questions, chance, shares,
        {arm: (test, p) for (arm, test), p in zip(done.items(), corrected, strict=True)},
        unasked,
    )  # fmt: skip


def answers_of(run: FinishedRun, asked: ProbeConfig) -> dict[tuple[int, float], dict[str, Any]]:
    """(length, depth) -> a run's answers to these questions; empty: they were not asked."""
    if not asked.needle or run.probe is None:
        return {}
    (model,) = json.loads(run.probe)["models"].values()
    rows = model.get("needles", [])
    forms = {(row["task"], row["length"], row["count"]) for row in rows}
    wanted = {(asked.needle, length, asked.count) for length in asked.lengths}
    if forms != wanted or len(rows) != asked.depths * len(wanted):
        return {}
    return {(row["length"], row["depth"]): row for row in rows}


def unasked(protocol: Protocol, share: tuple[int, int] = (1, 1)) -> Iterator[FinishedRun]:
    """Runs of a share's seeds (I-th of N) that are trained here and have not been asked."""
    asked = protocol.study.probe
    if not asked.needle:
        return
    seeds, out = protocol.study.seeds, (ROOT / protocol.out).resolve()
    for cell, run in protocol.finished().items():
        if cell.seed not in seeds or cell.arm == AGAIN or answers_of(run, asked):
            continue
        if seeds.index(cell.seed) % share[1] != share[0] - 1:
            continue
        if run.has_weights and run.folder.resolve().is_relative_to(out):
            yield run


def probe_words(run: FinishedRun, asked: ProbeConfig) -> list[str]:
    """The command line of ``v4 probe`` that asks."""
    lengths = ",".join(map(str, asked.lengths))
    return [
        str(run.folder), "--out", str(run.folder), "--only", "needles", "--needle", asked.needle,
        "--lengths", lengths, "--depths", str(asked.depths), "--count", str(asked.count),
    ]  # fmt: skip
