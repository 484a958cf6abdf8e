"""What a study's models find far behind, beside their loss: a line and a section of its report."""

from __future__ import annotations

import statistics

from scripts.reports.document import Table
from scripts.studies.probed import FarAnswers
from scripts.studies.results import StudyResults

_NONE = "no question stands beyond the windows of every arm"


def answers_line(results: StudyResults) -> str | None:
    """Shares of right answers, with a verdict on each arm; None where nothing was answered."""
    found, level = results.answers, results.study.level
    if found is None:
        return None
    if not found.questions:
        return f"{_NONE} ({results.study.probe.needle})"
    told = []
    for arm, shares in found.shares.items():
        text = f"{arm} {statistics.fmean(shares.values()):.3f}" if shares else f"{arm} not yet"
        if arm in found.tests:
            test, p = found.tests[arm]
            complete = len(test.differences) == len(results.study.seeds)
            verdict = "fewer" if test.mean < 0 else "more"
            verdict = verdict if complete and p < level else "no verdict"
            text += f" ({verdict}: {test.mean:+.3f} +- {test.half_width:.3f}, p {p:.2g})"
        told.append(text)
    return f"of {found.questions} questions beyond the windows are right: {', '.join(told)}"


def answers_section(results: StudyResults, found: FarAnswers) -> list[Table | str]:
    """Questions, and every arm beside the baseline."""
    ask, base, rows = results.study.probe, results.study.baseline, []
    left = ", ".join(f"{arm} of seeds {seeds}" for arm, seeds in found.unasked.items())
    silent = [f"Not asked, or elsewhere: {left}."] if left else []
    if not found.questions:
        return [f"{_NONE}.".capitalize(), *silent]
    for arm, shares in found.shares.items():
        mean = f"{statistics.fmean(shares.values()):.3f}" if shares else ""
        by_seed = ", ".join(f"{seed}: {share:.3f}" for seed, share in shares.items())
        values = ["", "", ""]
        if arm in found.tests:
            test, p = found.tests[arm]
            values = [f"{test.mean:+.3f}", f"+- {test.half_width:.3f}", f"{p:.2g}"]
        rows.append([arm, mean, *values, by_seed])
    interval = f"{1 - results.study.level:.0%} interval"
    lengths = ", ".join(map(str, ask.lengths))
    text = (
        f"Every seed's run is asked after its training: {found.questions} questions of"
        f" `{ask.needle}` in documents of {lengths} tokens, whose answers stand farther back than"
        f" stacked windows relay in any arm; a guess is right in {found.chance:.3f}. Student's t on"
        " differences by seed, p by Holm's steps over the arms; looks do not read these answers."
        " All runs get the same questions: the interval is over training seeds alone, and other"
        " questions of the kind may move all shares."
    )
    table = Table(["arm", "right", f"minus {base}", interval, "p (Holm)", "by seed"], rows)
    return [text, *([ask.note] if ask.note else []), table, *silent]
