"""Time quantisation: throughput of the casts beside torchao's, and its share of a training step.

Two tables. Casts: GB of fp32 input a second for every format, for a plain copy (the floor that
memory sets), and for torchao's MX cast with the same scale rule, as shipped and under
torch.compile; its codes and scales must be ours. Steps: seconds of a whole step of a model
(forward, backward, optimizer, as its run config has them) under each recipe. Everything is measured
in turn in every round, and ratios are taken within a round: that is what counts on a shared
machine.

torchao comes with `pip install -e '.[bench]'`; without it there is nothing to compare with.

    python scripts/bench.py quant --json docs/bench/quant.json
    python scripts/bench.py quant --model v4_tiny --rounds 7 --no-compile
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batch import Batch, BatchCounts
from model.init import init_weights
from model.precision import HEAD_PRECISIONS
from model.transformer import DeepSeekV4
from optim.build import build_optimizer
from parallel.engine import TorchEngine
from quant.apply import apply_quant, remove_quant
from quant.config import QuantConfig, Recipe
from quant.formats import FP8_ACTIVATION, FP8_KV, FP8_WEIGHT, MXFP4, fake_quant, quantise
from quant.probe import QuantProbe
from scripts.cli.command import command
from scripts.cli.outputs import check_output, write_json
from scripts.cli.parser import CommandParser, whole
from train.config.command_line import compose_run
from train.config.schema import RunConfig
from train.preflight.precision import settle
from train.preflight.world import World
from train.stages import resolve
from train.step import objective_of, plan_step

Run = Callable[[], object]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_Times = dict[str, list[float]]
COPY, FAKE, STORE = "copy", f"fake_quant {MXFP4.name}", f"quantise {MXFP4.name}"
PEERS = {"torchao fake_quant": FAKE, "torchao quantise": STORE}  # what stands beside what


def in_turn(runs: dict[str, Run], clock: Callable[[], float], rounds: int, calls: int) -> _Times:
    """Seconds a call of each run in every round, after one round to warm up."""
    times: _Times = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = clock()
            for _ in range(calls):
                run()
            _synchronise()
            if number:
                times[name].append((clock() - start) / calls)
    return times


# ---- casts --------------------------------------------------------------------------------------
def cast_runs(x: Tensor, compiled: bool) -> dict[str, Run]:
    """Everything that is timed on one tensor."""
    runs: dict[str, Run] = {COPY: x.clone}
    for fmt in (MXFP4, FP8_WEIGHT, FP8_ACTIVATION, FP8_KV):
        runs[f"fake_quant {fmt.name}"] = lambda fmt=fmt: fake_quant(x, fmt)
        runs[f"quantise {fmt.name}"] = lambda fmt=fmt: quantise(x, fmt)
    return runs | torchao_runs(x, compiled)


def torchao_runs(x: Tensor, compiled: bool) -> dict[str, Run]:
    """Its MX cast, after a check that it gives our codes and scales; empty if not installed."""
    logging.disable(logging.WARNING)  # of CUDA libraries that are not here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            formats = importlib.import_module("torchao.prototype.mx_formats.mx_tensor")
            modes = importlib.import_module("torchao.prototype.mx_formats.config")
    except ImportError as error:
        print(f"torchao is not installed ({error}): not compared\n")
        return {}
    finally:
        logging.disable(logging.NOTSET)
    rule = modes.ScaleCalculationMode.RCEIL  # 2 ** ceil(log2(amax / largest)), the rule used here
    fp4 = torch.float4_e2m1fn_x2

    def store(x: Tensor) -> Any:
        return formats.to_mx(x, fp4, MXFP4.cols, rule)

    def fake(x: Tensor) -> Tensor:
        return formats.MXTensor.to_mx(x, fp4, MXFP4.cols, rule).dequantize(torch.float32)

    check_equal(store, fake, x)
    runs: dict[str, Run] = {
        "torchao quantise": lambda: store(x),
        "torchao fake_quant": lambda: fake(x),
    }
    if compiled:
        for name, function in (("quantise", store), ("fake_quant", fake)):
            fast = torch.compile(function)
            runs[f"torchao {name}, compiled"] = lambda fast=fast: fast(x)
    return runs


def check_equal(
    store: Callable[[Tensor], Any], fake: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    """The peer does the same work: its codes, scales and values are ours."""
    (scale, codes), ours = store(x), quantise(x, MXFP4)
    assert torch.equal(codes.view(torch.uint8), ours.codes.view(torch.uint8))
    assert torch.equal(scale.view(torch.uint8).flatten(), ours.scale.view(torch.uint8).flatten())
    assert torch.equal(fake(x), fake_quant(x, MXFP4))


# ---- steps --------------------------------------------------------------------------------------
class FirstSteps:
    """The first steps of a run, on one batch of random tokens.

    Args:
        run: its config.
        device: where.
    """

    def __init__(self, run: RunConfig, device: torch.device) -> None:
        model = DeepSeekV4(run.model)
        init_weights(model, run.seed)
        model.compute_dtype = DTYPES[run.train.precision.value]
        model.head_dtype, model.head_tf32 = HEAD_PRECISIONS[run.train.head_precision.value]
        model.to(device)
        optimizer = build_optimizer(
            model.named_parameters(), run.optim, split_counts=run.model.split_counts
        )
        self.engine = TorchEngine(model, optimizer, device, run.optim.grad_clip)
        self.plan = plan_step(1, 0, resolve(run), run.train, run.optim)
        rows, tokens = self.plan.num_rows, self.plan.stage.seq_len
        depths = 1 + run.model.num_nextn_predict_layers
        ids = torch.randint(0, run.model.vocab_size, (rows, tokens + depths))
        labels = torch.stack([ids[:, 1 + k : tokens + 1 + k] for k in range(depths)], dim=-1)
        size = self.plan.stage.micro_batch_size
        whole = (ids[:, :tokens], torch.zeros(rows, tokens, dtype=torch.long), labels)
        self.batches = [
            Batch(*parts) for parts in zip(*(t.split(size) for t in whole), strict=True)
        ]
        counts = BatchCounts(rows * tokens, (rows * tokens,) * depths, rows)
        self.objective = replace(objective_of(self.plan, counts), monitors=False)

    def __call__(self) -> None:
        """Take one step."""
        self.engine.forward_backward(self.batches, self.objective)
        self.engine.optimizer_step(self.plan.lr, finite=True)


def step_runs(step: FirstSteps) -> dict[str, Run]:
    """The step under every recipe; swapping seams in and out takes no measurable time."""
    probe = QuantProbe()

    def under(recipe: Recipe) -> Run:
        def run() -> None:
            model, config = step.engine.model, QuantConfig(recipe=recipe)
            records = apply_quant(model, config, probe, keep_weights=True)
            step()
            remove_quant(records)

        return run

    return {recipe.value: under(recipe) for recipe in Recipe}


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- tables -------------------------------------------------------------------------------------
def ratios(ours: list[float], theirs: list[float]) -> list[float]:
    """Of neighbours in every round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def show_casts(times: _Times, num_bytes: int) -> None:
    """GB/s, and torchao's seconds over ours."""
    for name, seconds in times.items():
        rate = num_bytes / statistics.median(seconds) / 1e9
        line = f"{name:32s} {rate:8.2f} GB/s"
        peer = PEERS.get(name.removesuffix(", compiled"))
        if peer:
            quicker = statistics.median(ratios(seconds, times[peer]))
            line += f"   {peer} is {quicker:.2f} times as fast"
        print(line)


def show_steps(times: _Times) -> None:
    """Seconds, and the share that a recipe adds."""
    for name, seconds in times.items():
        found = sorted(ratio - 1 for ratio in ratios(seconds, times[Recipe.none.value]))
        print(
            f"{name:12s} {statistics.median(seconds):8.3f} s/step, adds"
            f" {statistics.median(found):7.1%} (rounds: {found[0]:.1%} to {found[-1]:.1%})"
        )


@command()
def main(words: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--model", default="v4_nano", help="with its batch and optimizer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=whole(least=1), default=7)
    parser.add_argument("--no-compile", action="store_true", help="leave out torchao compiled")
    parser.add_argument("--cpu-time", action="store_true", help="count this process' CPU seconds")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args(words)
    if args.json:
        check_output("--json", args.json, '"cast_seconds"')
    clock = time.process_time if args.cpu_time else time.perf_counter
    conditions = {
        "device": args.device, "machine": platform.machine(), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1),
        "clock": "CPU" if args.cpu_time else "wall", "model": args.model, "rounds": args.rounds,
    }  # fmt: skip
    print(json.dumps(conditions, allow_nan=False) + "\n")
    x = torch.randn(1024, 4096, device=args.device) * 0.02
    casts = in_turn(cast_runs(x, not args.no_compile), clock, args.rounds, calls=3)
    show_casts(casts, x.nbytes)
    world = World(1, torch.device(args.device).type, 1)
    run, _ = settle(compose_run([f"model={args.model}"]), world)
    print(f"\n{args.model}, a step of {run.train.global_batch_tokens} tokens")
    steps = in_turn(
        step_runs(FirstSteps(run, torch.device(args.device))), clock, args.rounds, calls=1
    )
    show_steps(steps)
    if args.json:
        found = {"conditions": conditions, "cast_bytes": x.nbytes, "cast_seconds": casts,
                 "step_seconds": steps}  # fmt: skip
        write_json(args.json, found, indent=2)
