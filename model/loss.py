"""The objective and the chunked cross-entropy (reference B.8, B.10, B.11).

Every normaliser is a count of the whole global batch, known before the forward pass, so a
microbatch's loss is its share and shares add up over microbatches, ranks and pipeline stages.
"""

# Legend: N positions, D hidden, V vocabulary, K prediction depths
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import IndexerPhase
from model.kernels.cross_entropy import cross_entropy_rows
from model.kernels.ran import head_multiplied

CrossEntropy = Callable[[Tensor, Tensor, torch.dtype | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Objective:
    """What one step minimises, and the global counts that normalise it.

    Attributes:
        targets_K: positions with a label in the global batch, for the main head and every MTP
            depth.
        tokens: non-padding tokens of the global batch.
        mtp_weight: weight of the MTP loss (mean over depths); 0 leaves the MTP blocks out.
        indexer_weight: weight of each CSA layer's KL; 0 switches the indexer's loss off.
        balance_weight: weight of each learned layer's balance loss; 0 switches it off.
        indexer_phase: how CSA layers attend and learn.
        monitors: also compute the costly monitors.
        replay: indices to use instead of the model's own choices, by FQN of gate or attention.
        record: filled with the indices chosen, if given.
        losses: form the losses; without them a pass is good for ``record`` alone.
    """

    targets_K: tuple[float, ...]
    tokens: float
    mtp_weight: float = 0.3
    indexer_weight: float = 1e-2
    balance_weight: float = 1e-4
    indexer_phase: IndexerPhase = IndexerPhase.sparse
    monitors: bool = False
    replay: dict[str, Tensor] | None = None
    record: dict[str, Tensor] | None = None
    losses: bool = True


@dataclass
class ModelOutput:
    """Shares of one microbatch.

    Attributes:
        total: this microbatch's share of the objective.
        losses: ``loss``, ``loss_mtp``, ``loss_indexer``, ``loss_balance``: shares, detached.
        expert_load: gate FQN -> tokens per expert [E].
        monitors: ``<name>.sum`` and ``<name>.count``; the value is sum / count.
    """

    total: Tensor
    losses: dict[str, Tensor]
    expert_load: dict[str, Tensor]
    monitors: dict[str, Tensor]


@contextmanager
def tensor_float_32(wanted: bool) -> Iterator[None]:
    """Lets CUDA multiply fp32 operands as TF32 while it is open, if wanted; else changes nothing.

    Args:
        wanted: whether.
    """
    if not wanted:
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forms loss and gradients together, chunk by chunk; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        w_VD: Tensor,
        labels_N: Tensor,
        chunk: int,
        dtype: torch.dtype,
        cross_entropy: CrossEntropy,
    ) -> Tensor:
        needs_x, needs_w = ctx.needs_input_grad[:2]
        w = w_VD.to(dtype)
        grad_x = torch.zeros_like(x_ND, dtype=torch.float32) if needs_x else None
        grad_w = torch.zeros_like(w_VD, dtype=torch.float32) if needs_w else None
        total = torch.zeros((), device=x_ND.device, dtype=torch.float32)
        for begin in range(0, x_ND.shape[0], chunk):
            rows = slice(begin, begin + chunk)
            x, labels = x_ND[rows].to(dtype), labels_N[rows]
            wanted = dtype if needs_x or needs_w else None
            head_multiplied(_precision_of(dtype))
            losses, grad = cross_entropy(project(x, w), labels, wanted)
            total += losses.sum()
            if grad is None:
                continue
            if grad_x is not None:
                grad_x[rows] = grad @ w
            if grad_w is not None:
                grad_w += grad.T @ x
        ctx.save_for_backward(grad_x, grad_w)
        ctx.dtypes = x_ND.dtype, w_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_w = ctx.saved_tensors
        x_dtype, w_dtype = ctx.dtypes
        return (
            None if grad_x is None else (grad_x * grad).to(x_dtype),
            None if grad_w is None else (grad_w * grad).to(w_dtype),
            None,
            None,
            None,
            None,
        )


def _precision_of(dtype: torch.dtype) -> str:
    """Name of the precision in which products of ``dtype`` are formed now."""
    if dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}.get(dtype, str(dtype))


def project(x: Tensor, w_VD: Tensor) -> Tensor:
    """Logits in fp32 of operands of one dtype.

    CUDA keeps the fp32 accumulator of a bf16 product; a CPU rounds it to bf16 once, as there is no
    such product.
    """
    if x.dtype is torch.float32 or x.device.type != "cuda":
        return F.linear(x, w_VD).float()
    return torch.mm(x.flatten(0, -2), w_VD.T, out_dtype=torch.float32).unflatten(0, x.shape[:-1])


def cross_entropy_sum(
    x_ND: Tensor,
    w_VD: Tensor,
    labels_N: Tensor,
    chunk: int,
    dtype: torch.dtype = torch.float32,
    cross_entropy: CrossEntropy = cross_entropy_rows,
    tf32: bool = False,
) -> Tensor:
    """Sum of cross-entropies over the labelled positions, nats; fp32 logits, never [N, V] at once.

    Args:
        x_ND: normalised output of the model.
        w_VD: prediction head.
        labels_N: token ids, negative where nothing is predicted.
        chunk: positions of logits alive at once.
        dtype: operands of the head's three products.
        cross_entropy: of a chunk's logits, with their gradient.
        tf32: multiply fp32 operands as TF32 (CUDA); all three products are formed here.
    """
    with tensor_float_32(tf32):
        return _ChunkedCrossEntropy.apply(x_ND, w_VD, labels_N, chunk, dtype, cross_entropy)
