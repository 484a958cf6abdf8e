"""Balance: the selection bias (reference B.10). The loss is in ``model/kernels/routing.py``."""

# Legend: E experts
from __future__ import annotations

import torch
from torch import Tensor

from model.moe.router import Gate


@torch.no_grad()
def update_bias(gate: Gate, load_E: Tensor, speed: float) -> None:
    """Move the selection bias after a step: ``b_e += speed * sign(mean load - load_e)``.

    Args:
        gate: a learned gate.
        load_E: tokens per expert over the whole global batch.
        speed: step of the bias, 0 to leave it.
    """
    gate.bias += speed * torch.sign(load_E.mean() - load_E)
