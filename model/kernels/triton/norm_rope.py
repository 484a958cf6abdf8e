"""RMSNorm and rotary embedding in Triton, one pass each way.

The references are ``model/kernels/elementwise.py`` (reference B.1) and ``model.rope.apply_rope``
(reference B.4). Nothing but inputs is kept for the backward pass. The gradient of a norm's weight
is summed over a fixed number of runs of rows, then over the runs: in one order on every device.
"""
# pyright: reportGeneralTypeIssues=false

# Legend: N rows (of RoPE: of a head of a token), K channels, R rotation pairs
from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.elementwise_fast import rope_by, tables
from model.kernels.triton.launch import (
    INTERPRETER,
    OPS,
    Shipped,
    Tile,
    architecture_of,
    blocks,
    define,
    launch,
    power_of_two,
)

_RUNS = 256  # of rows, each with its own part of the weight's gradient
_ELEMENTS = {INTERPRETER: 4096, "other": 2048}  # of a block, if a row does not have more


@triton.jit
def turned(
    x, COS, SIN, sign, n, N, H, K, R: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """The last 2R of K channels of rows n [BN, BK] rotated as pairs; K is even."""
    even, odd = tl.split(tl.reshape(x, [BN, BK // 2, 2]))
    r = tl.arange(0, BK // 2) - (K // 2 - R)
    ok = (n < N)[:, None] & ((r >= 0) & (r < R))[None, :]
    at = (n // H)[:, None] * R + r[None, :]
    cos = tl.load(COS + at, mask=ok, other=1.0)
    sin = tl.load(SIN + at, mask=ok, other=0.0) * sign
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [BN, BK])


@triton.jit
def rms_norm_forward(
    X, W, COS, SIN, Y, N, K, H, eps, HAS_WEIGHT: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """``y = x / rms(x) * w``, the last 2R channels rotated. Grid (blocks of rows,)."""
    rows, k = tl.arange(0, BN), tl.arange(0, BK)
    block = tl.program_id(0)
    ok = (block * BN + rows < N)[:, None] & (k < K)[None, :]
    at = rows[:, None] * K + k[None, :]
    X += block.to(tl.int64) * BN * K
    Y += block.to(tl.int64) * BN * K
    x = tl.load(X + at, mask=ok, other=0.0).to(tl.float32)
    y = x * (1.0 / tl.sqrt(tl.sum(x * x, 1) / K + eps))[:, None]
    if HAS_WEIGHT:
        y = y * tl.load(W + k, mask=k < K, other=0.0)[None, :]
    if R > 0:
        y = turned(y, COS, SIN, 1.0, block * BN + rows, N, H, K, R, BN, BK)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=ok)


@triton.jit
def rms_norm_backward(
    X, W, COS, SIN, G, GX, PW, N, K, H, run, eps, HAS_WEIGHT: tl.constexpr, R: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradients of a run of rows: x, and this run's part of w. Grid (runs,)."""
    rows, k = tl.arange(0, BN), tl.arange(0, BK)
    first_row = tl.program_id(0) * run
    stop = tl.minimum(first_row + run, N)
    total = tl.zeros([BK], tl.float32)
    if HAS_WEIGHT:
        w = tl.load(W + k, mask=k < K, other=0.0)[None, :]
    X += first_row.to(tl.int64) * K
    G += first_row.to(tl.int64) * K
    GX += first_row.to(tl.int64) * K
    for first in tl.range(0, run, BN):
        ok = (first_row + first + rows < stop)[:, None] & (k < K)[None, :]
        at = (first + rows)[:, None] * K + k[None, :]
        x = tl.load(X + at, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(G + at, mask=ok, other=0.0).to(tl.float32)
        if R > 0:
            g = turned(g, COS, SIN, -1.0, first_row + first + rows, stop, H, K, R, BN, BK)
        r = (1.0 / tl.sqrt(tl.sum(x * x, 1) / K + eps))[:, None]
        if HAS_WEIGHT:
            total += tl.sum(g * x * r, 0)
            g = g * w
        gx = r * (g - x * (r * r * (tl.sum(g * x, 1) / K)[:, None]))
        tl.store(GX + at, gx.to(GX.dtype.element_ty), mask=ok)
    if HAS_WEIGHT:
        tl.store(PW + tl.program_id(0) * K + k, total, mask=k < K)


@triton.jit
def rope_rotate(
    X, COS, SIN, Y, N, H, sign, K: tl.constexpr, R: tl.constexpr, KP: tl.constexpr,
    RP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rotate the last 2R channels as pairs, copy the others. Grid (blocks of rows,)."""
    rows = tl.arange(0, BN)
    block = tl.program_id(0)
    n = block * BN + rows
    X += block.to(tl.int64) * BN * K
    Y += block.to(tl.int64) * BN * K
    if K > 2 * R:
        k = tl.arange(0, KP)
        ok = (n < N)[:, None] & (k < K - 2 * R)[None, :]
        at = rows[:, None] * K + k[None, :]
        tl.store(Y + at, tl.load(X + at, mask=ok), mask=ok)
    r, pair = tl.arange(0, RP), tl.arange(0, 2 * RP)
    ok = (n < N)[:, None] & (pair < 2 * R)[None, :]
    at = rows[:, None] * K + (K - 2 * R) + pair[None, :]
    x = tl.load(X + at, mask=ok, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, [BN, RP, 2]))
    table_ok = (n < N)[:, None] & (r < R)[None, :]
    table_at = (n // H)[:, None] * R + r[None, :]
    cos = tl.load(COS + table_at, mask=table_ok, other=0.0)
    sin = tl.load(SIN + table_at, mask=table_ok, other=0.0) * sign
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    y = tl.reshape(turned, [BN, 2 * RP])
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=ok)


def _tile(width: int, architecture: str) -> Tile:
    """Blocks that hold whole rows."""
    elements = _ELEMENTS.get(architecture, _ELEMENTS["other"])
    padded = power_of_two(width)
    return Tile({"BN": max(1, elements // padded)}, warps=8 if padded > 4096 else 4, stages=1)


def _table(x: Tensor, cos: Tensor | None) -> dict[str, int]:
    """Heads of a token, and pairs that are rotated."""
    if cos is None:
        return {"H": 1, "R": 0}
    R = cos.shape[-1]
    return {"H": x.numel() // max(x.shape[-1] * (cos.numel() // R), 1), "R": R}


def _norm(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float
) -> Tensor:
    K = x.shape[-1]
    N = x.numel() // max(K, 1)
    table = _table(x, cos)
    y = torch.empty_like(x)
    tile = _tile(K, architecture_of(x.device))
    launch(
        rms_norm_forward, (blocks(N, tile.sizes["BN"]),), x, weight, cos, sin, y, N, K, table["H"],
        eps, HAS_WEIGHT=weight is not None, R=table["R"], BK=power_of_two(K), **tile.constants(),
    )  # fmt: skip
    return y


def _norm_backward(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, grad: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    K = x.shape[-1]
    table = _table(x, cos)
    N = x.numel() // max(K, 1)
    tile = _tile(K, architecture_of(x.device))
    run = blocks(blocks(N, _RUNS), tile.sizes["BN"]) * tile.sizes["BN"]
    runs = blocks(N, run) if N else 0
    grad_x = torch.empty_like(x)
    parts = x.new_empty(0 if weight is None else runs, K, dtype=torch.float32)
    launch(
        rms_norm_backward, (runs,), x, weight, cos, sin, grad, grad_x, parts, N, K, table["H"], run,
        eps, HAS_WEIGHT=weight is not None, R=table["R"], BK=power_of_two(K), **tile.constants(),
    )  # fmt: skip
    return grad_x, parts if weight is None else parts.sum(0)


def _rope(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    K, R = x.shape[-1], cos.shape[-1]
    N, tokens = x.numel() // max(K, 1), cos.numel() // R
    y = torch.empty_like(x)
    tile = _tile(K, architecture_of(x.device))
    launch(
        rope_rotate, (blocks(N, tile.sizes["BN"]),), x, cos, sin, y, N, N // max(tokens, 1), sign,
        K=K, R=R, KP=power_of_two(max(K - 2 * R, 1)), RP=power_of_two(R), **tile.constants(),
    )  # fmt: skip
    return y


_INPUTS = "Tensor x, Tensor? weight, Tensor? cos, Tensor? sin"
define(f"triton_rms_norm({_INPUTS}, float eps) -> Tensor", _norm)
define(
    f"triton_rms_norm_backward({_INPUTS}, Tensor grad, float eps) -> (Tensor, Tensor)",
    _norm_backward,
)
define("triton_rope(Tensor x, Tensor cos, Tensor sin, float sign) -> Tensor", _rope)


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
        eps: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        return OPS.triton_rms_norm(x, weight, cos, sin, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        grad_x, grad_weight = OPS.triton_rms_norm_backward(
            x, weight, cos, sin, grad.contiguous(), ctx.eps
        )
        return grad_x, None if weight is None else grad_weight, None, None, None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """:func:`model.kernels.elementwise.rms_norm` in Triton."""
    weight = None if weight is None else weight.float().contiguous()
    return _NormRope.apply(x.contiguous(), weight, None, None, eps)


def norm_rope(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """RMSNorm, then the rotation, in one pass and rounded once; as the two one after the other."""
    weight = None if weight is None else weight.float().contiguous()
    cos, sin = tables(x, cos, sin)
    return _NormRope.apply(x.contiguous(), weight, cos, sin, eps)


# As model.rope.apply_rope: same arguments and results.
rope = partial(rope_by, OPS.triton_rope)
rope_back = partial(rope_by, OPS.triton_rope, sign=-1.0)


_FLOATS = {
    **dict.fromkeys(("X", "Y", "G", "GX"), "*bf16"),
    **dict.fromkeys(("W", "PW", "COS", "SIN"), "*fp32"),
    **dict.fromkeys(("eps", "sign"), "fp32"),
}


def _shipped_norm(width: int) -> tuple[Shipped, ...]:
    types = {**_FLOATS, "N": "i32", "H": "i32", "K": "i32:16", "run": "i32:16"}
    tiles = {"other": _tile(width, "other")}
    return tuple(
        Shipped(
            f"{name}{' and rope' * bool(R)} K={width}", kernel, types,
            {"HAS_WEIGHT": True, "BK": power_of_two(width), "R": R}, tiles,
        )
        for R in ((0, 32) if width in (128, 512) else (0,))
        for name, kernel in (("norm", rms_norm_forward), ("norm backward", rms_norm_backward))
    )  # fmt: skip


def _shipped_rope(K: int, R: int) -> Shipped:
    types = {**_FLOATS, "N": "i32", "H": "i32"}
    constants = {"K": K, "R": R, "KP": power_of_two(max(K - 2 * R, 1)), "RP": power_of_two(R)}
    return Shipped(f"rope K={K}", rope_rotate, types, constants, {"other": _tile(K, "other")})


def _unweighted(line: Shipped) -> Shipped:
    """Of the queries."""
    held = {"sm_90": "ptxas keeps to 40 registers of its own accord"}
    return replace(
        line,
        name=f"{line.name} unweighted",
        constants={**line.constants, "HAS_WEIGHT": False},
        spills=held if line.name.startswith("norm backward and rope") else {},
    )


SHIPPED = (
    *(_unweighted(line) for line in _shipped_norm(128)),
    *(line for width in (128, 512, 1536, 4096, 7168) for line in _shipped_norm(width)),
    *(_shipped_rope(K, 32) for K in (64, 128, 512)),
)
