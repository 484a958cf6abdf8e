"""The indexer's queries and keys in FP4 behind a Hadamard transform (reference B.7, paper 5.2.1).

The transform spreads outliers over the head dim before rounding. Queries and keys both get it, so
their products are unchanged but for the rounding.
"""

# Legend: L indexer head dim
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.linear import ActivationCast
from quant.formats import MXFP4, fake_quant
from quant.probe import QuantProbe


def hadamard_matrix(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Sylvester's matrix of +1 and -1: ``[[H, H], [H, -H]]`` from ``[[1]]``; symmetric.

    Raises:
        ValueError: the size is no power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard matrix of Sylvester's kind needs a power of two, got {size}")
    # Entry (i, j) is the parity of the bits that i and j share.
    index = torch.arange(size, device=device)
    common = index[:, None] & index[None, :]
    parity = torch.zeros_like(common)
    for bit in range(size.bit_length() - 1):
        parity ^= (common >> bit) & 1
    return 1.0 - 2.0 * parity


def hadamard(x_L: Tensor) -> Tensor:
    """Normalised transform of the last dim, computed in fp32; its own inverse and transpose."""
    size = x_L.shape[-1]
    # The +-1 matrix is exact in every dtype a matmul may reduce its operands to.
    y_L = x_L.float() @ hadamard_matrix(size, x_L.device)
    return y_L.mul_(size**-0.5).to(x_L.dtype)


class _HadamardFP4(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_L: Tensor, cast: IndexerCast) -> Tensor:
        y_L = hadamard(x_L)
        cast.probe.saw(cast.name)
        cast.probe.measure("indexer", y_L, MXFP4)
        return fake_quant(y_L, MXFP4)

    @staticmethod
    def backward(ctx: Any, grad_L: Tensor) -> tuple[Tensor, None]:
        return hadamard(grad_L), None


class IndexerCast(ActivationCast):
    """Hadamard, then FP4; gradients pass straight through the rounding.

    Args:
        name: of the module that it replaces.
        probe: told that it ran.
    """

    def __init__(self, name: str, probe: QuantProbe) -> None:
        super().__init__()
        self.name, self.probe = name, probe

    def forward(self, x: Tensor) -> Tensor:
        """Cast ``[..., L]``."""
        return _HadamardFP4.apply(x, self)
