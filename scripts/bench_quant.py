"""Time quantisation: fake-quant throughput against a copy and torchao, and its share of a step.

Three tables: bytes of fp32 input per second for every format; seconds per step of a model under
each recipe, in turn with the same step unquantised (the ratio of neighbours is what counts on a
shared machine); how large the single casts of that model are. torchao (`pip install torchao`) is
compared where it is installed: its MX cast with the same scale rule, whose codes must be ours.

    python scripts/bench_quant.py
    python scripts/bench_quant.py --model v4_nano --rows 8 --seq-len 512 --repeats 7
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

if (ROOT := str(Path(__file__).resolve().parents[1])) not in sys.path:
    sys.path.insert(0, ROOT)

import torch
from torch import Tensor

from model.init import init_weights
from model.loss import Objective
from model.transformer import DeepSeekV4
from quant.apply import apply_quant, remove_quant
from quant.config import QuantConfig, Recipe
from quant.formats import FP8_ACTIVATION, FP8_KV, FP8_WEIGHT, MXFP4, fake_quant, quantise
from quant.probe import QuantProbe
from scripts.model_yaml import load_model_config

Run = Callable[[], object]


def best_seconds(run: Run, clock: Callable[[], float], repeats: int) -> float:
    """Shortest of ``repeats`` calls after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        _synchronise()
        times.append(clock() - start)
    return min(times)


def throughput(clock: Callable[[], float], repeats: int, device: str) -> dict[str, float]:
    """GB/s of fp32 input for each cast; a plain copy is the floor that memory sets."""
    x = torch.randn(1024, 4096, device=device) * 0.02
    runs: dict[str, Run] = {"copy": x.clone}
    for fmt in (MXFP4, FP8_WEIGHT, FP8_ACTIVATION, FP8_KV):
        runs[f"fake_quant {fmt.name}"] = lambda fmt=fmt: fake_quant(x, fmt)
        runs[f"quantise {fmt.name}"] = lambda fmt=fmt: quantise(x, fmt)
    runs |= _torchao_runs(x)
    return {name: x.nbytes / best_seconds(run, clock, repeats) / 1e9 for name, run in runs.items()}


def _torchao_runs(x: Tensor) -> dict[str, Run]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            formats = importlib.import_module("torchao.prototype.mx_formats.mx_tensor")
            modes = importlib.import_module("torchao.prototype.mx_formats.config")
        except ImportError as error:
            print(f"torchao is not installed ({error}): not compared\n")
            return {}
    to_mx, MXTensor = formats.to_mx, formats.MXTensor
    rule = modes.ScaleCalculationMode.RCEIL  # 2 ** ceil(log2(amax / largest)), the rule used here
    fp4, fp8 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn
    scale, codes = to_mx(x, fp4, 32, rule)
    ours = quantise(x, MXFP4)
    assert torch.equal(codes.view(torch.uint8), ours.codes.view(torch.uint8))
    assert torch.equal(scale.view(torch.uint8).view(-1), ours.scale.view(torch.uint8).view(-1))
    return {
        "torchao quantise mxfp4 1x32": lambda: to_mx(x, fp4, 32, rule),
        "torchao fake_quant mxfp4 1x32": lambda: MXTensor.to_mx(x, fp4, 32, rule).dequantize(
            torch.float32
        ),
        "torchao quantise mxfp8 1x32": lambda: to_mx(x, fp8, 32, rule),
    }


class Step:
    """Forward, backward and a plain update of a model on one random batch.

    Args:
        args: the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        config = load_model_config(args.model)
        self.model = DeepSeekV4(config)
        init_weights(self.model, seed=0)
        self.model.to(args.device)
        self.model.compute_dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
        tokens, depths = args.seq_len, 1 + config.num_nextn_predict_layers
        ids = torch.randint(0, config.vocab_size, (args.rows, tokens + depths), device=args.device)
        self.ids = ids[:, :tokens]
        self.labels = torch.stack([ids[:, 1 + k : tokens + 1 + k] for k in range(depths)], dim=-1)
        self.documents = torch.zeros_like(self.ids)
        count = float(self.ids.numel())
        self.objective = Objective((count,) * depths, count)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def __call__(self) -> None:
        """Take one step."""
        output = self.model(self.ids, self.documents, self.labels, self.objective)
        output.total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def step_seconds(args: argparse.Namespace, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each repeat under every recipe, all recipes in turn in every repeat."""
    step, probe = Step(args), QuantProbe()
    times: dict[str, list[float]] = {recipe.value: [] for recipe in Recipe}
    for repeat in range(args.repeats + 1):
        for recipe in Recipe:
            config = QuantConfig(recipe=recipe)
            records = apply_quant(step.model, config, probe, keep_weights=True)
            start = clock()
            step()
            _synchronise()
            if repeat:  # the first one warms up
                times[recipe.value].append(clock() - start)
            remove_quant(records)
    return times


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time quantisation.")
    parser.add_argument("--model", default="v4_nano")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="count this process' CPU seconds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(
        f"{args.device}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f},"
        f" {'CPU' if args.cpu_time else 'wall'} seconds\n"
    )
    rates = throughput(clock, args.repeats, args.device)
    for name, rate in rates.items():
        print(f"{name:40s} {rate:8.2f} GB/s {rate / rates['copy']:8.3f} of a copy")
    times = step_seconds(args, clock)
    print(f"\n{args.model}, {args.rows} x {args.seq_len} tokens, {args.precision}")
    for name, seconds in times.items():
        ratios = [q / p for q, p in zip(seconds, times["none"], strict=True)]
        print(
            f"{name:12s} {statistics.median(seconds):8.3f} s/step, best {min(seconds):8.3f},"
            f" {statistics.median(ratios):6.3f} of unquantised"
        )
    if args.json:
        args.json.write_text(json.dumps({"gb_per_second": rates, "step_seconds": times}, indent=2))


if __name__ == "__main__":
    main()
