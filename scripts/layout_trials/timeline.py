"""Run pipeline schedules on gloo processes of this machine, draw what ran when, measure the bubble.

    python scripts/bench.py timeline --pp 2 --out runs/timeline
    python scripts/bench.py timeline dualpipev --pp 4 --microbatches 12 --model v4_tiny

The fastest of some steps of each schedule after a first that warms up, from the timestamps that the
stages record. A rank's bubble is the share of the step, from the first action of any rank to the
last, in which it runs nothing. Beside it stand the closed form with the measured mean time of an
action, which takes stages as equal, and a simulation that keeps each action's own measured time and
the order that ran, and lets it wait for nothing but the actions it depends on. What the measured
one has above that is communication and processes in each other's way: give every rank a core.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import torch
import torch.distributed as dist
import yaml

from data.batch import IGNORE, Batch
from model.config import ModelConfig
from model.loss import Objective
from optim.build import build_optimizer
from optim.config import OptimConfig
from parallel.config import SCHEDULES, ParallelConfig
from parallel.mesh import build_mesh, check_layout
from parallel.pipeline import Action
from parallel.pipeline_engine import PipelineEngine
from parallel.pipeline_split import check_microbatches, describe_split, stages_per_rank
from parallel.pipeline_stage import ModelPart
from parallel.sharded_model import build_sharded_model
from scripts.cli.command import command
from scripts.cli.outputs import PNG, check_output, write_text
from scripts.cli.parser import CommandParser, whole
from scripts.layout_trials.asked import start_ranks
from train.errors import ROOT

mpl.use("Agg")
import matplotlib.pyplot as plt

CPU = torch.device("cpu")
COLOURS = {"F": "#4c78a8", "B": "#59a14f", "I": "#8cd17d", "W": "#f28e2b"}
NAMES = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}
CLOSED_FORMS = {  # idle time of a rank, from mean times of an action: f, b (whole), w, and P ranks
    "gpipe": lambda f, b, w, P: (P - 1) * (f + b),
    "1f1b": lambda f, b, w, P: (P - 1) * (f + b),
    "interleaved1f1b": lambda f, b, w, P: (P - 1) * (f + b),
    "interleavedzerobubble": lambda f, b, w, P: (P - 1) * max(0.0, f + b - 2 * w),
    "zbvzerobubble": lambda f, b, w, P: 0.0,  # with f = b - w = w
    "dualpipev": lambda f, b, w, P: (P - 1) * max(0.0, f + 2 * b - 3 * w),  # nothing overlaps here
}

Timeline = list[list[Action]]  # by rank


def read_model(name: str) -> ModelConfig:
    """A model of conf/model."""
    path = ROOT / "conf" / "model" / f"{name}.yaml"
    return ModelConfig(**yaml.safe_load(path.read_text()))


def microbatches(config: ModelConfig, args: argparse.Namespace) -> list[Batch]:
    """Rows of one document of random tokens."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.rows, args.seq_len)
    batches = []
    for _ in range(args.microbatches):
        ids = torch.randint(1, config.vocab_size, shape, generator=generator)
        labels = torch.full((*shape, 1 + config.num_nextn_predict_layers), IGNORE)
        for k in range(labels.shape[-1]):
            labels[:, : -1 - k, k] = ids[:, 1 + k :]
        batches.append(Batch(ids, torch.zeros_like(ids), labels))
    return batches


def on_rank(rank: int, schedule: str, folder: str, args: argparse.Namespace) -> None:
    """One process; rank 0 writes the actions of all."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=args.pp
    )
    config, layout = read_model(args.model), layout_of(schedule, args)
    mesh = build_mesh(layout, "cpu")
    model = build_sharded_model(config, mesh, CPU, seq_len=args.seq_len)
    optimizer = build_optimizer(
        model.named_parameters(), OptimConfig(), split_counts={"o_groups": config.o_groups},
        group=mesh.data.get_group(),
    )  # fmt: skip
    assert isinstance(model, ModelPart)
    engine = PipelineEngine(model, optimizer, CPU, 0.0, mesh)
    batches = microbatches(config, args)
    tokens = float(args.microbatches * args.rows * args.seq_len)
    objective = Objective((tokens,) * (1 + config.num_nextn_predict_layers), tokens)
    steps: list[Timeline] = []
    for _ in range(1 + args.steps):
        engine.optimizer.zero_grad()
        dist.barrier()
        engine.forward_backward(batches, objective)
        steps.append(engine.gather(engine.pipeline.actions))
    if rank == 0:
        torch.save(min(steps[1:], key=span), f"{folder}/actions.pt")
    dist.barrier()
    dist.destroy_process_group()


def layout_of(schedule: str, args: argparse.Namespace) -> ParallelConfig:
    """Checked: as many ranks as stages of one rank each."""
    layout = ParallelConfig(pp=args.pp, dp_shard=1, schedule=schedule).resolve(args.pp)
    check_layout(layout, read_model(args.model))
    check_microbatches(layout, args.microbatches, f"--microbatches {args.microbatches}")
    return layout


def run(schedule: str, args: argparse.Namespace) -> Timeline:
    """Actions of one step by rank; seconds from the first of all."""
    layout_of(schedule, args)
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(on_rank, (schedule, folder, args), args.pp)
        ranks: Timeline = torch.load(f"{folder}/actions.pt", weights_only=False)
    zero = min(action.start for actions in ranks for action in actions)
    return [
        [Action(a.kind, a.stage, a.microbatch, a.start - zero, a.stop - zero) for a in actions]
        for actions in ranks
    ]


def span(ranks: Timeline) -> float:
    """Seconds from the first action of any rank to the last."""
    actions = [action for of_rank in ranks for action in of_rank]
    return max(a.stop for a in actions) - min(a.start for a in actions)


def bubble(ranks: Timeline) -> float:
    """Share of the step in which ranks run nothing, mean over ranks."""
    busy = sum(a.stop - a.start for actions in ranks for a in actions)
    return 1 - busy / (span(ranks) * len(ranks))


def closed_form(schedule: str, ranks: Timeline) -> float:
    """The bubble by the formula of the schedule's paper, with the mean times measured."""
    times: dict[str, list[float]] = defaultdict(list)
    for actions in ranks:
        for a in actions:
            times[a.kind].append(a.stop - a.start)
    mean: dict[str, float] = defaultdict(float, {k: sum(t) / len(t) for k, t in times.items()})
    weights = mean["W"]
    whole = mean["I"] + mean["W"] if weights else mean["B"]
    idle = CLOSED_FORMS[schedule](mean["F"], whole, weights, len(ranks))
    count = len(times["F"]) / len(ranks)  # stage-microbatches of a rank
    return idle / (idle + count * (mean["F"] + whole))


def simulated(ranks: Timeline) -> Timeline:
    """The same actions in the same order, each as early as what it needs allows."""
    last = max(a.stage for actions in ranks for a in actions)
    done: dict[tuple[str, int, int], float] = {}
    clock, place = [0.0] * len(ranks), [0] * len(ranks)
    out: Timeline = [[] for _ in ranks]
    while any(p < len(actions) for p, actions in zip(place, ranks, strict=True)):
        moved = False
        for rank, actions in enumerate(ranks):
            while place[rank] < len(actions):
                action = actions[place[rank]]
                needs = _needs(action, last)
                if not all(need in done for need in needs):
                    break
                start = max([clock[rank], *(done[need] for need in needs)])
                clock[rank] = start + action.stop - action.start
                kind = "F" if action.kind == "F" else "W" if action.kind == "W" else "B"
                done[kind, action.stage, action.microbatch] = clock[rank]
                out[rank].append(
                    Action(action.kind, action.stage, action.microbatch, start, clock[rank])
                )
                place[rank] += 1
                moved = True
        assert moved, "the order that ran cannot run"
    return out


def _needs(action: Action, last: int) -> list[tuple[str, int, int]]:
    stage, microbatch = action.stage, action.microbatch
    if action.kind == "F":
        return [("F", stage - 1, microbatch)] if stage else []
    if action.kind == "W":
        return [("B", stage, microbatch)]
    above = [("B", stage + 1, microbatch)] if stage < last else []
    return [("F", stage, microbatch), *above]


def draw(drawn: dict[str, Timeline], path: Path, title: str) -> None:
    """One row a rank, one panel a schedule; the second stage of a rank is hatched."""
    figure, axes = plt.subplots(
        len(drawn), 1, figsize=(13, 0.9 + sum(0.7 + 0.45 * len(r) for r in drawn.values())),
        squeeze=False,
    )  # fmt: skip
    for axis, (schedule, ranks) in zip(axes[:, 0], drawn.items(), strict=True):
        for rank, actions in enumerate(ranks):
            first = min(a.stage for a in actions)
            for a in actions:
                axis.barh(
                    rank, a.stop - a.start, left=a.start, height=0.85, color=COLOURS[a.kind],
                    edgecolor="white", linewidth=0.4, hatch="" if a.stage == first else "////",
                )  # fmt: skip
                axis.text((a.start + a.stop) / 2, rank, str(a.microbatch), ha="center",
                          va="center", fontsize=6)  # fmt: skip
        axis.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in range(len(ranks))])
        axis.invert_yaxis()
        axis.set_title(
            f"{schedule}: bubble {bubble(ranks):.0%} measured, {closed_form(schedule, ranks):.0%}"
            f" closed form, {bubble(simulated(ranks)):.0%} simulated",
            loc="left", fontsize=9,
        )  # fmt: skip
    axes[-1, 0].set_xlabel("seconds; numbers are microbatches")
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[k]) for k in NAMES]
    figure.legend(handles, NAMES.values(), loc="upper right", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def text_of(ranks: Timeline, width: int = 100) -> str:
    """A line a rank: the kind of action that runs, dots where none does; lower case: 2nd stage."""
    seconds = span(ranks)
    lines = []
    for rank, actions in enumerate(ranks):
        line, first = ["."] * width, min(a.stage for a in actions)
        for a in actions:
            mark = a.kind if a.stage == first else a.kind.lower()
            for i in range(int(a.start / seconds * width), max(1, round(a.stop / seconds * width))):
                line[min(i, width - 1)] = mark
        lines.append(f"  rank {rank} {''.join(line)}")
    return "\n".join(lines)


@command()
def main(words: Sequence[str] | None = None) -> None:
    """Print the table and the lines, write the picture."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("schedules", nargs="*", default=SCHEDULES, help=", ".join(SCHEDULES))
    parser.add_argument("--pp", type=whole(least=1), default=2, help="ranks")
    parser.add_argument("--model", default="v4_tiny", help="of conf/model")
    parser.add_argument("--microbatches", type=whole(least=1), default=8)
    parser.add_argument("--rows", type=whole(least=1), default=4, help="of a microbatch")
    parser.add_argument("--seq-len", type=whole(least=1), default=128)
    parser.add_argument(
        "--steps", type=whole(least=1), default=5, help="of which the fastest is shown"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/timeline"), help="folder")
    args = parser.parse_args(words)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    check_output("--out", args.out / "timeline.txt", "closed")
    check_output("--out", args.out / "timeline.png", PNG)
    drawn: dict[str, Timeline] = {}
    report = [
        "{:22} {:>6} {:>8} {:>9} {:>9} {:>9}".format(
            "schedule", "stages", "step s", "measured", "closed", "simulated"
        )
    ]
    for schedule in args.schedules:
        ranks = drawn[schedule] = run(schedule, args)
        stages = args.pp * stages_per_rank(schedule)
        report.append(
            f"{schedule:22} {stages:6} {span(ranks):8.3f} {bubble(ranks):9.1%}"
            f" {closed_form(schedule, ranks):9.1%} {bubble(simulated(ranks)):9.1%}"
        )
    title = (
        f"{args.model}, {args.pp} ranks on {os.cpu_count()} cores, {args.microbatches} microbatches"
        f" of {args.rows} x {args.seq_len} tokens; the fastest of {args.steps} steps"
    )
    for schedule, ranks in drawn.items():
        layout = layout_of(schedule, args)
        report.append(describe_split(read_model(args.model), layout, args.seq_len))
        report.append(text_of(ranks))
    text = "\n".join([title, *report])
    print(text)
    write_text(args.out / "timeline.txt", text + "\n")
    draw(drawn, args.out / "timeline.png", title)
