"""Hybrid Newton-Schulz: drive the singular values of matrices to 1 by odd quintic iterations.

DeepSeek-V4 section 2.4, algorithm 1. :func:`newton_schulz_reference` is the formula, one matrix at
a time; :func:`newton_schulz` takes a batch of equal shape and is what runs. Two things make it
fast: all matrices of a shape go through one batched matmul, and where one side is at least twice
the other, two iterations are merged. Merging works on the Gram matrix ``G = X X^T`` alone: with
``X' = (a + S) X`` and ``S = b G + c G^2`` the next Gram matrix is ``(a + S) G (a + S)``
(polynomials in G commute), and both factors are multiplied before X is touched.
Never more than two: G squares the condition number, and a third step would amplify what bf16
rounds away until it diverges. Nothing here knows of parameters, momentum or ranks.
"""

# Legend: N matrices, R rows, C columns, M = min(R, C)
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]

# Below this Frobenius norm a matrix is scaled by a constant instead, so zeros stay zeros. Small
# enough that every gradient is normalised, large enough that squares lost to underflow in the norm
# cannot blow a matrix up.
NORM_FLOOR = 1e-15


def newton_schulz_reference(matrix_RC: Tensor, coefficients: Sequence[Coefficients]) -> Tensor:
    """Orthogonalise one matrix, written as in the paper; any floating dtype.

    Args:
        matrix_RC: one matrix.
        coefficients: (a, b, c) of each iteration, in order.

    Returns:
        Same shape and dtype, singular values near 1; a zero matrix stays zero.
    """
    rows, cols = matrix_RC.shape
    if rows > cols:
        return newton_schulz_reference(matrix_RC.mT, coefficients).mT
    x = matrix_RC / matrix_RC.norm().clamp(min=NORM_FLOOR)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def newton_schulz(
    batch_NRC: Tensor, coefficients: Sequence[Coefficients], dtype: torch.dtype
) -> Tensor:
    """Orthogonalise each matrix of a batch.

    Args:
        batch_NRC: matrices of equal shape, fp32; not changed.
        coefficients: (a, b, c) of each iteration, in order.
        dtype: of the matmuls and the result, fp32 or bf16.

    Returns:
        Same shape in ``dtype``, singular values near 1; a zero matrix stays zero.

    Raises:
        ValueError: not three dims.
    """
    if batch_NRC.ndim != 3:
        raise ValueError(f"newton_schulz takes [N, R, C], got {tuple(batch_NRC.shape)}")
    norm_N11 = torch.linalg.vector_norm(batch_NRC, dim=(-2, -1), keepdim=True)
    x = torch.empty_like(batch_NRC, dtype=dtype, memory_format=torch.contiguous_format)
    torch.mul(batch_NRC, norm_N11.clamp_(min=NORM_FLOOR).reciprocal_(), out=x)
    work = _Workspace(x)
    step, merge = 0, merges_pairs(*batch_NRC.shape[-2:])
    while step < len(coefficients):
        if merge and step + 1 < len(coefficients):
            x = work.pair(x, coefficients[step], coefficients[step + 1])
            step += 2
        else:
            x = work.single(x, coefficients[step])
            step += 1
    return x


def merges_pairs(rows: int, cols: int) -> bool:
    """Whether merging two iterations pays: 6 M^3 FLOPs more, and 4 M^2 max(R, C) fewer."""
    return max(rows, cols) >= 2 * min(rows, cols)


def matmul_flops(rows: int, cols: int, num_steps: int, merged: bool = False) -> int:
    """FLOPs of the matmuls for one matrix, two per multiply-add.

    Args:
        rows: of the matrix.
        cols: of the matrix.
        num_steps: iterations.
        merged: as :func:`newton_schulz` runs them; else the formula's three products each.
    """
    small, large = min(rows, cols), max(rows, cols)
    single, pair = 4 * small**2 * large + 2 * small**3, 4 * small**2 * large + 10 * small**3
    num_pairs = num_steps // 2 if merged and merges_pairs(rows, cols) else 0
    return num_pairs * pair + (num_steps - 2 * num_pairs) * single


class _Workspace:
    """Buffers of one batch: x and ``spare`` take turns, so iterations allocate nothing."""

    def __init__(self, x_NRC: Tensor) -> None:
        n, rows, cols = x_NRC.shape
        self.tall = rows > cols  # then X^T X is the small side: no transposed copy is ever made
        self.spare = torch.empty_like(x_NRC)
        side = min(rows, cols)
        self.small = [x_NRC.new_empty(n, side, side) for _ in range(3)]

    def single(self, x: Tensor, stage: Coefficients) -> Tensor:
        """One iteration; returns the buffer that holds the result."""
        a, b, c = stage
        g, s, _ = self.small
        self._gram(x, out=g)
        torch.baddbmm(g, g, g, beta=b, alpha=c, out=s)
        return self._apply(x, s, a)

    def pair(self, x: Tensor, first: Coefficients, second: Coefficients) -> Tensor:
        """Two iterations that touch x once (see the module docstring)."""
        (a1, b1, c1), (a2, b2, c2) = first, second
        g, s, h = self.small
        self._gram(x, out=g)
        torch.baddbmm(g, g, g, beta=b1, alpha=c1, out=s)  # S1 = b1 G + c1 G^2
        torch.baddbmm(g, g, s, beta=a1, out=h)  # G (a1 + S1)
        torch.baddbmm(h, h, s, beta=a1, out=g)  # G' = (a1 + S1) G (a1 + S1)
        torch.baddbmm(g, g, g, beta=b2, alpha=c2, out=h)  # S2 = b2 G' + c2 G'^2
        torch.baddbmm(h, h, s, beta=a1, out=g)  # a1 S2 + S2 S1
        g.add_(s, alpha=a2)  # (a2 + S2)(a1 + S1) - a1 a2
        return self._apply(x, g, a1 * a2)

    def _gram(self, x: Tensor, out: Tensor) -> None:
        torch.bmm(x.mT, x, out=out) if self.tall else torch.bmm(x, x.mT, out=out)

    def _apply(self, x: Tensor, poly: Tensor, scale: float) -> Tensor:
        left, right = (x, poly) if self.tall else (poly, x)
        result = torch.baddbmm(x, left, right, beta=scale, out=self.spare)
        self.spare = x
        return result
