"""What a run says of itself before its first step: at most eight lines, computed, not measured."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from data.epochs import SourceUse
from model.parameter_counts import parameter_counts
from parallel.config import ParallelConfig
from parallel.launch import launched_rank, launched_world_size
from train.config.schema import RunConfig
from train.preflight.forecast import flops_per_token, quantity, run_flops
from train.preflight.needs import Memory, Needs
from train.preflight.reach import data_warnings
from train.preflight.world import GB
from train.stages import StagePlan
from train.terminal import columns

log = logging.getLogger(__name__)
MOST_LINES = 8
_HEAD = 8  # columns of a line's name
_NARROW = ("memory", "data")  # cut to one line where a terminal has too few columns for all


def banner(
    run: RunConfig,
    plan: StagePlan,
    uses: Sequence[SourceUse],
    memory: Memory,
    layout: ParallelConfig,
    device: str,
    width: int | None = None,
) -> list[str]:
    """The lines.

    Args:
        run: the config, its precision settled.
        plan: its stages.
        uses: what it reads.
        memory: of its fullest rank.
        layout: resolved.
        device: cpu or cuda.
        width: columns of the terminal; None: as wide as the text. What has no room is counted; only
            a name or a path that is longer than a line stands out.
    """
    counts, stages = parameter_counts(run.model), plan.reached()
    flops = [quantity(flops_per_token(run, stage)) for stage in stages]
    kinds = sorted(vars(memory).items(), key=lambda kind: -kind[1])
    rows = {
        "model": [
            f"{run.model.name}: {quantity(counts.total)} parameters",
            f"{quantity(counts.active)} active", f"{_between(flops)}FLOPs a token",
        ],
        "data": [part for use in uses for part in _data(use)],
        "run": [
            f"{plan.steps:,} steps", f"{quantity(plan.end_tokens)} tokens",
            f"{quantity(run_flops(run, plan))}FLOPs",
            f"rows of {_between([f'{stage.seq_len:,}' for stage in stages])}",
            f"{run.train.precision.value} on {device}", *_degrees(layout),
        ],
        "memory": [
            f"{memory.total / GB:.3g} GB a rank predicted",
            *(f"{name} {size / GB:.2f}" for name, size in kinds if size / GB >= 0.005),
        ],
        "writes": [run.run_dir],
    }  # fmt: skip
    lines = {head: _lines(head, parts, width, 2) for head, parts in rows.items()}
    for head in _NARROW:
        if sum(map(len, lines.values())) > MOST_LINES:
            lines[head] = _lines(head, rows[head], width, 1)
    return [line for some in lines.values() for line in some]


def announce(run: RunConfig, plan: StagePlan, uses: Sequence[SourceUse], device: str) -> None:
    """Tell the banner, and what of the data should be known; nothing on ranks above 0.

    Args:
        run: the config.
        plan: its stages.
        uses: what it reads.
        device: cpu or cuda.
    """
    if launched_rank():
        return
    layout = run.parallel.resolve(launched_world_size())
    memory = Needs(run, plan).peak(layout, device)
    for line in banner(run, plan, uses, memory, layout, device, columns()):
        log.info("%s", line)
    for line in data_warnings(uses):
        log.warning("%s", line)


def _data(use: SourceUse) -> list[str]:
    if use.epochs is None:
        if use.foretold_epochs is None:
            return [f"{use.name}: a stream", f"{quantity(use.read)} tokens of it"]
        return [
            f"{use.name}: a stream of {quantity(use.stated)} tokens, as its publisher says",
            f"{quantity(use.foretold_epochs)} epochs",
        ]
    return [
        f"{use.name}: {quantity(use.tokens or 0)} training tokens",
        f"{quantity(use.epochs)} epochs",
    ]


def _degrees(layout: ParallelConfig) -> list[str]:
    ranks = layout.world_size
    return ["1 rank"] if ranks == 1 else [f"{ranks} ranks ({layout})"]


def _between(values: Sequence[str]) -> str:
    """The first and the last of what the stages have, where they differ."""
    return values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


def _lines(head: str, parts: Sequence[str], width: int | None, most: int) -> list[str]:
    """Parts filled into lines; what goes beyond ``most`` of them is counted."""
    lines, begin = [f"{head:{_HEAD}}{parts[0]}"], " " * _HEAD
    for number, part in enumerate(parts[1:], 1):
        longer, last = f"{lines[-1]}, {part}", number == len(parts) - 1
        count = f" (+{len(parts) - number})"
        after = 0 if last else 1 if len(lines) < most else len(count)  # a comma, or the count
        room = None if width is None else width - after
        if room is None or len(longer) <= room:
            lines[-1] = longer
        elif len(lines) < most:
            lines[-1] += ","
            lines.append(begin + part)
        else:
            lines[-1] += count
            break
    return lines
