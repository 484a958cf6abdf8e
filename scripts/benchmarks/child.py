"""The measured process of ``bench_step.py``: one contestant, one case; a JSON line on stdout.

python -m scripts.benchmarks.child '{"contestant": "ours", "rows": 2, ...}'
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model.config import ModelConfig
from model.kernels.allocator import keep_freed_memory
from scripts.benchmarks.models import (
    BENCHMARK,
    Contestant,
    StepFunction,
    build_dense,
    build_ours,
    tokens,
)
from scripts.cli.model_yaml import load_model_config
from train.preflight.matmul_rate import measured_matmul_rate

_Measured = dict[str, Any]


def measure(spec: _Measured) -> _Measured:
    """Build one contestant, run it, and say what it took."""
    if spec["keep_memory"] == "all" or spec["contestant"].startswith("ours"):
        keep_freed_memory()  # our launcher does; others only where that is asked for
    device = torch.device(spec["device"])
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    contestant = build(spec, device, dtypes[spec["dtype"]])
    rates = {d: measured_matmul_rate(device, d).peak for d in contestant.flops}
    if spec["profile"]:
        return {"profile": profile(contestant.step, device)}
    before = memory_bytes(device, "VmRSS")
    begin = time.perf_counter()
    loss = float(contestant.step())
    first = time.perf_counter() - begin
    seconds: list[float] = []
    while not seconds or (sum(seconds) < spec["seconds"] and len(seconds) < 50):
        begin = time.perf_counter()
        contestant.step()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    count = spec["rows"] * spec["seq_len"]
    limit = sum(flops / rates[d] for d, flops in contestant.flops.items())
    step_seconds = statistics.median(seconds)
    return {
        "tokens_per_second": count / step_seconds,
        "step_seconds": seconds,
        "first_step_seconds": first,
        "loss": loss,
        "peak_bytes": memory_bytes(device, "VmHWM"),
        "before_bytes": before,
        "parameters": contestant.parameters[0],
        "active_parameters": contestant.parameters[1],
        "matmul_flops": sum(contestant.flops.values()),
        "matmul_rates": {str(d).removeprefix("torch."): rate for d, rate in rates.items()},
        "limit_tokens_per_second": count / limit,
    }


def build(spec: _Measured, device: torch.device, dtype: torch.dtype) -> Contestant:
    """The contestant that a measurement names."""
    named = spec["model"]
    config = BENCHMARK if named == "benchmark" else load_model_config(named)
    if not spec.get("mtp", True):
        config = without_mtp(config)
    ids_BT = tokens(config, spec["rows"], spec["seq_len"], device)
    if spec["contestant"] == "hf":
        # Imported here, or every contestant would carry it in its peak memory.
        from scripts.benchmarks.peer import build_hf  # noqa: PLC0415

        return build_hf(config, ids_BT, dtype, spec["hf_experts"], spec["hf_checkpointing"])
    if spec["contestant"] == "dense":
        return build_dense(config, ids_BT, dtype)
    whole_objective = spec["contestant"] == "ours"
    return build_ours(config, ids_BT, dtype, whole_objective, spec["activation_checkpoint"])


def without_mtp(config: ModelConfig) -> ModelConfig:
    """The same main model alone."""
    return replace(
        config,
        num_nextn_predict_layers=0,
        compress_ratios=config.compress_ratios[: config.num_hidden_layers],
    )


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_bytes(device: torch.device, field: str) -> int:
    """Memory of this process: resident now (``VmRSS``) or at its peak (``VmHWM``), or of the GPU.

    The kernel's own high-water mark starts afresh with the program; ``ru_maxrss`` would not.

    Raises:
        RuntimeError: this is not Linux, which alone tells the mark.
    """
    if device.type != "cuda" and sys.platform != "linux":
        raise RuntimeError(f"memory of the CPU is measured on Linux only, not on {sys.platform}")
    if device.type == "cuda":
        peak = field == "VmHWM"
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def profile(step: StepFunction, device: torch.device) -> str:
    """Where the time of one step goes, by operation."""
    step()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        step()
        synchronize(device)
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=48)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1])), allow_nan=False))
