"""One training step (forward and backward, no optimizer) of ours beside others, in one run.

Contestants, on equal batches and in the same dtype: ``ours``; ``hf``, transformers' DeepseekV4 of
the same sizes; ``dense``, a plain transformer with as many active parameters; ``ours_lm``, ours
without the losses that ``hf`` lacks. Every measurement runs in a process of its own, so that its
peak memory is its own; rounds alternate the contestants, and ratios are taken within a round.

A case is ROWSxTOKENS; with :block or :selective our blocks recompute (train.activation_checkpoint).

The limit is the time the matmuls alone would take at the rate measured in the same process.
Results are written after each measurement; the same command goes on where it was stopped.
transformers at 1x8192 takes minutes and 15 GB: leave it out with --skip hf:1x8192.

    python scripts/bench.py step --cases 8x512 16x256 --dtypes bf16
    python scripts/bench.py step --cases 1x4096 1x65536:block --contestants ours --rounds 1
    python scripts/bench.py step --profile ours --cases 1x4096 --dtypes fp32
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from scripts.cli.command import command
from scripts.cli.outputs import PNG, check_output, write_json
from scripts.cli.parser import CommandParser, real, whole
from train.errors import ROOT, UserError

CHILD = "scripts.benchmarks.child"  # a module: as a file it would find optim.py beside it
_Measured = dict[str, Any]
CONTESTANTS = ("ours", "ours_lm", "hf", "dense")


# ---- the driver -------------------------------------------------------------------------------


def run_child(spec: _Measured, timeout: float) -> _Measured:
    """Measure in a fresh process; a failure becomes a result that says why."""
    words = [sys.executable, "-m", CHILD, json.dumps(spec, allow_nan=False)]
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"no result within {timeout:g} s"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else "no message (killed for memory?)"
        return {"failed": f"exit code {done.returncode}: {reason}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def environment(args: argparse.Namespace) -> _Measured:
    """What the numbers depend on; results of another environment are not mixed in."""
    versions = "import json, torch; print(json.dumps([torch.__version__, torch.get_num_threads()]))"
    found = subprocess.run([sys.executable, "-c", versions], capture_output=True, text=True)
    torch_version, threads = json.loads(found.stdout)
    return {
        "model": args.model,
        "device": args.device,
        "machine": platform.machine(),
        "torch": torch_version,
        "threads": threads,
        "hf_experts": args.hf_experts,
        "hf_checkpointing": args.hf_checkpointing,
        "keep_memory": args.keep_memory,
    }


def plan(args: argparse.Namespace) -> list[_Measured]:
    """All measurements in order: round by round, contestants in turn."""
    skipped = {tuple(item.split(":", 1)) for item in args.skip}
    specs = []
    for round_number in range(args.rounds):
        for dtype in args.dtypes:
            for case in args.cases:
                size, _, mode = case.partition(":")
                rows, seq_len = (int(n) for n in size.split("x"))
                for contestant in args.contestants:
                    if (contestant, case) in skipped:
                        continue
                    specs.append(
                        {
                            "contestant": contestant,
                            "case": case,
                            "rows": rows,
                            "seq_len": seq_len,
                            "activation_checkpoint": mode or "none",
                            "dtype": dtype,
                            "round": round_number,
                            "model": args.model,
                            "device": args.device,
                            "seconds": args.seconds,
                            "hf_experts": args.hf_experts,
                            "hf_checkpointing": args.hf_checkpointing,
                            "keep_memory": args.keep_memory,
                            "profile": False,
                        }
                    )
    return specs


def key_of(spec: _Measured) -> str:
    """Name of a measurement in the file of results."""
    return f"{spec['dtype']} {spec['case']} {spec['contestant']} {spec['round']}"


def earlier_results(path: Path) -> _Measured:
    """What an earlier start wrote.

    Raises:
        UserError: it is damaged.
    """
    try:
        document = json.loads(path.read_bytes())
        whole = isinstance(document["environment"], dict) and isinstance(document["results"], dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        whole, document = False, {}
    if not whole:
        raise UserError(f"--out: {path} is damaged: use --fresh, or another file")
    return document


def run_all(args: argparse.Namespace, document: _Measured) -> None:
    """Run what has no result yet, writing after each."""
    specs = plan(args)
    results: dict[str, _Measured] = document["results"]
    for number, spec in enumerate(specs, 1):
        key = key_of(spec)
        if "tokens_per_second" not in results.get(key, {}):
            results[key] = run_child(spec, args.timeout)
            write_json(args.out, document)
        result = results[key]
        text = result.get("failed") or (
            f"{result['tokens_per_second']:,.0f} tokens/s, {result['peak_bytes'] / 1e9:.2f} GB"
        )
        print(f"[{number}/{len(specs)}] {key}: {text}", flush=True)


def summary(document: _Measured) -> list[_Measured]:
    """One line a case and dtype: medians over rounds, ratios within rounds."""
    groups: dict[tuple[str, str], dict[str, dict[int, _Measured]]] = {}
    for key, result in document["results"].items():
        dtype, case, contestant, round_number = key.split()
        found = groups.setdefault((dtype, case), {}).setdefault(contestant, {})
        if "tokens_per_second" in result:
            found[int(round_number)] = result
    lines = []
    for (dtype, case), by_name in groups.items():
        line: _Measured = {"dtype": dtype, "case": case}
        for name, rounds in by_name.items():
            if rounds:
                line[name] = {
                    field: statistics.median(result[field] for result in rounds.values())
                    for field in (
                        "tokens_per_second",
                        "peak_bytes",
                        "limit_tokens_per_second",
                        "first_step_seconds",
                        "loss",
                    )
                }
        for other in ("hf", "dense"):
            pairs = by_name.get("ours", {}), by_name.get(other, {})
            both = sorted(pairs[0].keys() & pairs[1].keys())
            if both:
                line[f"speed_over_{other}"], line[f"memory_over_{other}"] = (
                    statistics.median(pairs[0][r][field] / pairs[1][r][field] for r in both)
                    for field in ("tokens_per_second", "peak_bytes")
                )
        lines.append(line)
    return lines


def print_summary(lines: list[_Measured]) -> None:
    """A table of speed, memory, ratios and the share of the machine's limit."""
    print(
        f"\n{'dtype':<6}{'case':>14} {'contestant':<10}{'tokens/s':>11}{'peak GB':>9}"
        f"{'limit tok/s':>13}{'of limit':>10}{'first s':>9}{'loss':>9}"
    )
    for line in lines:
        for name in CONTESTANTS:
            if found := line.get(name):
                share = found["tokens_per_second"] / found["limit_tokens_per_second"]
                print(
                    f"{line['dtype']:<6}{line['case']:>14} {name:<10}"
                    f"{found['tokens_per_second']:>11,.0f}{found['peak_bytes'] / 1e9:>9.2f}"
                    f"{found['limit_tokens_per_second']:>13,.0f}{share:>10.1%}"
                    f"{found['first_step_seconds']:>9.1f}{found['loss']:>9.4f}"
                )
        for other in ("hf", "dense"):
            if f"speed_over_{other}" in line:
                print(
                    f"{'':<16}ours / {other}: {line[f'speed_over_{other}']:.2f}x tokens/s,"
                    f" {line[f'memory_over_{other}']:.2f}x peak memory"
                )


def draw(lines: list[_Measured], path: Path) -> None:
    """Bars of tokens/s and peak memory by case, one column a dtype."""
    dtypes = sorted({line["dtype"] for line in lines})
    figure = Figure(figsize=(7 * len(dtypes), 8), layout="constrained")
    grid = figure.subplots(2, len(dtypes), squeeze=False)
    fields = (("tokens_per_second", 1.0, "tokens/s"), ("peak_bytes", 1e-9, "peak memory (GB)"))
    for column, dtype in enumerate(dtypes):
        chosen = [line for line in lines if line["dtype"] == dtype]
        names = [name for name in CONTESTANTS if any(name in line for line in chosen)]
        for row, (field, unit, title) in enumerate(fields):
            axes = grid[row][column]
            for i, name in enumerate(names):
                places = [at for at, line in enumerate(chosen) if name in line]
                heights = [chosen[at][name][field] * unit for at in places]
                left = [at + (i - (len(names) - 1) / 2) * 0.8 / len(names) for at in places]
                bars = axes.bar(left, heights, 0.8 / len(names), label=name)
                axes.bar_label(bars, fmt="%.3g", fontsize=8)
            axes.set_xticks(range(len(chosen)), [line["case"] for line in chosen])
            if row == 0:
                axes.set_yscale("log")  # speeds differ by orders of magnitude, memory starts at 0
            axes.set_title(f"{title}, {dtype}")
            axes.legend()
    figure.savefig(path, dpi=110)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=["16x256", "8x512", "1x4096", "1x8192"])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument(
        "--contestants", nargs="+", default=["ours", "hf", "dense"], choices=CONTESTANTS
    )
    parser.add_argument("--skip", nargs="*", default=[], help="CONTESTANT:CASE to leave out")
    parser.add_argument("--rounds", type=whole(least=1), default=3)
    parser.add_argument("--seconds", type=real(above=0), default=10.0, help="of measuring, each")
    parser.add_argument("--timeout", type=real(above=0), default=1800.0, help="seconds, each")
    parser.add_argument("--model", default="benchmark", help="or a name in conf/model, or a YAML")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--hf-experts", default="grouped_mm", choices=("grouped_mm", "batched_mm", "eager")
    )
    parser.add_argument("--hf-checkpointing", action="store_true")
    parser.add_argument(
        "--keep-memory",
        choices=("ours", "all"),
        default="ours",
        help="who runs with freed memory kept by malloc: our launcher always does; all: peers too",
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_step.json"))
    parser.add_argument("--fresh", action="store_true", help="drop the results in that file")
    parser.add_argument(
        "--profile", choices=CONTESTANTS, help="print one step's operations instead"
    )
    return parser.read(words, _check_cases)


def _check_cases(args: argparse.Namespace) -> None:
    for case in args.cases:
        size, _, mode = case.partition(":")
        if [part.isdecimal() for part in size.split("x")] != [True, True]:
            raise UserError(f"--cases {case}: rows x tokens is wanted, as in 8x512")
        if mode not in ("", "block", "selective"):
            raise UserError(f"--cases {case}: {mode} is neither block nor selective")


@command()
def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, draw."""
    args = parse(words)
    if args.profile:
        args.contestants, args.rounds = [args.profile], 1
        for spec in plan(args):
            result = run_child(spec | {"profile": True}, args.timeout)
            print(f"{key_of(spec)}\n{result.get('profile') or result['failed']}")
        return
    check_output("--out", args.out, '"environment"')
    check_output("--out", args.out.with_suffix(".png"), PNG)
    document: _Measured = {"environment": environment(args), "results": {}}
    if args.out.exists() and not args.fresh:
        earlier = earlier_results(args.out)
        if earlier["environment"] != document["environment"]:
            raise UserError(f"{args.out} holds results of another set-up: use --out or --fresh")
        document = earlier
    run_all(args, document)
    failed = {k: r["failed"] for k, r in document["results"].items() if "failed" in r}
    document["summary"] = summary(document)
    write_json(args.out, document)
    print_summary(document["summary"])
    for key, reason in failed.items():
        print(f"failed: {key}: {reason}")
    if len(failed) == len(document["results"]):
        raise SystemExit("nothing was measured")
    draw(document["summary"], args.out.with_suffix(".png"))
    print(f"\nwritten: {args.out}, {args.out.with_suffix('.png')}")
