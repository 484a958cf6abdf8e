"""A study's results in words, tables and figures: ``report.md``, ``report.html``, ``results.json``.

The verdict in one line is made in ``answer.py``, the sections that bear it here.
Everything that equal runs share stands first; what a machine measured (seconds) stands in one
section of its own, so that a study which was interrupted reads the same but for that section.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from scripts.reports.answer import (
    WORDS,
    estimated,
    lead,
    listed,
    loss_text,
    power_line,
    ratio_text,
    ratios_of,
    signed,
)
from scripts.reports.document import Picture, ReportDocument, Table
from scripts.reports.far_answers import answers_section
from scripts.reports.plots import (
    draw_catch_up,
    draw_curves,
    draw_differences,
    draw_ladder,
    draw_law,
    draw_search,
)
from scripts.reports.transfer import transfer_section
from scripts.studies.protocol import Protocol
from scripts.studies.results import (
    ACTS,
    ArmResult,
    CatchUp,
    Comparison,
    Rung,
    StudyResults,
    gather,
    law_points,
)
from scripts.studies.statistics import Paired, extrapolate, spread
from train.errors import ROOT
from train.record.receipt import plain, write_json

MEASURED = "Measured on this machine"
_OTHERS = ROOT / "docs" / "studies" / "others.yaml"


def write_study_report(name: str, protocol: Protocol, root: Path) -> Path:
    """Write a study's report to ``root/NAME``; returns the Markdown's path."""
    results = gather(name, protocol)
    folder = root / name
    path = study_document(results).write(folder)
    write_json(folder / "results.json", as_json(results))
    return path


def study_document(results: StudyResults) -> ReportDocument:
    """The report."""
    document = ReportDocument(f"Study {results.name}", lead(results))
    document.add("Question", results.study.question, _design(results))
    if results.study.law.arms:
        document.add("The law", *_law(results))
    if results.study.ladder.arms:
        document.add("The ladder", *_ladder(results))
    if results.study.transfer.along:
        document.add("The best rates", *transfer_section(results))
    else:
        document.add("Comparisons", *_comparisons(results))
    if results.answers is not None:
        document.add("What lies far behind", *answers_section(results, results.answers))
    if results.catch_up is not None:
        document.add("Steps to the other arm's loss", *_catch_up(results, results.catch_up))
    document.add("Curves", _picture("curves", "validation loss of each arm", results))
    picture = None if results.study.transfer.along else _search_picture(results)
    document.add("Learning rates", _search_table(results), picture)
    document.add("Arms", _arms(results), _acts(results))
    if errors := _weight_errors(results):
        document.add("What rounding takes from each weight", *errors)
    document.add("What the protocol can find", _protocol(results))
    document.add("Limits", _limits(results))
    if others := _others(results.name):
        document.add("What others report", others)
    document.add("Configs and receipts", *_receipts(results))
    document.add(MEASURED, *_measured(results))
    return document


# ---- sections ------------------------------------------------------------------------------------
def _design(results: StudyResults) -> str:
    study = results.study
    run = next((r.run for r in results.runs), None)
    tokens = f" of {run.train.global_batch_tokens:,} tokens" if run is not None else ""
    if study.transfer.along:
        return (
            f"Each arm: {study.steps} steps{tokens} at every rate of its grid on seeds"
            f" {listed(study.seeds)}; a grid grows by a factor of {study.search.factor:g} until two"
            " rates lie on each side of the best."
        )
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
        " together (simulated; Holm's steps between arms). Intervals are those of these bounds. An"
        " arm ends with its verdict, with a run that diverged, or when a verdict from the seeds"
        f" left has a probability below {study.sequential.futility:.0%}."
    )


def _floor(results: StudyResults) -> str:
    if results.again_test is None:
        return "not measured"
    return f"{results.floor:.4f} nats" if results.floor else "nothing to hold it against"


def _comparisons(results: StudyResults) -> list[Table | Picture | str]:
    rows, level = [], results.study.level
    sequential = results.study.is_sequential
    for found in results.comparisons:
        verdict = WORDS.get(found.verdict, found.verdict.value).removesuffix(" than")
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


def _ladder(results: StudyResults) -> list[Table | Picture | str]:
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


def _law(results: StudyResults) -> list[Table | Picture | str]:
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


def _catch_up(results: StudyResults, found: CatchUp) -> list[Table | Picture | str]:
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


def _picture(name: str, caption: str, results: StudyResults) -> Picture | str:
    arms = [arm for arm in results.arms.values() if arm.trained]
    return Picture(name, caption, draw_curves(arms)) if arms else "No run has finished yet."


def _search_table(results: StudyResults) -> Table:
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


def _search_picture(results: StudyResults) -> Picture | None:
    arms = [arm for arm in _searched(results) if arm.choice.tried]
    if not arms:
        return None
    caption = "validation loss over the learning rate; ringed: chosen"
    return Picture("learning_rates", caption, draw_search(arms, results.search_steps))


def _searched(results: StudyResults) -> list[ArmResult]:
    own = results.study.arms
    return [arm for arm in results.arms.values() if not own[arm.name].evaluates]


def _arms(results: StudyResults) -> Table:
    rows = []
    for arm in [*results.arms.values(), *([results.again] if results.again else [])]:
        losses = [loss for loss in arm.losses.values() if math.isfinite(loss)]
        bits = [r.bits_per_byte for r in arm.runs.values() if r.bits_per_byte is not None]
        rows.append([
            arm.name, f"{statistics.fmean(losses):.4f}" if losses else "",
            f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "",
            f"{statistics.fmean(bits):.4f}" if bits else "",
            f"{arm.parameters:,}", f"{arm.active:,}", f"{arm.flops / 1e6:.2f}",
        ])  # fmt: skip
    head = [
        "arm", "validation loss (nats)", "sigma of seeds", "bits per byte", "parameters", "active",
        "MFLOPs per token",
    ]  # fmt: skip
    return Table(head, rows)


def _acts(results: StudyResults) -> Table | None:
    """How far the parts under study acted."""
    keys = [key for key in ACTS if any(key in arm.acts() for arm in results.arms.values())]
    if not keys:
        return None
    rows = [
        [arm.name, *(f"{arm.acts()[key]:.3f}" if key in arm.acts() else "" for key in keys)]
        for arm in results.arms.values()
        if arm.trained
    ]
    return Table(["share of", *(ACTS[key] for key in keys)], rows)


def _weight_errors(results: StudyResults) -> list[Table | str]:
    """Squared error of every rounded weight beside what all of it costs in loss."""
    arms = {
        arm.name: [errors for run in arm.runs.values() if (errors := run.weight_errors)]
        for arm in results.arms.values()
    }
    arms = {name: seeds for name, seeds in arms.items() if seeds}
    if not arms:
        return []
    weights = dict.fromkeys(weight for seeds in arms.values() for one in seeds for weight in one)
    rows = [[weight, *(_mean_of(weight, seeds) for seeds in arms.values())] for weight in weights]
    tests = {found.arm: found.test for found in results.comparisons}
    said = [signed(test.mean) if (test := tests.get(name)) is not None else "" for name in arms]
    rows.append([f"all: loss minus {results.study.baseline} (nats)", *said])
    return [
        "Squared error over squared norm, mean over seeds. Where it is alike in all weights, what a"
        " loss is due to is how much of the model passes through them.",
        Table(["weight", *arms], rows),
    ]


def _mean_of(weight: str, seeds: Sequence[Mapping[str, float]]) -> str:
    values = [errors[weight] for errors in seeds if weight in errors]
    return f"{statistics.fmean(values):.5f}" if values else ""


def _protocol(results: StudyResults) -> str:
    study, test = results.study, results.again_test
    said = power_line(study, test)
    parts = [
        f"{said}." if study.transfer.along else f"By simulation of the whole protocol: {said}."
    ]
    if test is not None:
        parts.append(
            f"The A/A pair, equal arms by construction, differs by {signed(test.mean)} +-"
            f" {test.half_width:.4f} nats (p {test.p:.2g})."
        )
    runs = [run for run in results.runs if run.records]
    tokens = sum(r.run.train.steps * r.run.train.global_batch_tokens for r in runs)
    parts.append(f"The seeds of all arms: {len(runs)} trained runs, {tokens / 1e6:.2f} M tokens.")
    return " ".join(parts)


def _limits(results: StudyResults) -> str:
    base = results.baseline
    per = base.tokens / base.active
    if results.study.law.arms:
        return (
            "The law is fitted over the sizes and lengths of its points; beyond them it is a guess."
            " One corpus, one tokenizer and one held-out text; rates were chosen on one seed."
        )
    if results.study.transfer.along:
        tokens = [arm.tokens for arm in results.arms.values()]
        return (
            f"Runs of {min(tokens) / 1e6:.2f} to {max(tokens) / 1e6:.2f} M tokens; a rate that is"
            " best there need not be for longer, nor does a ratio reach beyond these sizes. One"
            " corpus, one tokenizer and one held-out text; weight decay, warm-up and batch are the"
            " same in every arm."
        )
    parts = [
        f"One size ({base.parameters:,} parameters, {base.active:,} active) and"
        f" {base.tokens / 1e6:.2f} M tokens a run of the baseline, {per:.2g} an active parameter:"
        " nothing here is said of larger models or longer runs, where the order of arms may be"
        " another.",
        "One corpus, one tokenizer and one held-out text; seeds vary order and initial weights.",
        "Learning rates are compared on one seed, so a chosen rate may be a neighbour of the best.",
    ]
    unequal = [c.arm for c in results.comparisons if not c.equal_cost]
    if unequal:
        parts.append(f"Costs a token differ: {', '.join(unequal)}.")
    return " ".join(parts)


def _others(name: str) -> Table | None:
    """What is reported elsewhere; a file that is kept by hand, with its sources."""
    rows = yaml.safe_load(_OTHERS.read_text(encoding="utf-8")).get(name)
    if not rows:
        return None
    return Table(["reported", "source"], [[row["claim"], row["source"]] for row in rows])


def _receipts(results: StudyResults) -> list[Table | str]:
    base = " ".join(f"`{word}`" for word in results.study.base)
    arms = [[arm.name, " ".join(f"`{word}`" for word in arm.overrides)]
            for arm in results.arms.values()]  # fmt: skip
    rows = [
        [arm.name, str(run.run.seed), f"{run.run.optim.lr:g}", f"`{run.name}`",
         f"`{run.code[:12]}`", loss_text(run.val_loss)]
        for arm in [*results.arms.values(), *([results.again] if results.again else [])]
        for run in arm.every_run
    ]  # fmt: skip
    codes = {run.code for run in results.runs}
    data = {_data_hash(run.receipt) for run in results.runs}
    notes = [f"Every run: {base}"]
    if len(codes) > 1:
        notes.append(f"**Runs of {len(codes)} code versions are mixed here.**")
    if len(data) > 1:
        notes.append(f"**Runs on {len(data)} different corpora are mixed here.**")
    return [
        *notes, Table(["arm", "overrides"], arms),
        Table(["arm", "seed", "learning rate", "run", "code", "validation loss"], rows),
    ]  # fmt: skip


def _measured(results: StudyResults) -> list[Table | str]:
    level, rows = results.study.level, []
    for arm in [*results.arms.values(), *([results.again] if results.again else [])]:
        medians = [arm.step_seconds(key) for key in ("step_cpu_seconds", "step_seconds")]
        if all(medians):
            spreads = [spread([*seconds.values()], level) for seconds in medians]
            rows.append([arm.name, *(f"{s.mean:.3f} +- {s.deviation:.3f}" for s in spreads)])
    blocks: list[Table | str] = [
        "Median of a run's steps; mean and sigma over runs. Wall-clock is only worth something on"
        " a machine that does nothing else; CPU seconds hold better beside other work.",
        Table(["arm", "CPU seconds a step", "wall-clock seconds a step"], rows),
    ]
    spent = [r["step_seconds"] for run in results.runs for r in run.records if "step_seconds" in r]
    blocks.append(f"The steps of the seeds' runs took {sum(spent) / 3600:.2f} hours in all.")
    if results.catch_up is not None:
        blocks += _time_to_catch_up(results, results.catch_up)
    return blocks


def _time_to_catch_up(results: StudyResults, found: CatchUp) -> list[Table]:
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


def _data_hash(receipt: Any) -> str:
    sources = receipt["data"]["sources"]
    return "+".join(str(sources[name].get("store")) for name in sorted(sources))


def as_json(results: StudyResults) -> dict[str, Any]:
    """The figures of a report, for other programs."""
    return {
        "study": {"name": results.name, **plain(results.study)},
        "lead": lead(results),
        "missing": results.missing,
        "noise_floor": results.floor,
        "answers": None if results.answers is None else plain(results.answers),
        "arms": {
            arm.name: {
                "lr": arm.choice.best,
                "reason": arm.choice.reason,
                "search": {str(k): v for k, v in arm.choice.tried.items()},
                "val_loss": {str(k): v for k, v in arm.losses.items()},
                "runs": {str(k): v.name for k, v in arm.runs.items()},
                "parameters": arm.parameters,
                "flops_per_token": arm.flops,
                "acts": arm.acts(),
            }
            for arm in [*results.arms.values(), *([results.again] if results.again else [])]
        },
        "comparisons": [plain(c) for c in results.comparisons],
        "again": plain(results.again_test) if results.again_test else None,
        "catch_up": plain(results.catch_up) if results.catch_up else None,
        "ladder": [plain(rung) for rung in results.ladder],
        "law": plain(results.law) if results.law else None,
        "predicted": plain(results.predicted) if results.predicted else None,
    }
