"""``train.precision=auto``: the faster precision of this machine, settled before anything else.

CPUs differ: bf16 matmuls take a fifth of the time of fp32 ones (AMX), twice as long (AVX-512 with
bf16 but no AMX) or 190 times as long (emulated). The first start of a run measures both at the
model's own shapes, and takes bf16 only where it gains enough on every host; CUDA takes bf16
wherever all devices have it. What was taken stands in the run's ``config.yaml``; every later start
keeps it, whatever its machine would take. Behind :func:`settle` nothing sees ``auto``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from model.config import ModelConfig
from parallel.mesh import init_process_group
from train.config.schema import HeadPrecision, Precision, RunConfig
from train.errors import UserError
from train.preflight.matmul_rate import matmul_rates
from train.preflight.world import World
from train.run_folder.folder import CONFIG, holds_run, read_flat_config

log = logging.getLogger(__name__)
MIN_GAIN = 1.3  # times faster than fp32: less would not pay for bf16's rounding
_KEY = "train.precision"
_MAX_ROWS, _MAX_CHANNELS = 1024, 4096  # of the measured products
_T = TypeVar("_T")

Rates = dict[str, float]  # FLOPs per second by name of precision
Measure = Callable[[RunConfig], Rates]


@dataclass(frozen=True)
class PrecisionChoice:
    """What was taken for ``auto``; stands in the receipt.

    Attributes:
        taken: fp32 or bf16.
        why: in words.
        flops_per_second: of both precisions on each host, where they were measured.
    """

    taken: Precision
    why: str
    flops_per_second: tuple[Rates, ...] = ()


def measured_rates(run: RunConfig) -> Rates:
    """FLOPs per second of fp32 and bf16 products of this model's shapes on this CPU."""
    dtypes = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}
    rates = matmul_rates(torch.device("cpu"), list(dtypes.values()), _shapes(run))
    return {precision.value: rates[dtype] for precision, dtype in dtypes.items()}


def settle(
    run: RunConfig, world: World, measure: Measure | None = None
) -> tuple[RunConfig, PrecisionChoice | None]:
    """Put what this run computes in for ``auto``. Collective where ``train.precision`` is ``auto``.

    Args:
        run: as asked.
        world: the processes and their device.
        measure: FLOPs per second of both precisions on this host; None: measures them.

    Returns:
        The run, and what was chosen; None where nothing was to be.

    Raises:
        UserError: the folder holds a run whose config cannot be read; TF32 that cannot be.
    """
    train, choice = run.train, None
    if train.precision is Precision.auto:
        if world.device == "cuda" and not world.bytes_per_rank:  # refused by the fit check
            choice = PrecisionChoice(Precision.fp32, "no CUDA device")
        else:
            choice = _choose(run, world, measure or measured_rates)
        train = replace(train, precision=choice.taken)
    if train.head_precision is HeadPrecision.auto:
        train = replace(train, head_precision=HeadPrecision(train.precision.value))
    if train.head_precision is HeadPrecision.tf32:
        _check_tf32(world)
    return replace(run, train=train), choice


def assumed(run: RunConfig) -> RunConfig:
    """The run as it would compute if it could be, nothing measured: what was recorded, or bf16.

    Args:
        run: refused already; bf16 asks for the least memory.

    Raises:
        UserError: as :func:`settle`.
    """
    train = run.train
    if train.precision is Precision.auto:
        taken = _recorded(Path(run.run_dir)) or Precision.bf16
        train = replace(train, precision=taken)
    if train.head_precision is HeadPrecision.auto:
        train = replace(train, head_precision=HeadPrecision(train.precision.value))
    return replace(run, train=train)


def _check_tf32(world: World) -> None:
    """Refuse TF32 where products of fp32 stay what they are."""
    told = "train.head_precision=tf32 needs a CUDA device of compute capability 8.0 or above"
    if world.device != "cuda":
        raise UserError(f"{told}, and this run computes on the {world.device} (fp32, or bf16)")
    if world.bytes_per_rank and torch.version.hip is None:
        capability = torch.cuda.get_device_capability()
        if capability < (8, 0):
            raise UserError(f"{told}, and this one has {capability[0]}.{capability[1]}")


def _choose(run: RunConfig, world: World, measure: Measure) -> PrecisionChoice:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if world.ranks > 1:
        init_process_group(torch.device(world.device, local_rank if world.device == "cuda" else 0))
    recorded = _of_rank_0(lambda: _recorded(Path(run.run_dir)))
    if recorded is not None:
        return PrecisionChoice(recorded, f"the first start of run_dir={run.run_dir} took it")
    if world.device == "cuda":
        native = _of_all(torch.cuda.is_bf16_supported(including_emulation=False))
        if all(native):
            return PrecisionChoice(Precision.bf16, "every CUDA device has it")
        return PrecisionChoice(Precision.fp32, f"{native.count(False)} CUDA device(s) lack bf16")
    hosts = [rates for rates in _of_all(None if local_rank else measure(run)) if rates is not None]
    gain = min(rates["bf16"] / rates["fp32"] for rates in hosts)
    taken = Precision.bf16 if gain >= MIN_GAIN else Precision.fp32
    slowest = "" if len(hosts) == 1 else f" on the slowest of {len(hosts)} hosts"
    why = (
        f"bf16 matmuls of this model run {gain:.2f} times as fast as fp32 ones{slowest};"
        f" bf16 is taken from {MIN_GAIN} on"
    )
    log.info("train.precision=auto: %s, since %s", taken.value, why)
    return PrecisionChoice(taken, why, tuple(hosts))


def _recorded(folder: Path) -> Precision | None:
    """What the folder's run computes in, if it holds one."""
    if not holds_run(folder):
        return None
    value = read_flat_config(folder / CONFIG).get(_KEY)
    if value not in (Precision.fp32, Precision.bf16):
        raise UserError(f"{folder / CONFIG} is damaged: {_KEY} is {value!r}")
    return Precision(value)


def _shapes(run: RunConfig) -> list[tuple[int, int, int]]:
    """(rows, inner, columns) of a microbatch's typical products, cut to what measures in time."""
    model: ModelConfig = run.model
    rows = min(run.train.micro_batch_size * run.train.seq_len, _MAX_ROWS)
    routed = max(1, rows * model.num_experts_per_tok // model.n_routed_experts)
    shapes = [
        (rows, model.q_lora_rank, model.num_attention_heads * model.head_dim),
        (rows, model.hidden_size, model.moe_intermediate_size),
        (routed, model.hidden_size, model.moe_intermediate_size),
    ]
    return [(n, min(k, _MAX_CHANNELS), min(m, _MAX_CHANNELS)) for n, k, m in shapes]


def _of_rank_0(read: Callable[[], _T]) -> _T:
    """Rank 0's value or error, everywhere: another host may not see the folder."""
    if not dist.is_initialized():
        return read()
    found: list[tuple[_T | None, UserError | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            found = [(read(), None)]
        except UserError as error:
            found = [(None, error)]
    dist.broadcast_object_list(found)
    value, problem = found[0]
    if problem is not None:
        raise problem
    return value  # pyright: ignore[reportReturnType]


def _of_all(value: _T) -> Sequence[_T]:
    """The values of all ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[_T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
