"""What a run needs and how long it takes, on this machine or another; nothing is read or written.

The run is given as to the trainer (GROUP=OPTION, KEY=VALUE). All figures are computed: memory from
the config, time from the model's FLOPs and a share of the card's peak rate that you state.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from model.parameter_counts import parameter_counts
from parallel.config import ParallelConfig
from parallel.errors import ConfigError
from scripts.cli.command import command
from scripts.cli.parser import CommandParser, real, whole
from train.config.command_line import compose_run
from train.config.schema import Device, Precision, RunConfig
from train.errors import UserError
from train.preflight.cards import CARDS, Card, card
from train.preflight.fit import layout_flags, layouts_on, memory_table, smallest_layouts
from train.preflight.forecast import duration, flops_per_token, quantity, run_flops, stretches
from train.preflight.matmul_rate import measured_matmul_rate
from train.preflight.needs import Memory, Needs
from train.preflight.world import GB, World, this_world
from train.stages import StagePlan, resolve

EPILOG = """examples:
  v4 plan model=v4_nano                          on this machine
  v4 plan experiment=gpu_24gb --gpus 1 --memory 24
  v4 plan experiment=v4_flash --gpus 512 --card h100
"""
SHOWN = 3  # layouts
Fit = tuple[ParallelConfig, Memory]


@command()
def main(words: Sequence[str] | None = None) -> None:
    """Print the plan of a run."""
    options = parse(words)
    run, world, rates = asked(options)
    plan = resolve(run)
    lines = [
        *_size(run, plan),
        *_memory(run, plan, world),
        *_time(run, plan, world, rates, options.share),
    ]
    print("\n".join(lines))


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__, epilog=EPILOG)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of the trainer")
    parser.add_argument("--gpus", type=whole(above=0),
                        help="of the other machine (default: this machine)")  # fmt: skip
    parser.add_argument("--memory", type=real(above=0), help="GB of each of them")
    parser.add_argument("--card", help=", ".join(one.name for one in CARDS))
    parser.add_argument("--tflops", type=real(above=0),
                        help="dense bf16 peak of a card without a name")  # fmt: skip
    parser.add_argument("--share", type=real(above=0, most=1), default=0.3,
                        help="of the peak rate that is reached")  # fmt: skip
    return parser.read(words, _check_machine, _compose, intermixed=True)


def _check_machine(options: argparse.Namespace) -> None:
    """Find the card that is named, and whether it is known how much a GPU holds."""
    options.named = card(options.card) if options.card is not None else None
    given = (options.gpus, options.memory, options.tflops, options.card)
    if any(given) and not (options.memory or options.named or "memory" in options.refused):
        raise UserError("another machine needs --memory GB or --card NAME: how much a GPU holds")
    if options.named and options.tflops:
        raise UserError(f"--tflops {options.tflops} and --card {options.named.name}: give one")


def _compose(options: argparse.Namespace) -> None:
    options.run = compose_run(options.overrides, also=resolve)


def asked(options: argparse.Namespace) -> tuple[RunConfig, World, list[Card]]:
    """The run, its machine, and the cards of which it may consist."""
    run, named = options.run, options.named
    if options.gpus is options.memory is options.card is options.tflops is None:
        return _here(run)
    memory: float = options.memory or named.memory_gb
    cards = [named] if named else [one for one in CARDS if one.memory_gb == memory]
    if options.tflops:
        cards = [Card("this card", memory, options.tflops)]
    world = World(options.gpus or 1, "cuda", int(memory * GB))
    return _settled(run, Precision.bf16), world, cards


def _here(run: RunConfig) -> tuple[RunConfig, World, list[Card]]:
    world = this_world(run.train.device)
    if not world.bytes_per_rank:  # asked for a card that is not here
        world = this_world(Device.cpu)
    run = _settled(run, Precision.bf16 if world.device == "cuda" else Precision.fp32)
    dtype = torch.bfloat16 if run.train.precision is Precision.bf16 else torch.float32
    rate = measured_matmul_rate(torch.device(world.device), dtype).usual
    return run, world, [Card("this machine (measured)", world.bytes_per_rank / GB, rate / 1e12)]


def _settled(run: RunConfig, precision: Precision) -> RunConfig:
    if run.train.precision is not Precision.auto:
        return run
    return replace(run, train=replace(run.train, precision=precision))


def _size(run: RunConfig, plan: StagePlan) -> list[str]:
    counts = parameter_counts(run.model)
    lines = [
        "computed from the config, not measured",
        f"{run.model.name}: {counts.total:,} parameters, {counts.active:,} active a token",
        f"run: {quantity(plan.end_tokens)} tokens in {plan.steps:,} steps,"
        f" {quantity(run_flops(run, plan))}FLOPs (forward and backward, without recomputation)",
    ]
    for stage, tokens in stretches(plan):
        lines.append(
            f"  stage {stage.name or 'main'}: {quantity(tokens)} tokens in rows of"
            f" {stage.seq_len:,}, {quantity(flops_per_token(run, stage))}FLOPs a token"
        )
    return lines


def _memory(run: RunConfig, plan: StagePlan, world: World) -> list[str]:
    """Layouts on exactly this world, or what would fit instead."""
    needs = Needs(run, plan)
    tried = _with_own(run, needs, world, layouts_on(needs, plan, world.device, world.ranks))
    fits = [found for found in tried if found[1].total <= world.bytes_per_rank]
    where = f"{world.ranks} {world.device} rank(s) of {world.bytes_per_rank / GB:,.0f} GB"
    if fits:
        told = [f"{where}: {len(fits)} of {len(tried)} layouts fit, fewest pipeline stages first:"]
        return [*told, *_named(fits[:SHOWN])]
    if not tried:
        told = [f"{where}: its batches split over no layout of {world.ranks} ranks"]
    else:
        closest = min(tried, key=lambda found: found[1].total)
        told = [f"{where}: none of {len(tried)} layouts fits; the closest:", *_named([closest])]
    smallest = smallest_layouts(run, plan, world.device, world.bytes_per_rank, SHOWN)
    if not smallest:
        return [*told, "no number of such ranks is enough"]
    ranks = smallest[0][0].world_size
    return [*told, f"the fewest such ranks that fit are {ranks}:", *_named(smallest)]


def _with_own(run: RunConfig, needs: Needs, world: World, tried: list[Fit]) -> list[Fit]:
    """The layout of the config first, where it is one of this many ranks."""
    try:
        own = run.parallel.resolve(world.ranks)
    except ConfigError:  # of another number of ranks
        return tried
    if own == ParallelConfig():
        return tried
    return [(own, needs.peak(own, world.device)), *(f for f in tried if f[0] != own)]


def _named(found: Sequence[Fit]) -> list[str]:
    named = [("abc"[number], *one) for number, one in enumerate(found)]
    flags = [f"  {letter}: {layout_flags(layout)}" for letter, layout, _ in named]
    return [*flags, *memory_table([(letter, memory) for letter, _, memory in named])]


def _time(
    run: RunConfig, plan: StagePlan, world: World, cards: Sequence[Card], share: float
) -> list[str]:
    flops = run_flops(run, plan)
    if not cards:
        memory = world.bytes_per_rank / GB
        return [f"time: no card of the table has {memory:g} GB; give --card NAME or --tflops N"]
    lines = [f"time on {world.ranks} of them, at {share:.0%} of the peak rate (--share):"]
    for one in cards:
        seconds = flops / (world.ranks * one.bf16_tflops * 1e12 * share)
        lines.append(
            f"  {one.name:24} {one.bf16_tflops:8,.4g} TFLOP/s each: {duration(seconds)}"
            f" ({quantity(plan.end_tokens / seconds)} tokens a second)"
        )
        parts = [
            f"{stage.name} {duration(seconds * tokens * flops_per_token(run, stage) / flops)}"
            for stage, tokens in stretches(plan)
        ]
        if len(parts) > 1:
            lines.append("    by stage: " + ", ".join(parts))
    return lines


if __name__ == "__main__":
    sys.exit(main())
