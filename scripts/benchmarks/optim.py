"""Time our whole optimizer step against torch.optim.Muon plus fused AdamW on the same parameters.

The peer gets every matrix as a 2-D parameter of its own (experts unbound, wo_a per group), the
same number of Newton-Schulz steps and bf16, its only dtype. Both step in turn in one process; what
counts is the ratio of the medians, and on a shared machine the median of the ratios of neighbours.
The floor is the time of the matmuls alone at this machine's measured matmul rate.

    python scripts/bench.py optim
    python scripts/bench.py optim --model v4_micro --repeats 31 --json bench_optim.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from model.config import ModelConfig
from model.transformer import DeepSeekV4
from optim.build import build_optimizer
from optim.config import MatmulDtype, OptimConfig
from optim.groups import Owner, ParamRecord
from optim.muon import expand
from optim.newton_schulz import matmul_flops
from scripts.cli.command import command
from scripts.cli.model_yaml import load_model_config
from scripts.cli.outputs import check_output, write_json
from scripts.cli.parser import CommandParser, whole

LR = 1e-3
SIZE = 1024  # rows and columns of the matmul whose rate bounds the step


@dataclass
class OptimizerTimes:
    """What the benchmark found; seconds are medians of one step."""

    model: str
    parameters: int
    matrices: int
    newton_schulz_steps: int
    dtype: str
    device: str
    threads: int
    load_average: float
    ours_seconds: float
    peer_seconds: float
    ratio: float
    ratio_of_neighbours: float
    flops: int
    matmul_flops_per_second: float
    floor_seconds: float


@command()
def main(words: Sequence[str] | None = None) -> None:
    """Parse the arguments, run, print, write."""
    args = _arguments(words)
    if args.json:
        check_output("--json", Path(args.json), '"floor_seconds"')
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    model = load_model_config(args.model)
    config = OptimConfig()
    config.muon.dtype = MatmulDtype.bf16
    parameters = random_parameters(model_shapes(model), device)
    ours = build_optimizer(parameters.items(), config, split_counts={"o_groups": model.o_groups})
    peer = build_peer(ours.table, parameters, config)
    steps = (lambda: ours.step(LR), lambda: [optimizer.step() for optimizer in peer])
    pairs, rate = measure(*steps, args.repeats, args.warmup, device)
    report = summarise(model.name, ours.table, config, pairs, rate, device)
    print(render(report))
    if args.json:
        write_json(Path(args.json), asdict(report), indent=2)


def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a model, without allocating any."""
    with torch.device("meta"):
        model = DeepSeekV4(config)
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def random_parameters(
    shapes: dict[str, tuple[int, ...]], device: torch.device
) -> dict[str, Parameter]:
    """Normal weights and gradients of the sizes that training has."""
    generator = torch.Generator(device).manual_seed(0)
    parameters = {}
    for name, shape in shapes.items():
        value, grad = (
            torch.randn(shape, generator=generator, device=device) * std for std in (0.02, 1e-3)
        )
        parameters[name] = Parameter(value)
        parameters[name].grad = grad
    return parameters


def build_peer(
    table: list[ParamRecord], parameters: dict[str, Parameter], config: OptimConfig
) -> tuple[torch.optim.Muon, torch.optim.AdamW]:
    """torch.optim.Muon over 2-D matrices, in table order, and fused AdamW over the rest."""
    matrices, rest = [], {0.0: [], config.adamw.weight_decay: []}
    for record in table:
        parameter = parameters[record.name]
        if record.owner is Owner.muon:
            matrices += _unbind(parameter, record.num_matrices)
        else:
            rest[record.weight_decay].append(_clone(parameter, parameter.grad))
    coefficients = expand(config.muon)
    muon = torch.optim.Muon(
        matrices,
        lr=LR,
        weight_decay=config.muon.weight_decay,
        momentum=config.muon.momentum,
        nesterov=config.muon.nesterov,
        ns_coefficients=coefficients[0],
        ns_steps=len(coefficients),
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for decay, params in rest.items()],
        lr=LR,
        betas=(config.adamw.betas[0], config.adamw.betas[1]),
        eps=config.adamw.eps,
        fused=True,
    )
    return muon, adamw


def _unbind(parameter: Parameter, num_matrices: int) -> list[Parameter]:
    shape = (num_matrices, -1, parameter.shape[-1])
    assert parameter.grad is not None
    grads = parameter.grad.view(shape).unbind()
    values = parameter.detach().view(shape).unbind()
    return [_clone(v, g) for v, g in zip(values, grads, strict=True)]


def _clone(value: Tensor, grad: Tensor | None) -> Parameter:
    assert grad is not None
    copy = Parameter(value.detach().clone())
    copy.grad = grad.clone()
    return copy


def measure(
    ours: Callable[[], object],
    peer: Callable[[], object],
    repeats: int,
    warmup: int,
    device: torch.device,
) -> tuple[list[tuple[float, float]], float]:
    """Seconds of (ours, peer) step by step in turn, and the best matmul FLOP/s seen meanwhile."""
    a, b = (torch.randn(SIZE, SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(warmup):
        ours()
        peer()
    pairs, matmul_seconds = [], []
    for _ in range(repeats):
        pairs.append((_seconds(ours, device), _seconds(peer, device)))
        matmul_seconds += [_seconds(lambda: torch.mm(a, b), device) for _ in range(5)]
    return pairs, 2 * SIZE**3 / min(matmul_seconds)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def summarise(
    model: str,
    table: list[ParamRecord],
    config: OptimConfig,
    pairs: list[tuple[float, float]],
    rate: float,
    device: torch.device,
) -> OptimizerTimes:
    """Medians, ratios and floors."""
    muon = [r for r in table if r.owner is Owner.muon]
    num_steps = len(expand(config.muon))
    flops = sum(
        r.num_matrices
        * matmul_flops(_size(r) // r.num_matrices // r.shape[-1], r.shape[-1], num_steps)
        for r in muon
    )
    ours, peer = (statistics.median(times) for times in zip(*pairs, strict=True))
    return OptimizerTimes(
        model=model,
        parameters=sum(_size(r) for r in table),
        matrices=sum(r.num_matrices for r in muon),
        newton_schulz_steps=num_steps,
        dtype="bf16",
        device=device.type,
        threads=torch.get_num_threads(),
        load_average=os.getloadavg()[0],
        ours_seconds=ours,
        peer_seconds=peer,
        ratio=peer / ours,
        ratio_of_neighbours=statistics.median(p / o for o, p in pairs),
        flops=flops,
        matmul_flops_per_second=rate,
        floor_seconds=flops / rate,
    )


def _size(record: ParamRecord) -> int:
    size = 1
    for dim in record.shape:
        size *= dim
    return size


def render(r: OptimizerTimes) -> str:
    """The report in a few lines."""
    return "\n".join(
        [
            f"{r.model}: {r.parameters:,} parameters, {r.matrices} Muon matrices,"
            f" {r.newton_schulz_steps} Newton-Schulz steps in {r.dtype}, {r.device},"
            f" {r.threads} threads, load average {r.load_average:.1f}",
            f"ours   {r.ours_seconds * 1e3:9.1f} ms a step",
            f"peer   {r.peer_seconds * 1e3:9.1f} ms a step (torch.optim.Muon + fused AdamW)",
            f"ratio  {r.ratio:9.2f} x by medians, {r.ratio_of_neighbours:.2f} x by neighbours",
            f"matmul {r.matmul_flops_per_second / 1e9:9.1f} GFLOP/s measured (bf16, 1024 cubed)",
            f"floor  {r.floor_seconds * 1e3:9.1f} ms for {r.flops / 1e9:.1f} GFLOP of matmuls",
        ]
    )


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--model", default="v4_nano", help="preset of conf/model (default v4_nano)")
    parser.add_argument(
        "--repeats", type=whole(least=1), default=15, help="timed steps of each (default 15)"
    )
    parser.add_argument(
        "--warmup", type=whole(least=0), default=2, help="untimed steps of each (default 2)"
    )
    parser.add_argument(
        "--threads", type=whole(least=0), default=0, help="torch threads; 0 = torch's choice"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--json", default="", help="also write the report to this file")
    return parser.parse_args(words)
