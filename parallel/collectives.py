"""Sums and values over ranks, and tensors made whole."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

# A tensor sharded twice along one dim takes two gathers: known, and no news on every rank.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def whole(tensor: Tensor) -> Tensor:
    """The global tensor, plain; gathered if it is sharded (then collective)."""
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies here, plain."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def add_up(values: Mapping[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Sum tensors over ranks in one exchange, in float64. Collective.

    Args:
        values: the same names and shapes on every rank; on one device.
        group: the ranks.

    Returns:
        By the same names, in the same dtypes; equal bits on every rank.
    """
    if not values:
        return {}
    names = sorted(values)
    flat = torch.cat([values[name].detach().double().reshape(-1) for name in names])
    dist.all_reduce(flat, group=group)
    parts = flat.split([values[name].numel() for name in names])
    return {
        name: part.view(values[name].shape).to(values[name].dtype)
        for name, part in zip(names, parts, strict=True)
    }


def add_up_loose(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sum scalars over all ranks, of which each may know other names. Collective and slow."""
    total: dict[str, float] = {}
    for theirs in gathered({name: float(value) for name, value in values.items()}):
        for name, value in theirs.items():
            total[name] = total.get(name, 0.0) + value
    return {name: torch.tensor(total[name]) for name in sorted(total)}


def gathered(value: Any) -> list[Any]:
    """Each rank's value. Collective."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def same_everywhere(value: Any) -> Any:
    """Rank 0's value. Collective."""
    shared = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(shared, src=0)
    return shared[0]


def barrier() -> None:
    """Wait for all ranks. Collective."""
    if dist.is_initialized():
        dist.barrier()


def is_main() -> bool:
    """Whether this is rank 0."""
    return not dist.is_initialized() or dist.get_rank() == 0
