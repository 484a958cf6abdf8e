"""Whole tensors by name, whatever rank holds which part of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from parallel.collectives import whole
from parallel.engine import Engine

Tensors = dict[str, Tensor]


def gathered(named: Tensors) -> Tensors:
    """Whole tensors on the CPU by name, also those that only other ranks have. Collective."""
    mine = {name: whole(tensor).cpu().clone() for name, tensor in named.items()}
    if not dist.is_initialized():
        return mine
    names: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(names, set(mine))
    seen: set[str] = set()
    for rank, theirs in enumerate(names):
        new, seen = theirs - seen, seen | theirs
        if all(new <= other for other in names):
            continue
        parts = [{name: mine[name] for name in sorted(new)} if rank == dist.get_rank() else None]
        dist.broadcast_object_list(parts, src=rank, device=torch.device("cpu"))
        mine |= parts[0] or {}
    return mine


def gradients(engine: Engine) -> Tensors:
    """Whole gradients by name; a parameter without one has none."""
    return gathered({name: gradient.clone() for name, gradient in engine.gradients()})


def weights(engine: Engine) -> Tensors:
    """Whole parameters and saved buffers by name."""
    return gathered({n: t for n, t in engine.state().items() if n.startswith("model.")})


def set_gradients(engine: Engine, grads: Tensors) -> None:
    """Give every parameter its part of the same gradients; copies, which clipping scales."""
    for name, parameter in engine.model.named_parameters():
        grad = grads[name].to(engine.device, copy=True)
        if isinstance(parameter, DTensor):
            grad = distribute_tensor(
                grad, parameter.device_mesh, parameter.placements, src_data_rank=None
            )
        parameter.grad = grad
