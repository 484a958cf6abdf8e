"""What a study says in words: its verdict in one line, and numbers as they stand in a report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from scripts.reports.far_answers import answers_line
from scripts.reports.transfer import transfer_line
from scripts.studies.config import StudyConfig
from scripts.studies.law import Estimated
from scripts.studies.looks import ArmStanding
from scripts.studies.results import Comparison, StudyResults
from scripts.studies.sequential import effect_found
from scripts.studies.statistics import Crossing, Finding, Paired, Spread, spread

WORDS = {Finding.below: "a lower loss than", Finding.above: "a higher loss than"}


def lead(results: StudyResults) -> str:
    """The verdict in one line."""
    blocked = [arm for arm in results.arms.values() if arm.choice.reason]
    if blocked:
        return f"No answer: {blocked[0].name}: {blocked[0].choice.reason}."
    parts = [_verdict(results, comparison) for comparison in results.comparisons]
    if results.study.ladder.arms:  # arms of other lengths
        parts = [_ladder_line(results)]
    if results.study.law.arms:  # its arms differ in size, so their losses must
        parts = [_law_line(results)]
    if results.study.transfer.along:
        parts = [line] if (line := transfer_line(results)) else []
    if not parts and results.again_test is not None:
        test = results.again_test
        said = "differs from" if test.p < results.study.level else "no verdict, as it must be:"
        parts = [f"A/A: the repeated arm {said} itself ({signed(test.mean)} nats, p {test.p:.2g})"]
    if (text := _catch_up_line(results)) is not None:
        parts.append(text)
    if (text := answers_line(results)) is not None:
        parts.append(text)
    unfinished = f" {results.missing} runs are still to do." if results.missing else ""
    return f"{'; '.join(parts) or 'nothing is finished yet'}.{unfinished}"


def _verdict(results: StudyResults, found: Comparison) -> str:
    base, test = results.study.baseline, found.test
    if test is None:
        return f"{found.arm} against {base}: no runs to compare yet"
    effect = f"{signed(test.mean)} +- {test.half_width:.3f} nats, p {test.p:.2g}"
    if found.standing is not None:
        return _sequential_verdict(results, found, found.standing, test)
    if found.verdict is Finding.none:
        return f"{found.arm} against {base}: no verdict ({effect}{_waiting(results, test)})"
    text = f"{found.arm} has {WORDS[found.verdict]} {base} ({effect}"
    if len(results.comparisons) > 1 and found.corrected_p >= results.study.level:
        text += f"; not after Holm's correction, p {found.corrected_p:.2g}"
    return text + ")"


def _sequential_verdict(
    results: StudyResults, found: Comparison, standing: ArmStanding, test: Paired
) -> str:
    base, seeds = results.study.baseline, len(results.study.seeds)
    width = f" +- {test.half_width:.3f}" if standing.judged else ""
    effect = f"{signed(test.mean)}{width} nats, {len(test.differences)} of {seeds} seeds"
    if standing.sign:
        return f"{found.arm} has {WORDS[found.verdict]} {base} ({effect})"
    said = f"no verdict, {standing.end}" if standing.end else "no verdict yet"
    return f"{found.arm} against {base}: {said} ({effect})"


def _law_line(results: StudyResults) -> str:
    law, point = results.law, results.predicted
    if law is None or point is None:
        return "no law yet: a point is missing"
    said = "as predicted" if point.holds else "not as predicted"
    return (
        f"the loss falls with FLOPs to the power of -{estimated(law.exponent)} towards"
        f" {estimated(law.irreducible)} nats; the costliest point is {said} from the others"
        f" ({point.measured:.4f}, predicted {estimated(point.predicted)})"
    )


def _waiting(results: StudyResults, test: Paired) -> str:
    """What a verdict still waits for."""
    seeds = len(results.study.seeds)
    if len(test.differences) < seeds:
        return f", {len(test.differences)} of {seeds} seeds"
    if results.study.again and not results.again_is_complete:
        return ", the A/A pair is not there yet"
    return ""


def _catch_up_line(results: StudyResults) -> str | None:
    found, ask = results.catch_up, results.study.catch_up
    if found is None or not found.own_decay:
        return None
    ratios = ratios_of(found.own_decay, results.study.steps)
    return f"{ask.arm} needs {ratio_text(found.own_decay, ratios)} of {ask.to}'s steps for its loss"


def _ladder_line(results: StudyResults) -> str:
    if not results.ladder:
        return "no rung of the ladder is finished yet"
    rungs = []
    for rung in results.ladder:
        ratios = spread([*rung.ratios.values()], results.study.level)
        text = ratio_text(rung.crossings, ratios)
        rungs.append(f"{text} of the steps at {rung.tokens / 1e6:.2f} M tokens")
    return f"to the loss of {', '.join(results.study.ladder.to)}: {'; '.join(rungs)}"


def estimated(number: Estimated) -> str:
    """A number with its interval."""
    return f"{number.value:.4g} ({number.low:.4g} to {number.high:.4g})"


def ratios_of(crossings: Mapping[int, Crossing], steps: int) -> Spread:
    """Steps at which curves cross over those of the whole run, over seeds."""
    return spread([crossing.steps / steps for crossing in crossings.values()], 0.05)


def ratio_text(crossings: Mapping[int, Crossing], ratios: Spread) -> str:
    """Such a ratio; a bound where crossings lie outside what was measured."""
    bounds = {c.bound for c in crossings.values() if c.bound}
    text = f"{ratios.mean:.3f}"
    if len(crossings) > 1 and ratios.deviation:
        text += f" +- {ratios.half_width:.3f} (sigma {ratios.deviation:.3f})"
    if bounds == {"<"}:
        return f"at most {text}"
    if bounds == {">"}:
        return f"at least {text}"
    return f"{text}, some seeds outside the measured range" if bounds else text


def power_line(study: StudyConfig, again: Paired | None) -> str:
    """The error rate, and the smallest effect that a study is likely to find.

    Args:
        study: the config.
        again: the A/A pairs, where there are any, whose spread gives nats.
    """
    others, asked = len(study.arms) - 1, study.sequential
    if study.transfer.along:
        return "best rates are estimated, each with an interval; losses of arms are held to no test"
    if not others:
        return "A/A alone: there is no effect to find"
    # without looks each comparison is tested at the whole level; Holm's p stands beside it
    looks, arms = (study.looks, others) if study.is_sequential else ((len(study.seeds),), 1)
    effect = effect_found(
        looks, study.level, arms, asked.spending, asked.futility, study.again, asked.power
    )
    text = (
        f"verdicts after {', '.join(map(str, looks))} seeds; equal arms get one in at most"
        f" {study.level:.0%} of {'studies' if study.is_sequential else 'comparisons'}; an effect of"
        f" {effect:.2f} sigmas of a pair is found with {asked.power:.0%} power"
    )
    if again is None:
        return text
    return f"{text}: {effect * again.deviation:.4f} nats where pairs spread as the A/A pair's do"


def signed(value: float) -> str:
    """A difference in nats."""
    return f"{value:+.4f}"


def loss_text(value: float) -> str:
    """A loss in nats, if there is one."""
    return f"{value:.4f}" if math.isfinite(value) else "diverged"


def listed(values: Iterable[Any]) -> str:
    """Values beside each other."""
    return ", ".join(str(value) for value in values)
