"""The experts' matmuls in Triton, and the moves of rows to experts and back.

``grouped_linear`` is :func:`model.linear.grouped_linear_op` (reference B.9): counts of rows stay on
the device. The grid has a tile for every block of rows and one more for every expert, which is
enough whatever the counts are; each program finds its expert from the offsets, and those beyond
find none. The weight gradient walks through its expert's rows in order; an expert without rows
writes zeros. No atomics.

``send`` and ``collect`` are those of ``model/kernels/gather.py``: gathers in both directions.
"""
# pyright: reportGeneralTypeIssues=false

# Legend: N rows sorted by expert (of a move: its rows), T tokens, C channels, K experts per token,
# E experts (EP: rounded up), I in, O out
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    tile_of,
    upcast,
)
from model.linear import LinearOp

# Two-byte operands. BM, BN, BK: rows, columns and contracted channels of a product's block.
_TILES = {
    INTERPRETER: Tile({"BM": 16, "BN": 64, "BK": 32, "PRECISION": "ieee"}),
    "sm_90": Tile({"BM": 128, "BN": 256, "BK": 64, "PRECISION": "tf32x3"}, warps=8, stages=3),
    "sm_100": Tile({"BM": 128, "BN": 256, "BK": 64, "PRECISION": "tf32x3"}, warps=8, stages=3),
    "gfx942": Tile(
        {"BM": 128, "BN": 128, "BK": 64, "PRECISION": "bf16x6"}, warps=8, stages=2,
        options={"matrix_instr_nonkdim": 16},
    ),
    "other": Tile({"BM": 128, "BN": 128, "BK": 32, "PRECISION": "tf32x3"}, warps=8, stages=4),
}  # fmt: skip
# fp32 operands, by tensor cores in parts, which keeps fp32's accuracy.
_TILES_FP32 = {
    INTERPRETER: _TILES[INTERPRETER],
    "gfx942": Tile(
        {"BM": 64, "BN": 64, "BK": 32, "PRECISION": "bf16x6"}, warps=4, stages=2,
        options={"matrix_instr_nonkdim": 16},
    ),
    "other": Tile({"BM": 64, "BN": 64, "BK": 32, "PRECISION": "tf32x3"}, warps=4, stages=2),
}  # fmt: skip
_ELEMENTS = {INTERPRETER: 8192, "other": 2048}  # of a block of moved rows
_WIDEST = 1024  # channels of such a block


@triton.jit
def _expert_of(OFFSETS, tile, E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):
    """Expert, first row and end of its rows, of a tile of rows; first >= end: there is none."""
    e = tl.arange(0, EP)
    stop = tl.load(OFFSETS + e, mask=e < E, other=0)
    start = tl.load(OFFSETS + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = tl.where(e < E, (stop - start + BM - 1) // BM, 0)
    behind = tl.cumsum(tiles, 0)
    mine = (behind > tile) & (behind - tiles <= tile)
    row = tl.sum(tl.where(mine, start + (tile - (behind - tiles)) * BM, 0), 0)
    return tl.sum(tl.where(mine, e, 0), 0), row, tl.sum(tl.where(mine, stop, 0), 0)


@triton.jit
def product_step(a, b, acc, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """``acc + a b``, in fp32."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def grouped_product(
    X, W, OFFSETS, Y, I, O, E: tl.constexpr, EP: tl.constexpr, TURNED: tl.constexpr,
    UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``y = x w[e]^T``, w [E, O, I]; TURNED: ``y = x w[e]``, w [E, I, O]. Grid (of O, of rows)."""
    e, row, end = _expert_of(OFFSETS, tl.program_id(1), E, EP, BM)
    if row < end:
        r, o = tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
        r_ok = (row + r < end)[:, None]
        X += row.to(tl.int64) * I
        Y += row.to(tl.int64) * O
        W += e.to(tl.int64) * I * O
        acc = tl.zeros([BM, BN], tl.float32)
        for first in tl.range(0, I, BK):
            i = first + tl.arange(0, BK)
            x = tl.load(X + r[:, None] * I + i[None, :], mask=r_ok & (i < I)[None, :], other=0.0)
            w_at = i[:, None] * O + o[None, :] if TURNED else i[:, None] + o[None, :] * I
            w = tl.load(W + w_at, mask=(i < I)[:, None] & (o < O)[None, :], other=0.0)
            acc = product_step(x, w, acc, UPCAST, PRECISION)
        y = acc.to(Y.dtype.element_ty)
        tl.store(Y + r[:, None] * O + o[None, :], y, mask=r_ok & (o < O)[None, :])


@triton.jit
def grouped_weight_gradient(
    G, X, OFFSETS, GW, I, O, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``gw[e] = g^T x`` over the expert's rows, in order. Grid (blocks of I, of O, experts)."""
    e = tl.program_id(2)
    stop = tl.load(OFFSETS + e)
    start = tl.load(OFFSETS + e - 1, mask=e > 0, other=0)
    o, i = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    G += start.to(tl.int64) * O
    X += start.to(tl.int64) * I
    acc = tl.zeros([BM, BN], tl.float32)
    rows = tl.arange(0, BK)
    for first in tl.range(0, stop - start, BK):
        ok = (first + rows < stop - start)[:, None]
        g = tl.load(G + rows[:, None] * O + o[None, :], mask=ok & (o < O)[None, :], other=0.0)
        x = tl.load(X + rows[:, None] * I + i[None, :], mask=ok & (i < I)[None, :], other=0.0)
        acc = product_step(tl.trans(g), x, acc, UPCAST, PRECISION)
        G += BK * O  # an expert's rows may lie beyond what 32 bits count
        X += BK * I
    at = e.to(tl.int64) * O * I + o[:, None] * I + i[None, :]
    tl.store(GW + at, acc.to(GW.dtype.element_ty), mask=(o < O)[:, None] & (i < I)[None, :])


@triton.jit
def row_sums(
    X, INDEX, PLUS, Y, WEIGHT, PLACE, MOVED, N, C, K: tl.constexpr, BN: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """``y[n] = sum of x[index[n, k]] + plus[n]``, k in order. Grid (blocks of rows, of channels).

    Summed in fp32; PLUS may be None. Unless WEIGHT is None, ``moved[n, k] = weight[place[n, k]]``.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    ok = (n < N)[:, None] & (c < C)[None, :]
    total = tl.zeros([BN, BC], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(INDEX + n * K + k, mask=n < N, other=0).to(tl.int64)
        x = tl.load(X + row[:, None] * C + c[None, :], mask=ok, other=0.0)
        total += x.to(tl.float32)
    at = n.to(tl.int64)[:, None] * C + c[None, :]
    if PLUS is not None:
        total += tl.load(PLUS + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(Y + at, total.to(Y.dtype.element_ty), mask=ok)
    if WEIGHT is not None:
        if tl.program_id(1) == 0:
            for k in tl.static_range(K):
                place = tl.load(PLACE + n * K + k, mask=n < N, other=0)
                tl.store(MOVED + n * K + k, tl.load(WEIGHT + place, mask=n < N), mask=n < N)


def _tiles(dtype: torch.dtype) -> dict[str, Tile]:
    return _TILES_FP32 if dtype == torch.float32 else _TILES


def _product(x: Tensor, w: Tensor, offsets: Tensor, turned: bool) -> Tensor:
    N, E = x.shape[0], w.shape[0]
    I, O = w.shape[1:] if turned else (w.shape[2], w.shape[1])
    y = x.new_empty(N, O)
    tile = tile_of(_tiles(x.dtype), architecture_of(x.device))
    launch(
        grouped_product, (blocks(O, tile.sizes["BN"]), blocks(N, tile.sizes["BM"]) + E), x, w,
        offsets, y, I, O, E=E, EP=power_of_two(E), TURNED=turned, UPCAST=upcast(x),
        **tile.constants(),
    )  # fmt: skip
    return y


def _weight_gradient(grad: Tensor, x: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    E, O, I = offsets.shape[0], grad.shape[1], x.shape[1]
    out = x.new_empty(E, O, I, dtype=dtype)
    tile = tile_of(_tiles(x.dtype), architecture_of(x.device))
    launch(
        grouped_weight_gradient, (blocks(I, tile.sizes["BN"]), blocks(O, tile.sizes["BM"]), E),
        grad, x, offsets, out, I, O, UPCAST=upcast(x), **tile.constants(),
    )  # fmt: skip
    return out


def _move(
    x: Tensor, index: Tensor, plus: Tensor | None, weight: Tensor | None, place: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums of rows, and the weights moved along (none: empty)."""
    (N, K), C = index.shape, x.shape[1]
    y = x.new_empty(N, C, dtype=dtype)
    moved = x.new_empty(0 if weight is None else N * K, dtype=torch.float32)
    tile = _move_tile(C, architecture_of(x.device))
    grid = (blocks(N, tile.sizes["BN"]), blocks(C, tile.sizes["BC"]))
    launch(
        row_sums, grid, x, index, plus, y, weight, place, moved, N, C, K=K, **tile.constants()
    )  # fmt: skip
    return y, moved


def _row_sums(x: Tensor, index: Tensor, plus: Tensor | None, dtype: torch.dtype) -> Tensor:
    return _move(x, index, plus, None, None, dtype)[0]


def _send(x: Tensor, weight: Tensor, token: Tensor, copy: Tensor) -> tuple[Tensor, Tensor]:
    return _move(x, token[:, None], None, weight, copy, x.dtype)


def _send_backward(grad: Tensor, grad_weight: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    return _move(grad, place, None, grad_weight, place, grad.dtype)


def _move_tile(channels: int, architecture: str) -> Tile:
    width = min(power_of_two(max(channels, 1)), _WIDEST)
    elements = _ELEMENTS.get(architecture, _ELEMENTS["other"])
    return Tile({"BN": max(1, elements // width), "BC": width}, stages=1)


define("triton_grouped(Tensor x, Tensor w, Tensor offsets, bool turned) -> Tensor", _product)
define(
    "triton_grouped_weight_gradient(Tensor grad, Tensor x, Tensor offsets, ScalarType dtype)"
    " -> Tensor",
    _weight_gradient,
)
define(
    "triton_row_sums(Tensor x, Tensor index, Tensor? plus, ScalarType dtype) -> Tensor", _row_sums
)
define("triton_send(Tensor x, Tensor weight, Tensor token, Tensor copy) -> (Tensor, Tensor)", _send)
define(
    "triton_send_backward(Tensor grad, Tensor grad_weight, Tensor place) -> (Tensor, Tensor)",
    _send_backward,
)


class _GroupedLinear(torch.autograd.Function):
    """Keeps the weight as it came: a cast copy would outlive a layout that frees its gathers."""

    @staticmethod
    def forward(
        ctx: Any, x_NI: Tensor, w_EOI: Tensor, offsets_E: Tensor, copy_EOI: Tensor | None
    ) -> Tensor:
        read_EOI = w_EOI if copy_EOI is None else copy_EOI
        ctx.save_for_backward(x_NI, read_EOI, offsets_E)
        ctx.dtype = w_EOI.dtype
        return OPS.triton_grouped(x_NI, read_EOI.to(x_NI.dtype), offsets_E, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, w_EOI, offsets_E = ctx.saved_tensors
        grad_NO = grad_NO.contiguous()
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = OPS.triton_grouped(grad_NO, w_EOI.to(x_NI.dtype), offsets_E, True)
        if ctx.needs_input_grad[1]:
            grad_w = OPS.triton_grouped_weight_gradient(grad_NO, x_NI, offsets_E, ctx.dtype)
        return grad_x, grad_w, None, None


def grouped_linear(
    x_NI: Tensor, w_EOI: Tensor, offsets_E: Tensor, copy_EOI: Tensor | None = None
) -> Tensor:
    """:func:`model.linear.grouped_linear_op` in Triton: same arguments and result.

    The weight gradient is rounded once, to the dtype of ``w``, not to that of ``x`` before.
    """
    return _GroupedLinear.apply(
        x_NI.contiguous(), w_EOI.contiguous(), offsets_E.contiguous(), copy_EOI
    )


def _blocks(x: Tensor, w: Tensor, turned: bool) -> Tensor:
    """Rows [N, G, I] by the blocks [G, O, I], or by their transposes; one batched product."""
    w = w if turned else w.transpose(1, 2)
    y = x.new_empty(*x.shape[:2], w.shape[2])
    torch.bmm(x.transpose(0, 1), w, out=y.transpose(0, 1))
    return y


define("triton_blocks(Tensor x, Tensor w, bool turned) -> Tensor", _blocks)  # one op in traces


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NGI: Tensor, w_RI: Tensor, copy_RI: Tensor | None) -> Tensor:
        read_RI = w_RI if copy_RI is None else copy_RI
        w_GOI = read_RI.to(x_NGI.dtype).unflatten(0, (x_NGI.shape[1], -1))
        ctx.save_for_backward(x_NGI, w_GOI)
        ctx.dtype = w_RI.dtype
        return OPS.triton_blocks(x_NGI, w_GOI, False).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NR: Tensor) -> tuple[Tensor | None, ...]:
        x_NGI, w_GOI = ctx.saved_tensors
        grad_NGO = grad_NR.unflatten(1, (x_NGI.shape[1], -1))
        grad_GNO = grad_NGO.transpose(0, 1)
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = OPS.triton_blocks(grad_NGO, w_GOI, True)
        if ctx.needs_input_grad[1]:
            operands = grad_GNO.transpose(1, 2), x_NGI.transpose(0, 1)
            if ctx.dtype == x_NGI.dtype or x_NGI.device.type == "cpu":
                grad_w = torch.bmm(*operands).to(ctx.dtype).flatten(0, 1)
            else:
                grad_w = torch.bmm(*operands, out_dtype=ctx.dtype).flatten(0, 1)
        return grad_x, grad_w, None


def block_linear(
    op: LinearOp, x: Tensor, groups: int, w_RI: Tensor, copy_RI: Tensor | None = None
) -> Tensor:
    """:func:`model.linear.block_linear_loop` of the plain op as one product of all blocks.

    It is torch's own batched product; ``op`` is not called.
    """
    return _Blocks.apply(x.flatten(0, -3), w_RI, copy_RI).unflatten(0, x.shape[:-2])


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TC: Tensor, weight_TK: Tensor, token_N: Tensor, copy_N: Tensor, place_TK: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(place_TK)
        return OPS.triton_send(x_TC, weight_TK, token_N, copy_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NC: Tensor, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        (place_TK,) = ctx.saved_tensors
        grad_x, grad_weight = OPS.triton_send_backward(
            grad_NC.contiguous(), grad_N.contiguous(), place_TK
        )
        return grad_x, grad_weight.view(place_TK.shape), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_NC: Tensor, token_N: Tensor, place_TK: Tensor, plus_TC: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(token_N)
        ctx.dtypes = rows_NC.dtype, None if plus_TC is None else plus_TC.dtype
        return OPS.triton_row_sums(rows_NC, place_TK, plus_TC, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Tensor | None, ...]:
        (token_N,) = ctx.saved_tensors
        rows, plus = ctx.dtypes
        grad_NC = OPS.triton_row_sums(grad_TC.contiguous(), token_N[:, None], None, rows)
        return grad_NC, None, None, None if plus is None else grad_TC.to(plus), None


def send(
    x_TC: Tensor, weight_TK: Tensor, token_N: Tensor, copy_N: Tensor, place_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`model.kernels.gather.send` in Triton: same arguments and result; weights are fp32."""
    tensors = (x_TC, weight_TK, token_N, copy_N, place_TK)
    return _Send.apply(*(tensor.contiguous() for tensor in tensors))


def collect(
    rows_NC: Tensor,
    token_N: Tensor,
    place_TK: Tensor,
    plus_TC: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """:func:`model.kernels.gather.collect` in Triton: same arguments and result."""
    plus_TC = None if plus_TC is None else plus_TC.contiguous()
    return _Collect.apply(
        rows_NC.contiguous(), token_N.contiguous(), place_TK.contiguous(), plus_TC, dtype
    )


def _shipped(kind: str, tiles: dict[str, Tile]) -> tuple[Shipped, ...]:
    types = {**dict.fromkeys(("X", "W", "Y", "G"), kind), "GW": "*fp32", "OFFSETS": "*i32"}
    types |= {"I": "i32:16", "O": "i32:16"}
    name = kind.removeprefix("*")

    def line(of: str, kernel: Any, turned: bool = False) -> Shipped:
        constants = {"E": 256, "EP": 256, "UPCAST": False, "TURNED": turned}
        return Shipped(f"{of} {name}", kernel, types, constants, tiles)

    return (
        line("forward", grouped_product),
        line("input gradient", grouped_product, turned=True),
        line("weight gradient", grouped_weight_gradient),
    )


SHIPPED = (
    *_shipped("*bf16", _TILES),
    *_shipped("*fp32", _TILES_FP32),
    *(
        Shipped(
            f"row sums K={k}{name}", row_sums,
            {"X": "*bf16", "Y": "*bf16", "INDEX": "*i32", "N": "i32", "C": "i32:16", **types},
            {"K": k, **{x: None for x in ("PLUS", "WEIGHT", "PLACE", "MOVED") if x not in types}},
            {"other": _move_tile(4096, "other")},
            {"sm_80": "8 bytes, once a program"} if k == 6 and "WEIGHT" in types else {},
        )
        for k in (1, 6, 8)
        for name, types in (
            (" plus", {"PLUS": "*bf16"}),
            (" and weights", {"WEIGHT": "*fp32", "PLACE": "*i32", "MOVED": "*fp32"}),
        )
    ),
)  # fmt: skip
