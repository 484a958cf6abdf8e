"""Hybrid Newton-Schulz: drive the singular values of matrices to 1 by odd quintic iterations.

DeepSeek-V4 section 2.4, algorithm 1. :func:`newton_schulz_reference` is the formula, one matrix at
a time; :func:`newton_schulz` takes a batch of equal shape and is what runs: all matrices of a shape
go through one batched matmul, always on the smaller side, and iterations allocate nothing. Nothing
here knows of parameters, momentum or ranks.

Iterations are not merged (two of them as one polynomial of the Gram matrix would save 15 % of the
FLOPs): their common factor is near 12 where its parts are near 3, so bf16 rounds it by 4 times as
much, singular values pass 1.264, where the quintic's basin ends, and the matrix blows up.
"""

# Legend: N matrices, R rows, C columns, M = min(R, C)
from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]

# Below this Frobenius norm a matrix is scaled by a constant instead, so zeros stay zeros. Small
# enough that every gradient is normalised, large enough that squares lost to underflow in the norm
# cannot blow a matrix up.
NORM_FLOOR = 1e-15


class SymmetricProduct(Protocol):
    """``out <- beta plus + alpha left right``, where that is symmetric: half need be computed.

    ``left`` [N, M, K] is contiguous or a transposed view of what is; ``right`` is its transpose,
    or itself where it is symmetric.
    """

    def __call__(
        self,
        left_NMK: Tensor,
        right_NKM: Tensor,
        out_NMM: Tensor,
        plus_NMM: Tensor | None = None,
        beta: float = 0.0,
        alpha: float = 1.0,
    ) -> None:
        """Write ``out``; without ``plus`` beta is 0 and alpha 1."""
        ...


def whole_product(
    left_NMK: Tensor,
    right_NKM: Tensor,
    out_NMM: Tensor,
    plus_NMM: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> None:
    """The :class:`SymmetricProduct` that computes all of it, by torch."""
    if plus_NMM is None:
        torch.bmm(left_NMK, right_NKM, out=out_NMM)
    else:
        torch.baddbmm(plus_NMM, left_NMK, right_NKM, beta=beta, alpha=alpha, out=out_NMM)


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
    batch_NRC: Tensor,
    coefficients: Sequence[Coefficients],
    dtype: torch.dtype,
    product: SymmetricProduct = whole_product,
) -> Tensor:
    """Orthogonalise each matrix of a batch.

    Args:
        batch_NRC: matrices of equal shape, fp32; not changed.
        coefficients: (a, b, c) of each iteration, in order.
        dtype: of the matmuls and the result, fp32 or bf16.
        product: forms the two symmetric products of an iteration.

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
    work = _Workspace(x, product)
    for stage in coefficients:
        x = work.iterate(x, stage)
    return x


def matmul_flops(rows: int, cols: int, num_steps: int) -> int:
    """FLOPs of the matmuls for one matrix, two per multiply-add; symmetric products in whole.

    Args:
        rows: of the matrix.
        cols: of the matrix.
        num_steps: iterations.
    """
    small, large = min(rows, cols), max(rows, cols)
    return num_steps * (4 * small**2 * large + 2 * small**3)


class _Workspace:
    """Buffers of one batch: x and ``spare`` take turns, so iterations allocate nothing."""

    def __init__(self, x_NRC: Tensor, product: SymmetricProduct) -> None:
        self.product = product
        n, rows, cols = x_NRC.shape
        self.tall = rows > cols  # then X^T X is the small side: no transposed copy is ever made
        self.spare = torch.empty_like(x_NRC)
        side = min(rows, cols)
        self.small = [x_NRC.new_empty(n, side, side) for _ in range(2)]

    def iterate(self, x: Tensor, stage: Coefficients) -> Tensor:
        """One iteration; returns the buffer that holds the result."""
        a, b, c = stage
        gram, poly = self.small
        self.product(x.mT, x, gram) if self.tall else self.product(x, x.mT, gram)
        self.product(gram, gram, poly, gram, b, c)
        left, right = (x, poly) if self.tall else (poly, x)
        result = torch.baddbmm(x, left, right, beta=a, out=self.spare)
        self.spare = x
        return result
