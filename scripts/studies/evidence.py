"""What a study rests on: its arms, what the protocol can find, limits, receipts, measured times."""

from __future__ import annotations

import math
import statistics
from typing import Any

import yaml

from scripts.studies.config import StudyConfig
from scripts.studies.document import Table
from scripts.studies.results import (
    ACTS,
    CatchUp,
    StudyResults,
)
from scripts.studies.sequential import effect_found
from scripts.studies.statistics import Paired, spread
from scripts.studies.wording import loss_text, signed
from train.errors import ROOT

_OTHERS = ROOT / "docs" / "studies" / "others.yaml"


def arms_table(results: StudyResults) -> Table:
    """Size, length and losses of every arm."""
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


def acts_table(results: StudyResults) -> Table | None:
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


def power_line(study: StudyConfig, again: Paired | None) -> str:
    """The error rate, and the smallest effect that a study is likely to find.

    Args:
        study: the config.
        again: the A/A pairs, where there are any, whose spread gives nats.
    """
    others, asked = len(study.arms) - 1, study.sequential
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


def protocol_section(results: StudyResults) -> str:
    """What effects the protocol finds, and what it measured of its own noise."""
    study, test = results.study, results.again_test
    parts = [f"By simulation of the whole protocol: {power_line(study, test)}."]
    if test is not None:
        parts.append(
            f"The A/A pair, equal arms by construction, differs by {signed(test.mean)} +-"
            f" {test.half_width:.4f} nats (p {test.p:.2g})."
        )
    runs = [run for run in results.runs if run.records]
    tokens = sum(r.run.train.steps * r.run.train.global_batch_tokens for r in runs)
    parts.append(f"The seeds of all arms: {len(runs)} trained runs, {tokens / 1e6:.2f} M tokens.")
    return " ".join(parts)


def limits(results: StudyResults) -> str:
    """What the study cannot say."""
    base = results.baseline
    per = base.tokens / base.active
    if results.study.law.arms:
        return (
            "The law is fitted over the sizes and lengths of its points; beyond them it is a guess."
            " One corpus, one tokenizer and one held-out text; rates were chosen on one seed."
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


def others_table(name: str) -> Table | None:
    """What is reported elsewhere; a file that is kept by hand, with its sources."""
    rows = yaml.safe_load(_OTHERS.read_text(encoding="utf-8")).get(name)
    if not rows:
        return None
    return Table(["reported", "source"], [[row["claim"], row["source"]] for row in rows])


def receipts(results: StudyResults) -> list[Table | str]:
    """The commands and the receipts of its runs."""
    base = " ".join(f"`{word}`" for word in results.study.base)
    arms = [[arm.name, " ".join(f"`{word}`" for word in arm.overrides)]
            for arm in results.arms.values()]  # fmt: skip
    rows = [
        [arm.name, str(seed), f"{run.run.optim.lr:g}", f"`{run.name}`", f"`{run.code[:12]}`",
         loss_text(run.val_loss)]
        for arm in [*results.arms.values(), *([results.again] if results.again else [])]
        for seed, run in arm.runs.items()
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


def measured(results: StudyResults) -> list[Table | str]:
    """What this machine took, in seconds."""
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
