"""Symmetric products in Triton: half of the tiles, each written twice (``../symmetric.py``).

Tiles above the diagonal are stored as they are and transposed below it, those on it take their
lower half from the upper one, so results are symmetric to the bit; programs below it end at once.
The right factor is never read: it is the left, transposed.
"""
# pyright: reportGeneralTypeIssues=false

# Legend: N matrices, M rows, K contracted
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.triton.grouped import product_step
from model.kernels.triton.launch import (
    INTERPRETER,
    OPS,
    Shipped,
    Tile,
    Tiles,
    architecture_of,
    blocks,
    define,
    launch,
    tile_of,
    upcast,
)


def _tile(rows: int, contracted: int, precision: str, warps: int, stages: int) -> Tile:
    sizes = {"BM": rows, "BK": contracted, "PRECISION": precision}
    options = {"matrix_instr_nonkdim": 16} if precision == "bf16x6" else {}
    return Tile(sizes, warps, stages, options)


# Two-byte operands; the choice is by what compiles, fits and does not spill (``triton_aot``).
_TILES: Tiles = {
    INTERPRETER: _tile(16, 32, "ieee", 4, 2),
    "sm_90": _tile(128, 64, "tf32x3", 8, 3),
    "sm_100": _tile(128, 64, "tf32x3", 8, 3),
    "gfx942": _tile(128, 64, "bf16x6", 8, 2),
    "other": _tile(128, 32, "tf32x3", 8, 3),
}
# fp32 operands, by tensor cores in parts, which keeps fp32's accuracy.
_TILES_FP32: Tiles = {
    INTERPRETER: _TILES[INTERPRETER],
    "gfx942": _tile(64, 32, "bf16x6", 4, 2),
    "other": _tile(64, 32, "tf32x3", 4, 2),
}


@triton.jit
def symmetric_tiles(
    X, PLUS, OUT, M, K, beta, alpha, TURNED: tl.constexpr, UPCAST: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``beta plus + alpha x x^T``; x [M, K], TURNED: stored [K, M]. Grid (rows, columns, N)."""
    if tl.program_id(0) <= tl.program_id(1):
        n = tl.program_id(2).to(tl.int64)
        X += n * M * K
        OUT += n * M * M
        r = tl.program_id(0) * BM + tl.arange(0, BM)
        c = tl.program_id(1) * BM + tl.arange(0, BM)
        acc = tl.zeros([BM, BM], tl.float32)
        for first in tl.range(0, K, BK):
            k = first + tl.arange(0, BK)
            r_at = r[:, None] + k[None, :] * M if TURNED else r[:, None] * K + k[None, :]
            c_at = c[None, :] + k[:, None] * M if TURNED else c[None, :] * K + k[:, None]
            rows = tl.load(X + r_at, mask=(r < M)[:, None] & (k < K)[None, :], other=0.0)
            cols = tl.load(X + c_at, mask=(c < M)[None, :] & (k < K)[:, None], other=0.0)
            acc = product_step(rows, cols, acc, UPCAST, PRECISION)
        inside = (r < M)[:, None] & (c < M)[None, :]
        out = acc * alpha
        if PLUS is not None:
            plus = tl.load(PLUS + n * M * M + r[:, None] * M + c[None, :], mask=inside, other=0.0)
            out += beta * plus.to(tl.float32)
        out = out.to(OUT.dtype.element_ty)
        if tl.program_id(0) == tl.program_id(1):  # a dot need not sum (r, c) and (c, r) alike
            out = tl.where(r[:, None] > c[None, :], tl.trans(out), out)
        tl.store(OUT + r[:, None] * M + c[None, :], out, mask=inside)
        if tl.program_id(0) < tl.program_id(1):
            below = (c < M)[:, None] & (r < M)[None, :]
            tl.store(OUT + c[:, None] * M + r[None, :], tl.trans(out), mask=below)


def _product(
    x: Tensor, out: Tensor, plus: Tensor | None, beta: float, alpha: float, turned: bool
) -> None:
    N, first, second = x.shape
    M, K = (second, first) if turned else (first, second)
    tile = tile_of(_TILES_FP32 if x.dtype == torch.float32 else _TILES, architecture_of(x.device))
    side = blocks(M, tile.sizes["BM"])
    launch(
        symmetric_tiles, (side, side, N), x, plus, out, M, K, beta, alpha, TURNED=turned,
        UPCAST=upcast(x), **tile.constants(),
    )  # fmt: skip


define(
    "triton_symmetric_product(Tensor x, Tensor(a!) out, Tensor? plus, float beta, float alpha,"
    " bool turned) -> ()",
    _product,
)


def symmetric_product(
    left_NMK: Tensor,
    right_NKM: Tensor,
    out_NMM: Tensor,
    plus_NMM: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> None:
    """:func:`model.kernels.symmetric.symmetric_product` in Triton: same arguments and result."""
    turned = not left_NMK.is_contiguous()
    x = left_NMK.mT if turned else left_NMK
    assert x.is_contiguous()
    assert out_NMM.is_contiguous()
    plus = None if plus_NMM is None else plus_NMM.contiguous()
    OPS.triton_symmetric_product(x, out_NMM, plus, beta, alpha, turned)


def _shipped(kind: str, tiles: Tiles) -> tuple[Shipped, ...]:
    types = {
        **dict.fromkeys(("X", "PLUS", "OUT"), f"*{kind}"), **dict.fromkeys(("M", "K"), "i32:16"),
        "beta": "fp32", "alpha": "fp32",
    }  # fmt: skip
    compiled = {place: tile for place, tile in tiles.items() if place != INTERPRETER}
    return tuple(
        Shipped(f"{name} {kind}", symmetric_tiles, {**types}, constants, compiled)
        for name, constants in (
            ("x x^T", {"TURNED": False, "PLUS": None}),
            ("x^T x", {"TURNED": True, "PLUS": None}),
            ("b g + c g g", {"TURNED": False}),
        )
        for constants in [{**constants, "UPCAST": False}]
    )


SHIPPED = (*_shipped("bf16", _TILES), *_shipped("fp32", _TILES_FP32))
