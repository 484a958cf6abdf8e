"""What recovery costs a step: armed, and with anticipatory routing on.

    python scripts/bench.py recovery                                # v4_micro
    python scripts/bench.py recovery --model v4_nano --rounds 20 --json docs/bench/recovery.json

Three runs of one model, each as its config trains it, take a step in turn: "disabled" only counts
spikes; "armed" would roll back, and is routed as usual; "anticipating" routes every step by the
weights of the step before, which costs a forward pass without losses. Ratios to "disabled" are
taken within a round, so that both sides see the same machine: of CPU seconds of the process, which
count on a shared one, and of wall seconds. Columns: median, first and third quartile over rounds.
The paper reports about 20 % overhead while anticipatory routing is on, on its hardware.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from model.kernels.allocator import keep_freed_memory
from scripts.cli.command import command
from scripts.cli.outputs import check_output, write_json
from scripts.cli.parser import CommandParser, whole
from train.build import build
from train.config.command_line import compose_run
from train.loop import Trainer
from train.preflight.precision import settle
from train.preflight.world import this_world

AUDITED = 4  # steps of each that do not count: the audit's three, and one that looks ahead first
SETTINGS = {
    "disabled": ["train.recovery.on_spike=none", "train.recovery.anticipatory=never"],
    "armed": ["train.recovery.on_spike=rollback", "train.recovery.anticipatory=after_rollback"],
    "anticipating": ["train.recovery.on_spike=none", "train.recovery.anticipatory=always"],
}
_Times = dict[str, list[float]]


@command()
def main(words: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--model", default="v4_micro", help="with its batch and optimizer")
    parser.add_argument("--rounds", type=whole(least=1), default=12, help="that count")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("overrides", nargs="*", help="of all three runs")
    args = parser.parse_args(words)
    if args.json:
        check_output("--json", args.json, '"wall_ratios"')
    keep_freed_memory()
    conditions = {
        "machine": platform.machine(), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1),
        "model": args.model, "overrides": args.overrides, "rounds": args.rounds,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            name: trainer(Path(folder) / name, args.model, args.rounds, own + args.overrides)
            for name, own in SETTINGS.items()
        }
        tokens = trainers["disabled"].run.train.global_batch_tokens
        cpu, wall = measure(trainers, args.rounds)
    print(json.dumps(conditions, allow_nan=False))
    print(f"\na step of {tokens} tokens")
    show("CPU", cpu)
    show("wall", wall)
    if args.json:
        found = {"conditions": conditions, "tokens": tokens, "cpu_seconds": cpu,
                 "wall_seconds": wall, "cpu_ratios": ratios(cpu),
                 "wall_ratios": ratios(wall)}  # fmt: skip
        write_json(args.json, found)


def trainer(folder: Path, model: str, rounds: int, overrides: list[str]) -> Trainer:
    """A run that neither evaluates nor saves while it is timed."""
    far = AUDITED + rounds + 1  # its last step evaluates
    run = compose_run(
        [
            f"model={model}", f"run_dir={folder}", f"train.steps={far}", "train.eval_every=0",
            f"train.checkpoint_every={far}", "train.monitor_every=0", *overrides,
        ]
    )  # fmt: skip
    return build(*settle(run, this_world(run.train.device)))


def measure(trainers: dict[str, Trainer], rounds: int) -> tuple[_Times, _Times]:
    """CPU and wall seconds of every step that counts, of the runs in turn."""
    cpu: _Times = {name: [] for name in trainers}
    wall: _Times = {name: [] for name in trainers}
    for number in range(AUDITED + rounds):
        for name, one in trainers.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            one._next_step()
            if number >= AUDITED:
                cpu[name].append(time.process_time() - cpu_began)
                wall[name].append(time.perf_counter() - began)
    return cpu, wall


def ratios(times: _Times) -> dict[str, dict[str, float]]:
    """Quartiles of each run's seconds over those of "disabled" in the same round."""
    out = {}
    for name in list(times)[1:]:
        pairs = zip(times[name], times["disabled"], strict=True)
        low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
        out[name] = {"first_quartile": low, "median": middle, "third_quartile": high}
    return out


def show(clock: str, times: _Times) -> None:
    """Print one table."""
    print(f"{clock + ' seconds':16} {'median':>8} {'over disabled':>14} {'quartiles':>13}")
    over = ratios(times)
    for name, seconds in times.items():
        line = f"{name:16} {statistics.median(seconds):8.3f}"
        if name in over:
            r = over[name]
            line += f" {r['median']:14.3f} {r['first_quartile']:6.3f}-{r['third_quartile']:.3f}"
        print(line)
