"""A study's answer in one line."""

from __future__ import annotations

from scripts.studies.protocol import ArmStanding
from scripts.studies.results import (
    Comparison,
    StudyResults,
)
from scripts.studies.statistics import Finding, Paired, spread
from scripts.studies.wording import estimated, ratio_text, ratios_of, signed

VERDICTS = {Finding.below: "a lower loss than", Finding.above: "a higher loss than"}


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
    if not parts and results.again_test is not None:
        test = results.again_test
        said = "differs from" if test.p < results.study.level else "no verdict, as it must be:"
        parts = [f"A/A: the repeated arm {said} itself ({signed(test.mean)} nats, p {test.p:.2g})"]
    if (text := _catch_up_line(results)) is not None:
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
    text = f"{found.arm} has {VERDICTS[found.verdict]} {base} ({effect}"
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
        return f"{found.arm} has {VERDICTS[found.verdict]} {base} ({effect})"
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
