"""Does this machine, or this cluster, train alike under every layout? Measured beside one process.

    python scripts/layouts.py                                # the default list, on this machine
    python scripts/layouts.py "dp_shard=2 ep=2" "pp=2 schedule=zbvzerobubble" --steps 5
    torchrun --nnodes 2 --nproc-per-node 8 ... scripts/layouts.py "dp_shard=16 ep=8"

A layout is a list of degrees; ``micro=1`` sets the rows of a microbatch on a rank (default: all of
the rank's rows, under pp what fills the pipeline). Processes talk over NCCL where there are CUDA
devices for all of them, else over gloo. Under torchrun every layout must have as many ranks as
torchrun started.

The model is small and holds every part: hash and learned routers, CSA, HCA, MTP, indexer loss,
balance loss and bias, Muon, packed documents. Columns (bounds in brackets):

  bits       initial weights, buffers [the same]
  order      rows of every step [the same]
  loss       losses of step 1, relative [1e-6]
  gradient   farthest gradient of step 1, relative Frobenius; where fp32 itself moves it more (one
             process against float64, in the order of its rows that is farthest), a third of the
             distance in units of that [1e-5]
  raw        farthest gradient without this allowance, for information
  update     farthest Muon or AdamW update from identical gradients, relative [1e-6]
  replayed   largest relative distance of the loss in all steps, choices of gates and indexers
             replayed from one process [1e-5; of a quantised run as free, since a weight that is one
             rounding away may fall to the other side of an FP4 edge]
  free       the same with free choices [3 x one process adding up its rows in other orders]
  path       of the weights after the free steps: distance over way gone [3 x as above]
  bf16       loss of the last step in bf16 against fp32 [2e-2]

Exit codes: 0 all within their bounds, 1 not, 2 a layout that cannot be.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from parallel.config import SCHEDULES
from parallel.mesh import leave_process_group
from scripts.cli.command import command
from scripts.cli.outputs import check_output, write_json, write_text
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
)  # fmt: skip
from scripts.layout_trials.reference import Reference, reference
from scripts.layout_trials.trials import last_loss, trials
from train.build import build_layout
from train.errors import UserError
from train.record.receipt import source_hash

DEFAULT = (
    "dp_shard=1 micro=4", "dp_shard=1 micro=2",
    "dp_shard=2", "dp_shard=2 micro=2", "dp_shard=2 micro=1", "dp_shard=2 ep=2",
    *(f"pp=2 schedule={schedule}" for schedule in SCHEDULES),
    "dp_shard=4", "dp_replicate=2 dp_shard=2", "dp_shard=4 ep=4", "dp_shard=4 ep=2",
    "dp_replicate=2 dp_shard=2 ep=2",
    "pp=2 dp_shard=2", "pp=4", "dp_shard=8", "dp_shard=8 ep=4",
    "pp=2 dp_replicate=2 dp_shard=2 ep=2",
    *(f"pp=2 dp_shard=2 ep=2 schedule={schedule} micro=1" for schedule in SCHEDULES),
    "cp=2", "cp=2 ep=2", "cp=4", "cp=2 dp_shard=2", "cp=2 dp_shard=2 ep=2", "pp=2 cp=2",
    "pp=2 cp=2 dp_shard=2 ep=2",
)  # fmt: skip
TRIALS = ("start", "update", "replay", "free", "bf16")
# Column -> (field of a result, bound). A bound of None depends on one process's own noise.
BOUNDS: dict[str, tuple[str, float | None]] = {
    "loss": ("loss", 1e-6),
    "gradient": ("gradient", 1e-5),
    "update": ("update", 1e-6),
    "replayed": ("replay_losses", 1e-5),
    "free": ("free_losses", None),
    "path": ("free_weights", None),
    "bf16": ("bf16", 2e-2),
}


# ---- processes -----------------------------------------------------------------------------------
def measure(
    layout: TrialLayout, args: argparse.Namespace, corpus: str, ref: Reference
) -> dict[str, Any]:
    """All trials of a layout in this process, which is one of its ranks."""
    out = trials(compose(layout, args, corpus), ref, args.trials)
    if "bf16" in args.trials:
        low = last_loss(
            compose(layout, args, corpus, "train.precision=bf16", "optim.muon.dtype=auto"),
            args.steps,
        )
        out["bf16"] = abs(low - ref.losses[-1]["loss"]) / ref.losses[-1]["loss"]
    return out


def on_rank(
    rank: int, port: int, layout: TrialLayout, args: argparse.Namespace, corpus: str
) -> None:
    """One process of a layout on this machine; rank 0 writes the result."""
    join(rank, port, layout.ranks)
    ref = torch.load(f"{corpus}/reference.pt", weights_only=False)
    result = measure(layout, args, corpus, ref)
    if rank == 0:
        Path(corpus, "result.json").write_text(
            json.dumps(result, allow_nan=False), encoding="utf-8"
        )
    leave_process_group()


def spawn(layout: TrialLayout, args: argparse.Namespace, corpus: str) -> dict[str, Any]:
    """Run a layout in processes of its own; one that dies says so in its result."""
    try:
        start_ranks(on_rank, (free_port(), layout, args, corpus), layout.ranks)
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        print(error, file=sys.stderr)  # with the rank's traceback
        return {"ranks": layout.ranks, "died": str(error).strip().splitlines()[-1]}
    return json.loads(Path(corpus, "result.json").read_text(encoding="utf-8"))


def shared_reference(args: argparse.Namespace, corpus: str, launched: int) -> Reference:
    """One process's results: rank 0's, on every rank."""
    found: list[Reference | None] = [None]
    if int(os.environ.get("RANK", "0")) == 0:
        found[0] = own_reference(args, corpus)
    if launched > 1:
        dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    assert found[0] is not None
    return found[0]


def own_reference(args: argparse.Namespace, corpus: str) -> Reference:
    """Compute it, or take it from the file of an earlier call with the same options.

    Raises:
        UserError: the file holds another.
    """
    file, asked = Path(args.reference) if args.reference else None, asked_for(args)
    if file is not None and file.exists():
        of, ref = torch.load(file, weights_only=False)
        if of != asked:
            raise UserError(f"--reference {file} was computed with {of}, now it is {asked}")
        return ref
    layout = TrialLayout("one process", {"dp_shard": "1"}, args.rows)
    ref = reference(compose(layout, args, corpus), args.steps, args.orders)
    if file is not None:
        torch.save((asked, ref), file)
    return ref


def asked_for(args: argparse.Namespace) -> dict[str, Any]:
    """The options and sources on which every figure depends."""
    keys = ("model", "steps", "rows", "seq_len", "device", "orders", "set")
    return {key: vars(args)[key] for key in keys} | {"source_sha256": source_hash()}


def measured_for(args: argparse.Namespace) -> dict[str, Any]:
    """:func:`asked_for`, and what was measured."""
    return asked_for(args) | {"trials": list(args.trials)}


def measured_before(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """TrialLayout -> result, from the file of an earlier call with the same options and sources.

    Raises:
        UserError: the file holds results of others.
    """
    file = Path(args.json) if args.json else None
    if file is None or not file.exists():
        return {}
    found = json.loads(file.read_text(encoding="utf-8"))
    asked = measured_for(args)
    if found.get("asked") != asked:
        raise UserError(f"--json {file} was measured with {found.get('asked')}, now it is {asked}")
    return {result["layout"]: result for result in found["results"] if "died" not in result}


# ---- the table -----------------------------------------------------------------------------------
def failures(result: dict[str, Any], ref: Reference) -> list[str]:
    """Columns that break their bound."""

    def bound_of(column: str, fixed: float | None) -> float:
        if fixed is None:
            return allowed(column, ref)
        return max(fixed, allowed("free", ref)) if column == "replayed" and ref.quantised else fixed

    if "died" in result:
        return [f"it died ({result['died']})"]
    broken = [key for key in ("same_bits", "same_order") if result.get(key) is False]
    for column, (name, bound) in BOUNDS.items():
        if name in result and not result[name] <= bound_of(column, bound):
            broken.append(column)
    return broken


def allowed(column: str, ref: Reference) -> float:
    """Bound of a free run."""
    return 3 * max(ref.noise["losses" if column == "free" else "weights"], default=math.inf)


COLUMNS = (
    "layout", "ranks", "bits", "order", "loss", "gradient", "raw", "update", "replayed", "free",
    "path", "bf16", "verdict",
)  # fmt: skip


def row(layout: TrialLayout, result: dict[str, Any], broken: list[str]) -> list[str]:
    """Cells of a layout."""

    def number(key: str) -> str:
        return f"{result[key]:.1e}" if key in result else ""

    def same(key: str) -> str:
        return {True: "same", False: "DIFFER", None: ""}[result.get(key)]

    return [
        layout.text, str(result["ranks"]), same("same_bits"), same("same_order"), number("loss"),
        number("gradient"), number("gradient_raw"), number("update"), number("replay_losses"),
        number("free_losses"), number("free_weights"), number("bf16"),
        f"BROKEN: {', '.join(broken)}" if broken else "ok",
    ]  # fmt: skip


def show(cells: list[str], width: int) -> None:
    """One line of the table, at once."""
    print(
        f"{cells[0]:{width}} {cells[1]:>5} "
        + " ".join(f"{c:>8}" for c in cells[2:-1])
        + f"  {cells[-1]}",
        flush=True,
    )


@command()
def main(words: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code."""
    args = options().parse_args(words)
    if args.json:
        check_output("--json", Path(args.json), '"noise"')
    if args.markdown:
        check_output("--markdown", Path(args.markdown), "# Layouts beside one process")
    torch.set_num_threads(1)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    with tempfile.TemporaryDirectory() as corpus:
        write_corpus(corpus)
        layouts = [parse(text) for text in args.layouts]
        runs = [compose(layout, args, corpus) for layout in layouts]
        for layout in layouts:
            if launched > 1 and layout.ranks != launched:
                raise UserError(
                    f"layout {layout.text!r} has {layout.ranks} ranks, but torchrun started"
                    f" {launched}"
                )
        if launched > 1:
            build_layout(runs[0])  # joins the others
        try:
            return compare(layouts, args, corpus, launched)
        finally:
            leave_process_group()


def compare(
    layouts: list[TrialLayout], args: argparse.Namespace, corpus: str, launched: int
) -> int:
    """One line a layout, then what one process does to itself; the exit code."""
    before = measured_before(args)
    ref = shared_reference(args, corpus, launched)
    speaks = int(os.environ.get("RANK", "0")) == 0
    if launched == 1:
        torch.save(ref, f"{corpus}/reference.pt")
    width = max(len("layout"), *(len(layout.text) for layout in layouts))
    if speaks:
        show(list(COLUMNS), width)
    lines, results = [], []
    for layout in sorted(layouts, key=lambda one: one.text not in before):  # keeps them on file
        if layout.text in before:
            result = before[layout.text]
        elif launched > 1 or layout.ranks == 1:
            result = measure(layout, args, corpus, ref)
        else:
            result = spawn(layout, args, corpus)
        results.append({"layout": layout.text, **result, "broken": failures(result, ref)})
        lines.append(row(layout, result, results[-1]["broken"]))
        if speaks:  # a long table is of use before its end
            show(lines[-1], width)
            write(lines, results, ref, args)
    if speaks:
        print("\n".join(["", *about(args, ref, results)]))
    return 1 if any(result["broken"] for result in results) else 0


def write(
    lines: list[list[str]],
    results: list[dict[str, Any]],
    ref: Reference,
    args: argparse.Namespace,
) -> None:
    """The files that were asked for, with the rows that are done."""
    notes = about(args, ref, results)
    if args.json:
        found = {
            "asked": measured_for(args), "results": results, "noise": ref.noise,
            "losses": ref.losses, "notes": notes,
        }  # fmt: skip
        write_json(Path(args.json), found)
    if args.markdown:
        write_text(Path(args.markdown), markdown(lines, notes))


def _listed(values: list[float]) -> str:
    return " ".join(f"{value:.1e}" for value in sorted(values)) or "not measured"


def about(args: argparse.Namespace, ref: Reference, results: list[dict[str, Any]]) -> list[str]:
    """What the table does not say."""
    first, last = ref.losses[0], ref.losses[-1]
    notes = [
        f"{args.model}, {args.rows} rows of {args.seq_len} tokens a step, {args.steps} steps;"
        f" torch {torch.__version__} on {platform.machine()}, device {args.device}",
        f"one process: total loss {first['total']:.7f} at step 1, {last['total']:.7f} at step"
        f" {len(ref.losses)}",
        f"one process from itself under {args.orders} other orders of its rows:"
        f" losses {_listed(ref.noise['losses'])}; path of the weights"
        f" {_listed(ref.noise['weights'])}",
    ]
    measured = [r for r in results if "gradient_raw" in r]
    if measured:
        raw = max(measured, key=lambda r: r["gradient_raw"])
        notes.append(
            f"farthest raw gradient: {raw['gradient_raw_name']} ({raw['layout']}),"
            f" {raw['gradient_raw']:.1e}; one process in fp32 is {raw['gradient_raw_rounding']:.1e}"
            " from float64 there"
        )
        worst = max(measured, key=lambda r: r["gradient"])
        notes.append(f"farthest gradient: {worst['gradient_name']} ({worst['layout']})")
    return notes


def markdown(lines: list[list[str]], notes: list[str]) -> str:
    """The same as a document."""
    command = " ".join(
        ["python", "scripts/layouts.py", *(f'"{a}"' if " " in a else a for a in sys.argv[1:])]
    )
    table = [list(COLUMNS), ["---"] * len(COLUMNS), *lines]
    legend = (__doc__ or "").partition("Columns")[2].partition("Exit codes")[0]
    return "\n".join(
        [
            "# Layouts beside one process", "", "Written by", "", "```bash", command, "```", "",
            *(f"| {' | '.join(cells)} |" for cells in table), "", *(f"- {note}" for note in notes),
            "", "Columns" + legend.rstrip().replace("\n\n", "\n\n```text\n", 1), "```", "",
        ]
    )  # fmt: skip


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = CommandParser(description=__doc__)
    add_run_options(parser, DEFAULT, steps=20)
    parser.add_argument(
        "--orders", type=whole(least=0), default=6, help="permuted accumulation orders"
    )
    parser.add_argument(
        "--trials", nargs="+", choices=TRIALS, default=TRIALS, help="what to measure"
    )
    parser.add_argument(
        "--reference", metavar="FILE", help="one process's results: read, or written if absent"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="write everything that was measured; layouts in it are not measured again",
    )
    parser.add_argument("--markdown", metavar="FILE", help="write the table as a document")
    return parser


if __name__ == "__main__":
    sys.exit(main())
