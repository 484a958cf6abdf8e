"""Cross-entropy of rows of logits in Triton (reference B.8; ``model/kernels/cross_entropy.py``).

A program reads its row twice: for the largest logit and the sum, then for the gradient, which it
writes in the dtype of the products that follow. It takes two exps a logit, where the reference
takes one and keeps it: memory leads here, and a kept one would be written and read once more.
"""
# pyright: reportGeneralTypeIssues=false

# Legend: N positions, V vocabulary
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.triton.launch import (
    INTERPRETER,
    OPS,
    Shipped,
    Tile,
    architecture_of,
    define,
    launch,
    tile_of,
)

_TILES = {INTERPRETER: Tile({"BV": 512}), "other": Tile({"BV": 4096}, warps=8)}


@triton.jit
def cross_entropy_row(LOGITS, LABELS, LOSSES, GRAD, V, HAS_GRAD: tl.constexpr, BV: tl.constexpr):
    """Loss and gradient of a row; GRAD may be LOGITS. Grid (rows,)."""
    row = tl.program_id(0)
    LOGITS += row.to(tl.int64) * V
    label = tl.load(LABELS + row)
    counted = tl.where(label >= 0, 1.0, 0.0)
    target = tl.maximum(label, 0)
    picked = tl.load(LOGITS + target)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in tl.range(0, V, BV):
        v = first + tl.arange(0, BV)
        logits = tl.load(LOGITS + v, mask=v < V, other=float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(logits - base), 0)
        top = higher
    tl.store(LOSSES + row, (tl.log(total) - (picked - top)) * counted)
    if HAS_GRAD:
        GRAD += row.to(tl.int64) * V
        tl.debug_barrier()  # GRAD may be LOGITS
        for first in tl.range(0, V, BV):
            v = first + tl.arange(0, BV)
            logits = tl.load(LOGITS + v, mask=v < V, other=float("-inf"))
            p = tl.exp(logits - top) * (counted / total) - tl.where(v == target, counted, 0.0)
            tl.store(GRAD + v, p.to(GRAD.dtype.element_ty), mask=v < V)


def _rows_(logits: Tensor, labels: Tensor, grad: Tensor | None) -> Tensor:
    N, V = logits.shape
    losses = logits.new_empty(N)
    launch(
        cross_entropy_row, (N,), logits, labels, losses, grad, V, HAS_GRAD=grad is not None,
        **tile_of(_TILES, architecture_of(logits.device)).constants(),
    )  # fmt: skip
    return losses


define(
    "triton_cross_entropy_rows_(Tensor logits, Tensor labels, Tensor(a!)? grad) -> Tensor", _rows_
)


def cross_entropy_rows(
    logits_NV: Tensor, labels_N: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """:func:`model.kernels.cross_entropy.cross_entropy_rows`: same arguments and results."""
    grad_NV = None
    if dtype is not None:  # over the logits, if it has their dtype
        grad_NV = (
            logits_NV if dtype == logits_NV.dtype else torch.empty_like(logits_NV, dtype=dtype)
        )
    losses_N = OPS.triton_cross_entropy_rows_(logits_NV, labels_N.contiguous(), grad_NV)
    return losses_N, grad_NV


SHIPPED = tuple(
    Shipped(
        f"{'gradient' if grad else 'loss'} {kind}", cross_entropy_row,
        {"LOGITS": "*fp32", "LABELS": "*i64", "LOSSES": "*fp32", "GRAD": f"*{kind}", "V": "i32:16"},
        {"HAS_GRAD": grad}, _TILES,
    )
    for kind, grad in (("bf16", True), ("fp32", True), ("fp32", False))
)  # fmt: skip
