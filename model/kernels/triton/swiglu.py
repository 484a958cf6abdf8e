"""Clamped SwiGLU in Triton, one pass each way (reference B.9; ``model/kernels/elementwise.py``)."""

# Legend: N rows, I expert intermediate
from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.elementwise_fast import swiglu_by
from model.kernels.triton.launch import OPS, Shipped, Tile, blocks, define, launch

_FORWARD = Tile({"BI": 1024}, warps=4, stages=1)
_WARPS = 8  # of the backward pass, which holds a whole row


@triton.jit
def swiglu_forward(G, U, WEIGHT, A, I, limit, HAS_WEIGHT: tl.constexpr, BI: tl.constexpr):
    """``a = silu(min(g, limit)) * clamp(u) * w``. Grid (rows, blocks of I)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    ok = i < I
    g = tl.load(G + row * I + i, mask=ok, other=0.0).to(tl.float32)
    u = tl.load(U + row * I + i, mask=ok, other=0.0).to(tl.float32)
    g = tl.minimum(g, limit, propagate_nan=tl.PropagateNan.ALL)
    u = tl.clamp(u, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    a = g / (1.0 + tl.exp(-g)) * u
    if HAS_WEIGHT:
        a = a * tl.load(WEIGHT + row)
    tl.store(A + row * I + i, a.to(A.dtype.element_ty), mask=ok)


@triton.jit
def swiglu_backward(
    G, U, WEIGHT, DA, DG, DU, DWEIGHT, I, limit, HAS_WEIGHT: tl.constexpr, BI: tl.constexpr
):
    """Gradients, zero where the clamp acts; a program holds a row: one sum for dw. Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BI)
    ok = i < I
    g0 = tl.load(G + row * I + i, mask=ok, other=0.0).to(tl.float32)
    u0 = tl.load(U + row * I + i, mask=ok, other=0.0).to(tl.float32)
    da = tl.load(DA + row * I + i, mask=ok, other=0.0).to(tl.float32)
    g = tl.minimum(g0, limit, propagate_nan=tl.PropagateNan.ALL)
    u = tl.clamp(u0, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    s = 1.0 / (1.0 + tl.exp(-g))
    if HAS_WEIGHT:
        tl.store(DWEIGHT + row, tl.sum(da * (g * s * u), 0))
        da = da * tl.load(WEIGHT + row)
    dg = tl.where(g0 > limit, 0.0, da * u * s * (1.0 + g * (1.0 - s)))
    du = tl.where((u0 > limit) | (u0 < -limit), 0.0, da * g * s)
    tl.store(DG + row * I + i, dg.to(DG.dtype.element_ty), mask=ok)
    tl.store(DU + row * I + i, du.to(DU.dtype.element_ty), mask=ok)


def _forward(gate: Tensor, up: Tensor, weight: Tensor | None, limit: float) -> Tensor:
    a = torch.empty_like(gate)
    rows, width = gate.shape
    launch(
        swiglu_forward, (rows, blocks(width, _FORWARD.sizes["BI"])), gate, up, weight, a, width,
        limit, HAS_WEIGHT=weight is not None, **_FORWARD.constants(),
    )  # fmt: skip
    return a


def _backward(
    gate: Tensor, up: Tensor, weight: Tensor | None, grad: Tensor, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = gate.shape
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    grad_weight = gate.new_empty(0 if weight is None else rows, dtype=torch.float32)
    launch(
        swiglu_backward, (rows,), gate, up, weight, grad, grad_gate, grad_up, grad_weight, width,
        limit, HAS_WEIGHT=weight is not None, BI=triton.next_power_of_2(width), num_warps=_WARPS,
        num_stages=1,
    )  # fmt: skip
    return grad_gate, grad_up, grad_weight


define("triton_swiglu(Tensor gate, Tensor up, Tensor? weight, float limit) -> Tensor", _forward)
define(
    "triton_swiglu_backward(Tensor gate, Tensor up, Tensor? weight, Tensor grad, float limit)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
)


# As model.kernels.elementwise.swiglu: same arguments and result.
swiglu = partial(swiglu_by, (OPS.triton_swiglu, OPS.triton_swiglu_backward))


def _shipped(width: int) -> tuple[Shipped, ...]:
    types = {"G": "*bf16", "U": "*bf16", "WEIGHT": "*fp32", "I": "i32", "limit": "fp32"}
    back = Tile({"BI": triton.next_power_of_2(width)}, _WARPS, 1)
    grads = {"DA": "*bf16", "DG": "*bf16", "DU": "*bf16", "DWEIGHT": "*fp32"}
    weighted = {"HAS_WEIGHT": True}
    return (
        Shipped("forward", swiglu_forward, {**types, "A": "*bf16"}, weighted, {"other": _FORWARD}),
        Shipped(
            f"backward I={width}", swiglu_backward, {**types, **grads}, weighted, {"other": back}
        ),
    )


def _unweighted(line: Shipped) -> Shipped:
    """Of the shared experts."""
    return replace(line, name=f"{line.name} unweighted", constants={"HAS_WEIGHT": False})


SHIPPED = (
    *_shipped(512), *_shipped(2048)[1:], *(_unweighted(line) for line in _shipped(2048)),
)  # fmt: skip
