"""RMSNorm: all in fp32, cast once at the end (reference B.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import Kernels
from model.kernels.select import select


class RMSNorm(nn.Module):
    """``x * rsqrt(mean x^2 + eps) * weight`` over the last dim.

    Args:
        dim: size of the last dim.
        eps: added inside the root.
        kernels: which implementation runs.
    """

    def __init__(self, dim: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self._rms_norm = select("rms_norm", kernels)
        self._norm_rope = select("norm_rope", kernels)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Normalise, and rotate if tables are given; shape and dtype of ``x``."""
        if rope is None:
            return self._rms_norm(x, self.weight, self.eps)
        return self._norm_rope(x, self.weight, self.eps, *rope)
