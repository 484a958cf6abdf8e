"""Looks at a sharded tensor without gathering it: a few rows, norms of its slices, its bits.

A stacked expert tensor of a large model is tens of gigabytes: whoever only wants to judge it (the
audit) must not make it whole. Everything here takes a plain tensor as well as a DTensor, and is
collective over the ranks of a DTensor's mesh.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from parallel.collectives import local

_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio: mixes bits by a product
_CHUNK = 1 << 20  # words hashed at once
FINGERPRINT_BYTES = 5 * 8 * _CHUNK  # held at a time meanwhile
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def rows_of(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of the first dim, whole in all others."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()[start:stop]
    sizes, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    mine = tensor.to_local().detach()
    out = mine.new_zeros((stop - start, *tensor.shape[1:]))
    first, last = max(start, offsets[0]), min(stop, offsets[0] + sizes[0])
    if first < last and mine.numel():
        place = [slice(o, o + n) for o, n in zip(offsets[1:], sizes[1:], strict=True)]
        out[(slice(first - start, last - start), *place)] = mine[
            first - offsets[0] : last - offsets[0]
        ]
    return _reduce(tensor, out)


def norms_of(tensor: Tensor, by_slice: bool) -> Tensor:
    """Euclidean norm in fp32: of each slice along the first dim, or of the whole as one element."""
    mine = local(tensor).detach()
    if not by_slice:
        return _reduce(
            tensor, torch.linalg.vector_norm(mine, dtype=torch.float32)[None] ** 2
        ).sqrt()
    own = torch.linalg.vector_norm(mine.flatten(1), dim=1, dtype=torch.float32) ** 2
    if not isinstance(tensor, DTensor):
        return own.sqrt()
    sizes, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    squares = own.new_zeros(tensor.shape[0])
    squares[offsets[0] : offsets[0] + sizes[0]] = own
    return _reduce(tensor, squares).sqrt()


def largest_of(tensor: Tensor, part: Tensor | None = None) -> float:
    """The largest absolute value; 0 of an empty tensor.

    Args:
        tensor: whose ranks compare.
        part: what counts of what lies here; None: all.
    """
    mine = (local(tensor) if part is None else part).detach()
    most = torch.zeros(1, device=mine.device)
    if mine.numel():  # not abs().max(): that would copy it
        most = torch.linalg.vector_norm(mine, math.inf).float().reshape(1)
    return float(_reduce(tensor, most, dist.ReduceOp.MAX))


def total_of(tensor: Tensor, mine: Tensor) -> Tensor:
    """Sum of what each rank computed of its own part of ``tensor``, replicas counted once."""
    return _reduce(tensor, mine)


def fingerprint(tensor: Tensor) -> Tensor:
    """Two sums [2] over the bits of the part that lies here: a changed word changes the first.

    Not collective; nothing is read back from a device. Sums wrap around. In the second each word is
    mixed with its place beforehand, and not linearly: an optimizer's first step moves words by one
    amount up or down, which sums of words, weighed or not, may not show.
    """
    flat = local(tensor).detach().contiguous().view(-1)
    words = flat.view(_WORDS[flat.element_size()])
    sums = torch.zeros(2, dtype=torch.int64, device=flat.device)
    for number, chunk in enumerate(words.split(_CHUNK)):
        place = torch.arange(len(chunk), device=chunk.device, dtype=torch.int64)
        mixed = (chunk.to(torch.int64) + (place + number * _CHUNK) * _ODD) * _ODD
        sums[0] += chunk.sum(dtype=torch.int64)
        sums[1] += (mixed ^ (mixed >> 32)).sum()
    return sums


def fingerprints(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Each tensor's :func:`fingerprint`, read back once a device."""
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        by_device.setdefault(local(tensor).device, {})[name] = fingerprint(tensor)
    found: dict[str, tuple[int, int]] = {}
    for sums in by_device.values():
        read = torch.stack(list(sums.values())).tolist()
        found |= {name: (plain, placed) for name, (plain, placed) in zip(sums, read, strict=True)}
    return found


def _reduce(
    tensor: Tensor, value: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    """Reduce ``value`` over the ranks that hold different parts of ``tensor``."""
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        for dim, placement in enumerate(tensor.placements):
            if not placement.is_replicate() and mesh.size(dim) > 1:
                dist.all_reduce(value, op=op, group=mesh.get_group(dim))
    return value
