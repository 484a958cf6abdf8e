"""What a study's finished runs say: arms, comparisons, steps to a loss, how far the parts acted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from model.parameter_counts import parameter_counts
from scripts.studies.cells import flops_per_token
from scripts.studies.config import AGAIN, StudyConfig
from scripts.studies.law import Law, Prediction, fit_law, predict_last
from scripts.studies.looks import ArmStanding
from scripts.studies.probed import FarAnswers, far_answers
from scripts.studies.protocol import Protocol
from scripts.studies.search import Choice, Tuning
from scripts.studies.statistics import (
    Crossing,
    Finding,
    Paired,
    holm,
    judge,
    noise_floor,
    paired,
    steps_to_reach,
)
from scripts.studies.store import FinishedRun
from train.errors import UserError

ACTS = {
    "indexer_leaves_out": "queries whose top-k leaves entries out",
    "indexer_captured_mass": "teacher's mass inside the top-k",
    "past_window": "tokens whose document begins before the window",
    "past_hca_block": "tokens behind their document's first HCA block",
}
ALIKE = 0.02  # costs within this fraction count as equal


@dataclass(frozen=True)
class ArmResult:
    """What came of one arm.

    Attributes:
        name: of the arm.
        overrides: that make it.
        choice: of its learning rate.
        runs: seed -> finished run.
        parameters: of everything.
        active: that one token uses.
        flops: forward and backward, per token.
        tokens: that one run trains on.
        steps: of one run.
        tuning: of its other keys.
        searched: learning rate -> seed -> finished run, where every seed searches.
    """

    name: str
    overrides: list[str]
    choice: Choice
    runs: Mapping[int, FinishedRun]
    parameters: int
    active: int
    flops: float
    tokens: int
    steps: int
    tuning: Tuning
    searched: Mapping[float, Mapping[int, FinishedRun]] = field(default_factory=dict)

    @property
    def run_flops(self) -> float:
        """Training FLOPs of one run."""
        return self.flops * self.tokens

    @property
    def every_run(self) -> list[FinishedRun]:
        """Those of the chosen rate; where every seed searches, of all rates."""
        searched = [run for by_seed in self.searched.values() for run in by_seed.values()]
        return searched or list(self.runs.values())

    @property
    def losses(self) -> dict[int, float]:
        """Seed -> validation loss after the last step."""
        return {seed: run.val_loss for seed, run in self.runs.items()}

    @property
    def trained(self) -> list[FinishedRun]:
        """Runs with a curve."""
        return [run for run in self.runs.values() if run.records]

    def acts(self) -> dict[str, float]:
        """How far the parts under study acted: means over the steps that looked, of all runs."""
        found = {}
        for key in ACTS:
            values = [r[key] for run in self.trained for r in run.records if key in r]
            if values:
                found[key] = statistics.fmean(values)
        return found

    def step_seconds(self, field_name: str) -> dict[int, float]:
        """Seed -> median over a run's steps of ``step_cpu_seconds`` or ``step_seconds``."""
        values = {
            seed: [record[field_name] for record in run.records if field_name in record]
            for seed, run in self.runs.items()
        }
        return {seed: statistics.median(seconds) for seed, seconds in values.items() if seconds}


@dataclass(frozen=True)
class Comparison:
    """One arm beside the baseline.

    Attributes:
        arm: its name.
        test: None with fewer than two pairs.
        verdict: at the study's level.
        corrected_p: Holm's, over the study's comparisons.
        parameters: the arm's over the baseline's.
        flops: the same per token.
        standing: what the looks decided; None where the study is not sequential. The half-width of
            ``test`` is then that of the last look's bound, which allows for all looks and arms.
    """

    arm: str
    test: Paired | None
    verdict: Finding
    corrected_p: float
    parameters: float
    flops: float
    standing: ArmStanding | None = None

    @property
    def equal_cost(self) -> bool:
        """Whether parameters and FLOPs agree within :data:`ALIKE`."""
        return abs(self.parameters - 1) <= ALIKE and abs(self.flops - 1) <= ALIKE


@dataclass(frozen=True)
class CatchUp:
    """Steps that one arm needs to reach another's final loss, as a fraction of that one's steps.

    Attributes:
        own_decay: seed -> crossing among runs that each decayed to their own end.
        one_curve: seed -> crossing of the full run's own curve, whose learning rate was still high.
        final: steps -> losses by seed, of the runs behind ``own_decay``.
        target: seed -> loss to reach.
    """

    own_decay: Mapping[int, Crossing]
    one_curve: Mapping[int, Crossing]
    final: Mapping[int, Mapping[int, float]]
    target: Mapping[int, float]


@dataclass(frozen=True)
class Rung:
    """One length of a ladder: what reaching the other kind of arm's loss takes.

    Attributes:
        to: the arm whose loss is reached.
        steps: of its runs.
        tokens: of its runs.
        crossings: seed -> steps that the first kind needs, between its own tuned lengths.
        seconds: seed -> the same as a ratio of running time.
    """

    to: str
    steps: int
    tokens: int
    crossings: Mapping[int, Crossing]
    seconds: Mapping[int, float]

    @property
    def ratios(self) -> dict[int, float]:
        """Seed -> steps over steps."""
        return {seed: crossing.steps / self.steps for seed, crossing in self.crossings.items()}


@dataclass
class StudyResults:
    """Everything a report shows.

    Attributes:
        name: of the study.
        study: its config.
        arms: by name, the baseline first.
        again: the A/A arm.
        comparisons: of every other arm with the baseline.
        again_test: A/A pairs.
        floor: of the noise, nats; 0 where A/A was not run.
        catch_up: None where it is not asked or not there yet.
        law: the same, of the loss over FLOPs.
        predicted: the last point of the law, from the others.
        ladder: the rungs that are finished, by length.
        answers: to what the seeds' runs were asked; None where nothing was, or is yet.
        search_steps: of a run of the search.
        missing: runs still to do, of a sequential study up to the next look.
        again_seeds: that the noise floor is to stand on by now.
    """

    name: str
    study: StudyConfig
    arms: dict[str, ArmResult]
    again: ArmResult | None
    comparisons: list[Comparison] = field(default_factory=list)
    again_test: Paired | None = None
    floor: float = 0.0
    catch_up: CatchUp | None = None
    law: Law | None = None
    predicted: Prediction | None = None
    ladder: list[Rung] = field(default_factory=list)
    answers: FarAnswers | None = None
    search_steps: int = 0
    missing: int = 0
    again_seeds: int = 0

    @property
    def baseline(self) -> ArmResult:
        """What the others are compared with."""
        return self.arms[self.study.baseline]

    @property
    def again_is_complete(self) -> bool:
        """Whether the noise floor stands on all seeds; no verdict is given before."""
        test = self.again_test
        return test is not None and len(test.differences) == self.again_seeds

    @property
    def runs(self) -> list[FinishedRun]:
        """All finished runs of the seeds."""
        arms = [*self.arms.values(), *([self.again] if self.again else [])]
        return [run for arm in arms for run in arm.every_run]


def gather(name: str, protocol: Protocol) -> StudyResults:
    """Read everything that is finished.

    Raises:
        UserError: two runs were evaluated on different text.
    """
    study = protocol.study
    names = [study.baseline, *(arm for arm in study.arms if arm != study.baseline)]
    arms = {arm: _arm(protocol, arm) for arm in names}
    again = _arm(protocol, AGAIN) if study.again else None
    results = StudyResults(name, study, arms, again, search_steps=protocol.search_steps)
    results.again_seeds = len(protocol.seeds_by_now(AGAIN))
    _check_same_text(results.runs)
    base = results.baseline
    if again is not None:
        results.again_test = paired(again.losses, base.losses, study.level)
    results.comparisons = _compare(results, protocol.standings() if study.is_sequential else {})
    if study.catch_up.arm:
        results.catch_up = _catch_up(protocol, arms)
    results.ladder = _ladder(results)
    runs = {arm.name: arm.runs for arm in arms.values()}
    results.answers = far_answers(study.probe, runs, study.baseline, study.level)
    points = law_points(results)
    if study.law.arms and len(points) == len(study.law.arms):
        results.law = fit_law(points, study.level)
        results.predicted = predict_last(points, study.level)
    results.missing = sum(wanted - done for _, _, wanted, done in protocol.plan())
    return results


def _ladder(results: StudyResults) -> list[Rung]:
    """Every length at which some seed has its loss and the whole ladder of the first kind."""
    ask, rungs = results.study.ladder, []
    ladder = [results.arms[name] for name in ask.arms]
    for name in ask.to:
        arm = results.arms[name]
        crossings, seconds = {}, {}
        for seed, loss in arm.losses.items():
            points = {a.steps: a.losses[seed] for a in ladder if seed in a.losses}
            if len(points) < len(ladder) or not math.isfinite(loss):
                continue
            found = crossings[seed] = steps_to_reach(points, loss)
            nearest = min(ladder, key=lambda a: abs(math.log(a.steps / found.steps)))
            paces = [a.runs[seed].step_seconds for a in (nearest, arm)]
            seconds[seed] = found.steps * paces[0] / (arm.steps * paces[1])
        if crossings:
            rungs.append(Rung(name, arm.steps, arm.tokens, crossings, seconds))
    return rungs


def law_points(results: StudyResults) -> dict[float, list[float]]:
    """FLOPs of a run -> final losses, of the arms of a law that have two finite runs or more."""
    points = {}
    for name in results.study.law.arms:
        arm = results.arms[name]
        losses = [loss for loss in arm.losses.values() if math.isfinite(loss)]
        if len(losses) >= 2:
            points[arm.run_flops] = losses
    return points


def _check_same_text(runs: list[FinishedRun]) -> None:
    """Losses of other rows are no comparison, however alike they look."""
    known = [(run, rows) for run in runs if (rows := run.rows_evaluated) is not None]
    for run, rows in known[1:]:
        first, wanted = known[0]
        if not math.isclose(rows, wanted, rel_tol=1e-4):
            raise UserError(
                f"{run.folder} was evaluated on other text than {first.folder}: {rows:.4f} and"
                f" {wanted:.4f} tokens per byte"
            )


def _arm(protocol: Protocol, name: str) -> ArmResult:
    study = protocol.study
    base = study.baseline if name == AGAIN else name
    runs = protocol.results(name)
    example = next(cell for _, cell, _, _ in protocol.plan() if cell.arm == name)
    run = next((found.run for found in runs.values()), None) or protocol.config(example)
    counts = parameter_counts(run.model)
    overrides = [*study.overrides_of(base), *(["other initial weights"] if name == AGAIN else [])]
    choice = protocol.choice(name)
    searched = {rate: protocol.searched(name, rate) for rate in choice.tried}
    return ArmResult(
        name, overrides, choice, runs, counts.total, counts.active,
        flops_per_token(run), run.train.steps * run.train.global_batch_tokens,
        run.train.steps, protocol.tuning(name), searched if study.transfer.along else {},
    )  # fmt: skip


def _compare(results: StudyResults, standings: Mapping[str, ArmStanding]) -> list[Comparison]:
    study, base, again = results.study, results.baseline, results.again_test
    others = [arm for arm in results.arms.values() if arm is not base]
    tests = [paired(arm.losses, base.losses, study.level) for arm in others]
    corrected = iter(holm([test.p for test in tests if test is not None]))
    found = []
    for arm, test in zip(others, tests, strict=True):
        floor, p = 0.0, math.nan
        if test is not None:
            p = next(corrected)
            if again is not None:
                floor = noise_floor(again, len(test.differences), study.level)
                results.floor = max(results.floor, floor)
        complete = test is not None and len(test.differences) == len(study.seeds)
        complete = complete and (not study.again or results.again_is_complete)
        verdict = judge(test, study.level, floor) if test and complete else Finding.none
        standing = standings.get(arm.name)
        if standing is not None:
            verdict = {-1: Finding.below, 0: Finding.none, 1: Finding.above}[standing.sign]
            if test is not None and math.isfinite(standing.critical):
                error = test.deviation / math.sqrt(len(test.differences))
                test = replace(test, half_width=standing.critical * error)
        ratios = arm.parameters / base.parameters, arm.flops / base.flops
        found.append(Comparison(arm.name, test, verdict, p, *ratios, standing))
    return found


def _catch_up(protocol: Protocol, arms: Mapping[str, ArmResult]) -> CatchUp | None:
    study, ask = protocol.study, protocol.study.catch_up
    target = {s: loss for s, loss in arms[ask.to].losses.items() if math.isfinite(loss)}
    lengths = [*(protocol.shortened(f) for f in ask.fractions), study.steps]
    final = {n: {s: r.val_loss for s, r in protocol.results(ask.arm, n).items()} for n in lengths}
    own_decay, one_curve = {}, {}
    for seed, loss in target.items():
        points = {n: losses[seed] for n, losses in final.items() if seed in losses}
        if len(points) == len(lengths):
            own_decay[seed] = steps_to_reach(points, loss)
        if seed in arms[ask.arm].runs:
            curve = curve_of(arms[ask.arm].runs[seed])
            one_curve[seed] = steps_to_reach(curve, loss)
    return CatchUp(own_decay, one_curve, final, target) if own_decay or one_curve else None


def curve_of(run: FinishedRun) -> dict[int, float]:
    """Steps -> validation loss of one run."""
    return {r["step"]: r["val_loss"] for r in run.records if r.get("val_loss") is not None}
