"""The first benchmark of a GPU: ops beside their roofline, training steps, ``transformers``' model.

    make gpu                                the gpu tests, then this
    python scripts/bench.py gpu --models v4_mini v4_small

Three parts in one run, one JSON and one table:
ops: each op of ``model/kernels/select.py`` against its roofline at rates measured here, and against
    the plain path;
steps: ``v4 pretrain`` of each model for a few steps: tokens/s, MFU, launches and synchronisations
    of a step (from a profile), peak memory beside what the fit check predicted;
peers: forward and backward of ours and of transformers' DeepseekV4 with equal weights, losses and
    tokens (``bench step``), without MTP, which transformers lacks.
Without a CUDA device it says so in one line and leaves with 2.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from model.config import Kernels
from scripts.benchmarks.step import run_child
from scripts.cli.command import command
from scripts.cli.model_yaml import load_model_config
from scripts.cli.outputs import check_output, write_json, write_text
from scripts.cli.parser import CommandParser, real, whole
from scripts.gpu.gpu_ops import calls_of, measured, one_of_each
from scripts.gpu.gpu_report import table_of
from train.config.command_line import compose_run
from train.errors import ROOT, UserError
from train.preflight.cards import Card
from train.preflight.matmul_rate import measured_matmul_rate
from train.preflight.needs import Needs
from train.record.metrics import read_metrics
from train.stages import resolve

_Measured = dict[str, Any]
_DTYPES = {"cuda": "bf16", "cpu": "fp32"}
_WARM = 4  # steps of a run that are not counted: its audit looks at the first three
LAUNCHES = ("LaunchKernel", "ModuleLaunchKernel", "GraphLaunch")  # parts of names of runtime calls
SYNCS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize")
FOR_TESTS = "on a CPU, for tests of this script: no figure of a GPU"


@command()
def main(words: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    args = parse(words)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "bench gpu needs a GPU, and this machine has none that torch can use"
            " (torch.cuda.is_available() is false)"
        )
    if args.check:
        return
    table = args.out.with_suffix(".md")
    check_output("--out", args.out, '"environment"')
    check_output("--out", table, "scripts/bench.py gpu")
    document: _Measured = {"environment": environment(args)}
    one = rates(torch.device(args.device), args.bandwidth_bytes)
    document["rates"] = vars(one)
    document["ops"] = ops(args, one)
    document["steps"] = {name: step(name, args) for name in args.models}
    document["peers"] = {name: peers(name, args) for name in args.models}
    write_json(args.out, document)
    write_text(table, table_of(document))
    print(table_of(document))
    print(f"written: {args.out}, {table}")


def environment(args: argparse.Namespace) -> _Measured:
    """What the figures depend on."""
    on_gpu = args.device == "cuda"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if on_gpu else FOR_TESTS,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        "capability": list(torch.cuda.get_device_capability()) if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "tokens": [args.rows, args.tokens],
        "command": ["python", "scripts/bench.py", "gpu", *sys.argv[1:]],
    }


def rates(device: torch.device, size: int) -> Card:
    """Matmul rates and bandwidth of this device, measured now.

    Args:
        device: which.
        size: bytes of the tensor whose copy measures the bandwidth.
    """
    bf16, fp32 = (
        measured_matmul_rate(device, d).peak / 1e12 for d in (torch.bfloat16, torch.float32)
    )
    x = torch.ones(size // 4, device=device)
    y, best = torch.empty_like(x), float("inf")
    for _ in range(5):
        _synchronize(device)
        begin = time.perf_counter()
        y.copy_(x)
        _synchronize(device)
        best = min(best, time.perf_counter() - begin)
    memory = torch.cuda.get_device_properties(0).total_memory if device.type == "cuda" else 0
    return Card("measured", memory / 1e9, bf16, fp32, 2 * x.nbytes / best / 1e9)


def ops(args: argparse.Namespace, one: Card) -> list[_Measured]:
    """Each op by itself, with the inputs that the last of the models gives it."""
    device = torch.device(args.device)
    config = one_of_each(load_model_config(args.models[-1], [f"kernels={Kernels.auto.value}"]))
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    found = []
    for call in calls_of(config, args.rows, args.tokens, device, dtype):
        found.append(measured(call, config, args.rows, args.tokens, one, args.seconds))
        print(f"op {call.op}: {found[-1]['ours']['forward_seconds'] * 1e6:,.0f} us", flush=True)
    return found


# ---- whole training steps ---------------------------------------------------------------------


def step(name: str, args: argparse.Namespace) -> _Measured:
    """A few steps of the trainer in a process of its own; the last one is profiled."""
    with tempfile.TemporaryDirectory() as folder:
        words = _run_words(name, args, folder)
        run = compose_run(words)
        done = subprocess.run(
            [sys.executable, str(ROOT / "train" / "pretrain.py"), *words],
            capture_output=True, text=True, timeout=args.timeout,
        )  # fmt: skip
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            return {"failed": f"exit code {done.returncode}: {lines[-1]}"}
        lines = read_metrics(Path(folder) / "run" / "metrics.jsonl")
        (trace,) = (Path(folder) / "run" / "profile").glob("*.json")
        counts = runtime_calls(json.loads(trace.read_text()))
    counted = sorted(lines[_WARM:-1], key=lambda line: line["tokens_per_second"])
    middle = counted[len(counted) // 2]
    predicted = Needs(run, resolve(run)).peak(run.parallel.resolve(1), args.device)
    result = {
        "tokens_per_second": middle["tokens_per_second"],
        "mfu": middle["mfu"],
        "steps": len(counted),
        "peak_memory_bytes": lines[-1]["peak_memory_bytes"],
        "predicted_bytes": predicted.total,
        **(counts if args.device == "cuda" else {"launches": None, "synchronisations": None}),
    }
    print(f"step {name}: {result['tokens_per_second']:,.0f} tokens/s", flush=True)
    return result


def _run_words(name: str, args: argparse.Namespace, folder: str) -> list[str]:
    """The command line of a run on the embedded text, read as bytes: nothing is downloaded."""
    return [
        f"model={name}", "data.tokenizer=byte", f"data.cache_dir={ROOT / '.cache' / 'data'}",
        "data.sources.embedded.kind=embedded", "data.sources.embedded.packages=[asyncio,json]",
        "data.validation.bytes=2000", f"run_dir={folder}/run", f"train.device={args.device}",
        f"train.seq_len={args.tokens}", f"train.micro_batch_size={args.rows}",
        f"train.global_batch_tokens={2 * args.rows * args.tokens}", f"train.steps={args.steps}",
        "train.eval_every=0", f"train.eval_tokens={args.tokens}", "train.checkpoint_every=0",
        "train.log_every=1", "sample.tokens=0", f"train.profile_start={args.steps}",
        "train.profile_steps=1", f"train.precision={_DTYPES[args.device]}", *args.override,
    ]  # fmt: skip


def runtime_calls(trace: _Measured) -> dict[str, int]:
    """Launches and synchronisations of one profiled step, from its Chrome trace.

    Args:
        trace: as torch's profiler exports it.
    """
    names = [
        str(event.get("name", ""))
        for event in trace["traceEvents"]
        if event.get("cat") in ("cuda_runtime", "cuda_driver", "hip_runtime")
    ]
    return {
        "launches": sum(any(part in name for part in LAUNCHES) for name in names),
        "synchronisations": sum(any(part in name for part in SYNCS) for name in names),
    }


def peers(name: str, args: argparse.Namespace) -> _Measured:
    """Ours and others on equal batches, each in a process of its own."""
    found = {}
    for contestant in args.contestants:
        spec = {
            "contestant": contestant, "rows": args.rows, "seq_len": args.tokens, "model": name,
            "dtype": _DTYPES[args.device], "device": args.device,
            "activation_checkpoint": "none", "seconds": args.seconds, "hf_experts": "grouped_mm",
            "hf_checkpointing": False, "keep_memory": "ours", "profile": False, "mtp": False,
        }  # fmt: skip
        found[contestant] = run_child(spec, args.timeout)
        rate = found[contestant].get("tokens_per_second")
        told = f"{rate:,.0f} tokens/s" if rate else found[contestant]["failed"]
        print(f"peer {name} {contestant}: {told}", flush=True)
    return found


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether there is a GPU")
    parser.add_argument("--models", nargs="+", default=["v4_mini", "v4_small"])
    parser.add_argument("--tokens", type=whole(least=1), default=4096, help="of a row")
    parser.add_argument("--rows", type=whole(least=1), default=1, help="of a microbatch")
    parser.add_argument("--steps", type=whole(least=_WARM + 2), default=16,
                        help=f"of the trainer: {_WARM} warm up, the last is profiled")  # fmt: skip
    parser.add_argument("--seconds", type=real(above=0), default=1.0, help="of measuring, each")
    parser.add_argument(
        "--timeout", type=real(above=0), default=1800.0, help="seconds, each process"
    )
    parser.add_argument(
        "--contestants", nargs="*", default=["ours_lm", "hf"], choices=("ours_lm", "hf", "dense")
    )
    parser.add_argument("--override", nargs="*", default=[], help="KEY=VALUE of the trainer")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"),
                        help="cpu tries this script; its figures say so")  # fmt: skip
    parser.add_argument(
        "--bandwidth-bytes", type=whole(least=1), default=1 << 30, help="copied to measure it"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_gpu.json"))
    return parser.parse_args(words)
