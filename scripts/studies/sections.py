"""What a study's report shows of question, comparisons, ladder, law and search."""

from __future__ import annotations

import math
import statistics

from scripts.studies.document import Picture, Table
from scripts.studies.plots import (
    draw_catch_up,
    draw_curves,
    draw_differences,
    draw_ladder,
    draw_law,
    draw_search,
)
from scripts.studies.results import (
    ArmResult,
    CatchUp,
    Comparison,
    Rung,
    StudyResults,
    law_points,
)
from scripts.studies.statistics import Paired, extrapolate, spread
from scripts.studies.verdicts import VERDICTS
from scripts.studies.wording import estimated, listed, loss_text, ratio_text, ratios_of, signed


def design(results: StudyResults) -> str:
    """How arms are compared, in words."""
    study = results.study
    run = next((r.run for r in results.runs), None)
    tokens = f" of {run.train.global_batch_tokens:,} tokens" if run is not None else ""
    length = "the same length" if results.search_steps == study.steps else "a shorter length"
    return (
        f"Each arm: {study.steps} steps{tokens}, seeds {listed(study.seeds)}; a seed fixes data"
        " order and initial weights, so arms are paired by it. Learning rates come from a search"
        f" of {length} ({results.search_steps} steps, with its own decay) on seed"
        f" {study.search.seed}, which judges nothing; a best one at the edge of the grid is no"
        f" answer. Test: Student's t on paired differences, two-sided at {study.level:.0%}; a"
        " verdict also needs a mean difference above the noise floor of the A/A pair (the"
        f" baseline from other initial weights on the same data): {_floor(results)}."
        f"{_looks(results)}"
    )


def _looks(results: StudyResults) -> str:
    study = results.study
    if not study.is_sequential:
        return ""
    return (
        f" Open arms are judged after {listed(study.looks)} seeds by bounds on |t| under which"
        f" equal arms get any verdict in at most {study.level:.0%} of studies, looks and arms"
        " together"
        " (simulated; Holm's steps between arms). Intervals are those of these bounds. An arm ends"
        " with its verdict, with a run that diverged, or when a verdict from the seeds left has a"
        f" probability below {study.sequential.futility:.0%}."
    )


def _floor(results: StudyResults) -> str:
    if results.again_test is None:
        return "not measured"
    return f"{results.floor:.4f} nats" if results.floor else "nothing to hold it against"


def comparisons(results: StudyResults) -> list[Table | Picture | str]:
    """Each arm against the baseline."""
    rows, level = [], results.study.level
    sequential = results.study.is_sequential
    for found in results.comparisons:
        verdict = VERDICTS.get(found.verdict, found.verdict.value).removesuffix(" than")
        if found.standing is not None and not found.standing.sign:
            verdict += f": {found.standing.end}" if found.standing.end else " yet"
        rows.append(_test_row(found.arm, found.test, verdict, found))
    if results.again_test is not None:
        verdict = "no verdict" if results.again_test.p >= level else "differs: beware"
        rows.append(_test_row("A/A", results.again_test, verdict, None))
    head = [
        "arm", f"minus {results.study.baseline} (nats)", f"{1 - level:.0%} interval", "sigma of a"
        " pair", "p", "|t|, needed" if sequential else "p (Holm)", "seeds", "parameters", "FLOPs",
        "verdict",
    ]  # fmt: skip
    blocks: list[Table | Picture | str] = [Table(head, rows)]
    if any(c.test for c in results.comparisons) or results.again_test is not None:
        caption = "differences to the baseline by seed"
        blocks.append(Picture("differences", caption, draw_differences(results)))
    unequal = [c.arm for c in results.comparisons if not c.equal_cost]
    if unequal:
        blocks.append(
            f"Not equal in parameters or FLOPs per token (by more than 2 %): {', '.join(unequal)}."
            " All arms see the same tokens."
        )
    return blocks


def _test_row(name: str, test: Paired | None, verdict: str, found: Comparison | None) -> list[str]:
    if test is None:
        values = ["", "", "", "", "", "0"]
    else:
        corrected = _corrected(found, test) if found is not None else ""
        values = [
            signed(test.mean), f"+- {test.half_width:.4f}", f"{test.deviation:.4f}",
            f"{test.p:.2g}", corrected, str(len(test.differences)),
        ]  # fmt: skip
    costs = ["1", "1"] if found is None else [f"{found.parameters:.3f}", f"{found.flops:.3f}"]
    return [name, *values, *costs, verdict]


def _corrected(found: Comparison, test: Paired) -> str:
    """What holds for the whole family: Holm's p, or |t| beside the bound of the last look."""
    if found.standing is None:
        return f"{found.corrected_p:.2g}"
    error = test.deviation / math.sqrt(len(test.differences))
    size = abs(test.mean) / error if error else math.inf
    return f"{size:.2f}, {found.standing.critical:.2f}" if found.standing.judged else f"{size:.2f}"


def ladder(results: StudyResults) -> list[Table | Picture | str]:
    """Ratios of steps over the length of a run."""
    level, ask = results.study.level, results.study.ladder
    trials = sorted({results.study.trials(name) for name in (*ask.arms, *ask.to)})
    blocks: list[Table | Picture | str] = [
        f"Each arm is tuned at its own length, by {listed(trials)} trials (and what a search adds"
        f" at an edge): {', '.join(ask.arms)} against {', '.join(ask.to)}. Steps are interpolated"
        " in log(steps) between the tuned lengths, seed by seed."
    ]
    rows = []
    for rung in results.ladder:
        times = spread([*rung.seconds.values()], level)
        ratios = spread([*rung.ratios.values()], level)
        rows.append([
            rung.to, f"{rung.tokens:,}", ratio_text(rung.crossings, ratios),
            f"{times.mean:.3f} +- {times.half_width:.3f}", _foreseen(results, rung),
            str(len(rung.crossings)),
        ])  # fmt: skip
    interval = f"+- {1 - level:.0%} interval"
    head = ["to the loss of", "tokens", f"ratio of tokens, {interval}", f"of time, {interval}",
            "predicted from the shorter ones", "seeds"]  # fmt: skip
    blocks.append(Table(head, rows))
    if results.ladder:
        caption = "ratio of steps to equal loss over the length of a run"
        blocks.append(Picture("ladder", caption, draw_ladder(results.ladder)))
    return blocks


def _foreseen(results: StudyResults, rung: Rung) -> str:
    """What the shorter rungs say of a ratio: a power law of the length, seed by seed."""
    shorter = [r for r in results.ladder if r.tokens < rung.tokens]
    if len(shorter) < 2:
        return ""
    seeds = [s for s in rung.crossings if all(s in r.crossings for r in shorter)]
    said = [extrapolate({r.tokens: r.ratios[s] for r in shorter}, rung.tokens) for s in seeds]
    found = spread(said, results.study.level)
    return f"{found.mean:.3f} +- {found.half_width:.3f}" if said else ""


def law_section(results: StudyResults) -> list[Table | Picture | str]:
    """The power law of loss over FLOPs, and its points."""
    law, points = results.law, law_points(results)
    asked = [results.arms[name] for name in results.study.law.arms]
    rows = [
        [
            arm.name, f"{arm.run_flops:.3g}", f"{arm.tokens:,}",
            f"{statistics.fmean(points[arm.run_flops]):.4f}" if arm.run_flops in points else "",
            f"{law.loss(arm.run_flops):.4f}" if law is not None else "",
        ]
        for arm in asked
    ]  # fmt: skip
    blocks: list[Table | Picture | str] = [
        "L(C) = E + A (C / C0)^-alpha by least squares over the mean losses; C is a run's training"
        " FLOPs. Intervals are those of the seeds, not of the law's form.",
        Table(["point", "FLOPs of a run", "tokens", "validation loss", "the law"], rows),
    ]
    if law is not None:
        numbers = (("E, nats", law.irreducible), ("A, nats", law.reducible),
                   ("alpha", law.exponent))  # fmt: skip
        interval = f"value ({1 - results.study.level:.0%} interval)"
        table = Table(
            ["number", interval],
            [[name, estimated(number)] for name, number in numbers]
            + [["C0, FLOPs", f"{law.centre:.3g}"], ["sigma of a seed", f"{law.deviation:.4f}"]],
        )
        caption = "loss over FLOPs; line: the law; cross: predicted from the others"
        blocks += [table, Picture("law", caption, draw_law(law, points, results.predicted))]
    return blocks


def catch_up(results: StudyResults, found: CatchUp) -> list[Table | Picture | str]:
    """Steps that an arm needs for another one's loss."""
    ask, steps = results.study.catch_up, results.study.steps
    rows = []
    readings = (
        ("runs of several lengths, each with its own decay (fair)", found.own_decay),
        ("the full-length curve, still at a high rate there", found.one_curve),
    )
    for title, crossings in readings:
        if crossings:
            text = ratio_text(crossings, ratios_of(crossings, steps))
            by_seed = ", ".join(f"{s}: {c.bound}{c.steps:.0f}" for s, c in crossings.items())
            rows.append([title, text, by_seed])
    blocks: list[Table | Picture | str] = [
        f"Steps at which {ask.arm} reaches the final loss of {ask.to} with the same seed, over the"
        f" {steps} steps of {ask.to}; between run lengths by interpolation in log(steps). The"
        " learning rate of the full length is kept for the shorter ones.",
        Table(["reading", f"ratio, +- {1 - results.study.level:.0%} interval", "by seed"], rows),
    ]
    if found.own_decay:
        figure = draw_catch_up(found, results.arms[ask.arm], results.arms[ask.to])
        blocks.append(Picture("catch_up", "final loss over the length of a run", figure))
    return blocks


def curves(name: str, caption: str, results: StudyResults) -> Picture | str:
    """Validation loss over tokens, where a run has finished."""
    arms = [arm for arm in results.arms.values() if arm.trained]
    return Picture(name, caption, draw_curves(arms)) if arms else "No run has finished yet."


def search_table(results: StudyResults) -> Table:
    """Learning rates that were tried, and the chosen one."""
    rows = []
    for arm in _searched(results):
        tried = ", ".join(f"{rate:g}: {loss_text(loss)}" for rate, loss in arm.choice.tried.items())
        best = "no answer" if arm.choice.reason else "not known yet"
        best = best if arm.choice.best is None else f"{arm.choice.best:g}"
        rows.append([arm.name, best, tried])
    if any(results.study.tune_of(row[0]) for row in rows):
        return _tuned_table(results, rows)
    return Table(["arm", "chosen", "validation loss by learning rate"], rows)


def _tuned_table(results: StudyResults, rows: list[list[str]]) -> Table:
    """The same with the other keys, and how many runs the search took."""
    for row in rows:
        arm = results.arms[row[0]]
        tried = arm.tuning.tried
        row += [
            " ".join(f"`{word}`" for word in arm.tuning.settings) or "as they were",
            ", ".join(f"`{words[-1]}`: {loss_text(loss)}" for words, loss in tried.items()),
            str(len(arm.choice.tried) + len(tried)),
        ]
    head = ["arm", "chosen", "validation loss by learning rate", "other keys", "tried", "trials"]
    return Table(head, rows)


def search_picture(results: StudyResults) -> Picture | None:
    """The same as a figure, where something was tried."""
    arms = [arm for arm in _searched(results) if arm.choice.tried]
    if not arms:
        return None
    caption = "validation loss over the learning rate; ringed: chosen"
    return Picture("learning_rates", caption, draw_search(arms, results.search_steps))


def _searched(results: StudyResults) -> list[ArmResult]:
    own = results.study.arms
    return [arm for arm in results.arms.values() if not own[arm.name].evaluates]
