"""Global gradient norm, clipping, and the test for gradients that must not be used.

The norm is accumulated in float64: fp32 sums over millions of elements are off in the fourth
digit, squares overflow from 1e19 on, and the order in which a layout adds would show. Any inf or
nan makes the norm non-finite, so one number answers both questions. Clipping by 1.0 is
DeepSeek-V3's, inherited (reference C.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@torch.no_grad()
def grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Norm over all gradients, a float64 scalar on their device; a missing gradient counts as 0.

    Args:
        parameters: whole tensors, in an order that does not change between runs.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


@torch.no_grad()
def sharded_grad_norm(
    parameters: Iterable[Tensor], add_up: Callable[[Tensor], Tensor], device: torch.device
) -> float:
    """Norm over all gradients of sharded parameters, each shard counted once. Collective.

    Args:
        parameters: DTensors, the same on every rank of their meshes; none on a pipeline stage that
            does not train.
        add_up: sums a float64 scalar over all ranks.
        device: of the parameters.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for p in parameters:
        assert isinstance(p, DTensor)
        copies = math.prod(
            size for size, at in zip(p.device_mesh.shape, p.placements, strict=True)
            if at.is_replicate()
        )  # fmt: skip
        if p.grad is not None:
            assert isinstance(p.grad, DTensor)
            norm = torch.linalg.vector_norm(p.grad.to_local(), dtype=torch.float64)
            total += norm.square() / copies
    return math.sqrt(float(add_up(total)))


@torch.no_grad()
def scale_grads_(parameters: Iterable[Tensor], norm: float, max_norm: float) -> None:
    """Scale gradients down to a global norm of ``max_norm``, if theirs is above it and finite.

    Args:
        parameters: whose gradients are scaled in place.
        norm: over all of them, on all ranks.
        max_norm: bound; 0 = no clipping.
    """
    if max_norm > 0 and math.isfinite(norm) and norm > max_norm:
        for p in parameters:
            if p.grad is not None:
                local = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
                local.mul_(max_norm / norm)


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Clip the global gradient norm and return what it was before.

    Args:
        parameters: whole tensors.
        max_norm: bound; 0 = no clipping.

    Returns:
        The norm; not finite when any gradient is not: then nothing was scaled, and the step must
        be skipped.
    """
    parameters = list(parameters)
    norm = float(grad_norm(parameters))
    scale_grads_(parameters, norm, max_norm)
    return norm
