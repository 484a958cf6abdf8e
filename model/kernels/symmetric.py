"""Products of matrices that are symmetric: two of the three of a Newton-Schulz iteration.

``optim/newton_schulz.py`` has the same function for itself, since ``optim`` knows of no kernels.
"""

# Legend: N matrices, M rows, K contracted
from __future__ import annotations

import torch
from torch import Tensor


def symmetric_product(
    left_NMK: Tensor,
    right_NKM: Tensor,
    out_NMM: Tensor,
    plus_NMM: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> None:
    """``out <- beta plus + alpha left right``, of which the caller says that it is symmetric.

    Args:
        left_NMK: matrices; contiguous, or transposed views of contiguous ones.
        right_NKM: their transposes; of a symmetric ``left``, itself.
        out_NMM: the result; none of the inputs.
        plus_NMM: symmetric; None: zero.
        beta: its factor.
        alpha: of the product.
    """
    if plus_NMM is None:
        assert (beta, alpha) == (0.0, 1.0)
        torch.bmm(left_NMK, right_NKM, out=out_NMM)
    else:
        torch.baddbmm(plus_NMM, left_NMK, right_NKM, beta=beta, alpha=alpha, out=out_NMM)
