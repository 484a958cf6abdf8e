"""Plain references of the per-token ops: RMSNorm and the clamped SwiGLU (reference B.1, B.9)."""

# Legend: N rows, I expert intermediate
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``x * rsqrt(mean x^2 + eps) * weight`` over the last dim; fp32 inside, cast once."""
    x_fp32 = x.float()
    y = x_fp32 * torch.rsqrt(x_fp32.square().mean(dim=-1, keepdim=True) + eps)
    return (y if weight is None else y * weight.float()).to(x.dtype)


def swiglu(gate_NI: Tensor, up_NI: Tensor, weight_N: Tensor | None, limit: float) -> Tensor:
    """``silu(min(gate, limit)) * clamp(up, +-limit) * weight``.

    fp32 inside, cast once to the dtype of ``gate``; the gradient is zero where the clamp acts.
    """
    gate, up = gate_NI.float().clamp(max=limit), up_NI.float().clamp(-limit, limit)
    a_NI = F.silu(gate) * up
    return (a_NI if weight_N is None else a_NI * weight_N[:, None]).to(gate_NI.dtype)
