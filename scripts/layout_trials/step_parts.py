"""Where the time of a step goes on several processes: measured from torch.profiler's traces.

    python scripts/bench.py step_parts --out runs/step_parts    # dp_shard=2 and dp_shard=2 ep=2
    python scripts/bench.py step_parts "dp_shard=4 ep=2 micro=1" --steps 5 --out runs/step_parts

Every rank is profiled over the same steps; its trace stays in the folder (open it in Perfetto). The
main thread's time is cut into parts that add up to the step:

  compute    forward and backward passes, data, and everything that is no other part
  gather     parameters made whole (FSDP)
  dispatch   token rows and counts between experts' ranks (all-to-all)
  reduction  gradients, losses and norms summed over ranks
  optimizer  clipping and update; Newton-Schulz among it
  exchange   matrices between Muon's owners (all-to-all inside the optimizer)
  idle       waiting in a collective for a rank that had not begun it yet

The rest of a collective, once its last rank has begun it, is the time of the transfer. On CPU
ranks that share cores all figures are good for shares only, not for speeds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from parallel.mesh import leave_process_group
from scripts.cli.command import command
from scripts.cli.outputs import PNG, check_output, write_json
from scripts.cli.parser import CommandParser, whole
from scripts.layout_trials.asked import (
    TrialLayout,
    add_run_options,
    compose,
    free_port,
    join,
    parse,
    start_ranks,
    write_corpus,
)
from scripts.layout_trials.steps import build_bench, steps

PARTS = ("compute", "gather", "dispatch", "reduction", "optimizer", "exchange", "idle")
STEP, OPTIMIZER = "step_parts:step", "step_parts:optimizer"
# Operation on the main thread -> its part outside the optimizer, and in it.
COLLECTIVES = {
    "c10d::_allgather_base_": ("gather", "gather"),
    "c10d::_reduce_scatter_base_": ("reduction", "reduction"),
    "c10d::allreduce_": ("reduction", "reduction"),
    "c10d::alltoall_base_": ("dispatch", "exchange"),
    "_c10d_functional::wait_tensor": ("dispatch", "exchange"),
}
_ISSUES = "_c10d_functional::all_to_all_single"  # does not wait: its wait_tensor does


# ---- measuring -----------------------------------------------------------------------------------
def on_rank(
    rank: int, port: int, layout: TrialLayout, args: argparse.Namespace, corpus: str, out: str
) -> None:
    """Profile one rank; its trace goes to ``out``."""
    join(rank, port, layout.ranks)
    bench = build_bench(compose(layout, args, corpus), alone=False)
    update = bench.engine.optimizer_step

    def marked(lr: float, finite: bool) -> Any:
        with record_function(OPTIMIZER):
            return update(lr, finite)

    bench.engine.optimizer_step = marked
    steps(bench, args.warm_up)
    kinds = [ProfilerActivity.CPU]
    if bench.engine.device.type == "cuda":
        kinds.append(ProfilerActivity.CUDA)
    with profile(activities=kinds) as profiler:
        for _ in range(args.steps):
            with record_function(STEP):
                steps(bench, 1)
    profiler.export_chrome_trace(f"{out}/rank{rank}.json")
    leave_process_group()


# ---- reading traces ------------------------------------------------------------------------------
@dataclass(frozen=True)
class TraceEvent:
    """An event of the main thread.

    Attributes:
        name: of the operation.
        start: microseconds on the machine's clock.
        stop: microseconds.
    """

    name: str
    start: float
    stop: float

    def holds(self, other: TraceEvent) -> bool:
        """Whether ``other`` lies inside."""
        return self.start <= other.start and other.stop <= self.stop


@dataclass(frozen=True)
class Collective:
    """A stretch in which the main thread is in a collective.

    Attributes:
        span: the stretch.
        number: of the collective among all of its rank; the same on every rank.
        begun: when this rank began it; before ``span`` where it was issued earlier.
    """

    span: TraceEvent
    number: int
    begun: float


@dataclass
class Trace:
    """One rank's profiled steps."""

    steps: list[TraceEvent]
    optimizer: list[TraceEvent]
    collectives: list[Collective]


def read_trace(path: Path) -> Trace:
    """Parse a Chrome trace of :func:`on_rank`.

    Raises:
        ValueError: it holds no step.
    """
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    step_events = [e for e in events if e["name"] == STEP and e.get("cat") == "user_annotation"]
    if not step_events:
        raise ValueError(f"{path} holds no {STEP} range")
    thread = step_events[0]["tid"]
    spans = sorted(
        (
            TraceEvent(e["name"], float(e["ts"]), float(e["ts"]) + float(e["dur"]))
            for e in events
            if e["tid"] == thread and e.get("cat") in ("cpu_op", "user_annotation")
        ),
        key=lambda span: (span.start, -span.stop),
    )
    return Trace(
        [s for s in spans if s.name == STEP],
        [s for s in spans if s.name == OPTIMIZER],
        list(_collectives(spans)),
    )


def _collectives(spans: list[TraceEvent]) -> Iterator[Collective]:
    """In order; a wait belongs to the earliest collective that was issued and not waited for."""
    issued: list[tuple[int, float]] = []
    issuing_until, number = 0.0, 0
    for span in spans:
        if span.name == _ISSUES:
            issuing_until = span.stop
        if span.name not in COLLECTIVES:
            continue
        if span.name == "_c10d_functional::wait_tensor":
            if issued:
                which, begun = issued.pop(0)
                yield Collective(span, which, begun)
            continue
        if span.stop <= issuing_until:
            issued.append((number, span.start))
        yield Collective(span, number, span.start)
        number += 1


def parts_of(traces: list[Trace]) -> list[dict[str, float]]:
    """Seconds a step of every part, for every rank.

    Args:
        traces: of all ranks, which issue the same collectives in the same order.
    """
    last_begun: dict[int, float] = defaultdict(float)
    for trace in traces:
        for collective in trace.collectives:
            last_begun[collective.number] = max(last_begun[collective.number], collective.begun)
    return [_parts(trace, last_begun) for trace in traces]


def _parts(trace: Trace, last_begun: dict[int, float]) -> dict[str, float]:
    found: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    for collective in trace.collectives:
        span = collective.span
        if not any(step.holds(span) for step in trace.steps):
            continue
        inside = any(o.holds(span) for o in trace.optimizer)
        idle = min(max(last_begun[collective.number] - span.start, 0.0), span.stop - span.start)
        found["idle"] += idle
        found[COLLECTIVES[span.name][inside]] += span.stop - span.start - idle
        if inside:
            found["optimizer"] -= span.stop - span.start
    found["optimizer"] += sum(o.stop - o.start for o in trace.optimizer)
    total = sum(step.stop - step.start for step in trace.steps)
    found["compute"] = total - sum(found.values())
    return {part: value / 1e6 / len(trace.steps) for part, value in found.items()}


# ---- showing -------------------------------------------------------------------------------------
def table(measured: dict[str, list[dict[str, float]]]) -> str:
    """Milliseconds and fraction of each part."""
    lines = [f"{'layout':20} {'rank':>4} {'step ms':>8} " + " ".join(f"{p:>14}" for p in PARTS)]
    for text, ranks in measured.items():
        for rank, parts in enumerate(ranks):
            total = sum(parts.values())
            cells = " ".join(f"{1e3 * parts[p]:7.1f} ({parts[p] / total:4.2f})" for p in PARTS)
            lines.append(f"{text:20} {rank:4} {1e3 * total:8.1f} {cells}")
    return "\n".join(lines)


def draw(measured: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Stacked bars, one a rank."""
    import matplotlib.pyplot as plt  # noqa: PLC0415  a second, which --help need not wait for

    bars = [(f"{text}\nrank {r}", p) for text, ranks in measured.items()
            for r, p in enumerate(ranks)]  # fmt: skip
    figure, axes = plt.subplots(figsize=(2 + 1.3 * len(bars), 4.5))
    bottom = [0.0] * len(bars)
    for part in PARTS:
        heights = [1e3 * parts[part] for _, parts in bars]
        axes.bar(range(len(bars)), heights, bottom=bottom, label=part, width=0.6)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set_xticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
    axes.set_ylabel("milliseconds a step")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@command()
def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, draw."""
    parser = CommandParser(description=__doc__)
    add_run_options(parser, ("dp_shard=2", "dp_shard=2 ep=2"), steps=3)
    parser.add_argument(
        "--warm-up", type=whole(least=0), default=2, help="steps before the profiled ones"
    )
    parser.add_argument("--out", default="runs/step_parts", help="folder of traces and plot")
    args = parser.parse_args(words)
    table_file, picture = Path(args.out, "step_parts.json"), Path(args.out, "step_parts.png")
    check_output("--out", table_file, f'"{PARTS[0]}"')
    check_output("--out", picture, PNG)
    measured: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as corpus:
        write_corpus(corpus)
        for text in args.layouts:
            layout = parse(text)
            out = Path(args.out, text.replace(" ", ","))
            out.mkdir(parents=True, exist_ok=True)
            start_ranks(on_rank, (free_port(), layout, args, corpus, str(out)), layout.ranks)
            measured[text] = parts_of(
                [read_trace(out / f"rank{rank}.json") for rank in range(layout.ranks)]
            )
    print(table(measured))
    write_json(table_file, measured)
    draw(measured, picture)
    return 0
