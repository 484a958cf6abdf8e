"""A study's results in words, tables and figures: ``report.md``, ``report.html``, ``results.json``.

The verdict in one line is made in ``answer.py``; laws and lengths, best rates, rounded weights and
far answers have sections in files of their own.
Everything that equal runs share stands first; what a machine measured (seconds) stands in one
section of its own, so that a study which was interrupted reads the same but for that section.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import yaml

from scripts.reports.answer import WORDS, lead, listed, loss_text, power_line, signed
from scripts.reports.document import Picture, ReportDocument, Table
from scripts.reports.far_answers import answers_section
from scripts.reports.lengths import (
    catch_up_section,
    ladder_section,
    law_section,
    time_to_catch_up,
)
from scripts.reports.plots import draw_curves, draw_differences, draw_search
from scripts.reports.transfer import transfer_section
from scripts.reports.weights import weights_section
from scripts.studies.protocol import Protocol
from scripts.studies.results import (
    ACTS,
    ArmResult,
    Comparison,
    StudyResults,
    gather,
)
from scripts.studies.statistics import Paired, spread
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
        document.add("The law", *law_section(results))
    if results.study.ladder.arms:
        document.add("The ladder", *ladder_section(results))
    if results.study.transfer.along:
        document.add("The best rates", *transfer_section(results))
    else:
        document.add("Comparisons", *_comparisons(results))
    if results.answers is not None:
        document.add("What lies far behind", *answers_section(results, results.answers))
    if results.catch_up is not None:
        document.add("Steps to the other arm's loss", *catch_up_section(results, results.catch_up))
    document.add("Curves", _picture("curves", "validation loss of each arm", results))
    picture = None if results.study.transfer.along else _search_picture(results)
    document.add("Learning rates", _search_table(results), picture)
    document.add("Arms", _arms(results), _acts(results))
    if errors := weights_section(results):
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
        blocks += time_to_catch_up(results, results.catch_up)
    return blocks


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
