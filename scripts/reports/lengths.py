"""What a report says of lengths and sizes: a law over FLOPs, a ladder, steps to a loss."""

from __future__ import annotations

import statistics

from scripts.reports.answer import estimated, listed, ratio_text, ratios_of
from scripts.reports.document import Picture, ReportPart, Table
from scripts.reports.plots import draw_catch_up, draw_ladder, draw_law
from scripts.studies.results import CatchUp, Rung, StudyResults, law_points
from scripts.studies.statistics import extrapolate, spread


def ladder_section(results: StudyResults) -> list[ReportPart]:
    """Steps and time to the loss of the other kind of arm, rung by rung."""
    level, ask = results.study.level, results.study.ladder
    trials = sorted({results.study.trials(name) for name in (*ask.arms, *ask.to)})
    blocks: list[ReportPart] = [
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


def law_section(results: StudyResults) -> list[ReportPart]:
    """The points of a law, its numbers with their intervals, and its figure."""
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
    blocks: list[ReportPart] = [
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


def catch_up_section(results: StudyResults, found: CatchUp) -> list[ReportPart]:
    """Steps that one arm needs for another's final loss, by both readings."""
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
    blocks: list[ReportPart] = [
        f"Steps at which {ask.arm} reaches the final loss of {ask.to} with the same seed, over the"
        f" {steps} steps of {ask.to}; between run lengths by interpolation in log(steps). The"
        " learning rate of the full length is kept for the shorter ones.",
        Table(["reading", f"ratio, +- {1 - results.study.level:.0%} interval", "by seed"], rows),
    ]
    if found.own_decay:
        figure = draw_catch_up(found, results.arms[ask.arm], results.arms[ask.to])
        blocks.append(Picture("catch_up", "final loss over the length of a run", figure))
    return blocks


def time_to_catch_up(results: StudyResults, found: CatchUp) -> list[Table]:
    """Tokens and seconds that one arm needs for the other's final loss, over that one's."""
    ask, steps = results.study.catch_up, results.study.steps
    ratios = {"tokens": {seed: c.steps / steps for seed, c in found.own_decay.items()}}
    for title, key in (("CPU seconds", "step_cpu_seconds"), ("wall-clock", "step_seconds")):
        mine, theirs = (results.arms[arm].step_seconds(key) for arm in (ask.arm, ask.to))
        ratios[title] = {
            seed: ratio * mine[seed] / theirs[seed]
            for seed, ratio in ratios["tokens"].items()
            if seed in mine and seed in theirs
        }
    head = [f"{ask.arm} over {ask.to}, to the same loss", "ratio, sigma over seeds", "by seed"]
    rows = []
    for title, by_seed in ratios.items():
        if by_seed:
            mean = spread([*by_seed.values()], results.study.level)
            listed = ", ".join(f"{seed}: {ratio:.3f}" for seed, ratio in by_seed.items())
            rows.append([title, f"{mean.mean:.3f} +- {mean.deviation:.3f}", listed])
    return [Table(head, rows)] if rows else []
