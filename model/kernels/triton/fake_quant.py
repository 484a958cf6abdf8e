"""Rounding to MXFP4 and FP8 blocks in Triton, bit for bit that of ``quant/formats.py``.

One read and one write of the tensor. Magnitudes are compared as integers, where NaN lies above
infinity and infinity above all numbers; scales are made by bits, elements rounded by an addition.
Nothing is differentiated here: what stands for a gradient is the caller's business
(``quant/fake_quant.py``).

Not fused with SwiGLU: its activations are rounded inside the op of the layer that reads them
(``Linear.op``), which takes them as they are.
"""

# Legend: R, C rows and columns of a block of numbers; L lead, M matrix rows, N matrix columns
from __future__ import annotations

import math
import struct
from typing import Protocol

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
    blocks,
    define,
    launch,
)

_ELEMENTS = {INTERPRETER: 32_768, "other": 4096}  # of a program, if a block does not have more
_WARPS = 8


class Format(Protocol):
    """What is read of a ``quant.formats.BlockFormat``."""

    @property
    def mantissa_bits(self) -> int:
        """Explicit mantissa bits of an element."""
        ...

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal element."""
        ...

    @property
    def largest(self) -> float:
        """Largest element."""
        ...

    @property
    def amax_floor(self) -> float:
        """Least magnitude that a block is taken to have."""
        ...

    @property
    def rows(self) -> int:
        """Rows of a block."""
        ...

    @property
    def cols(self) -> int:
        """Columns of a block."""
        ...


@triton.jit
def fake_quant_blocks(
    X, OUT, BYTES, total, across, down, M, N, floor, carry, exponent, smallest, magic,
    R: tl.constexpr, C: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Round BG blocks of R x C numbers. Grid (groups of blocks,).

    Blocks count along the columns first (``across`` of them), then down the rows of a matrix
    (``down``), then over the matrices. ``floor``: bits of the least magnitude; ``carry`` and
    ``exponent``: what makes a scale's exponent of a magnitude's bits, rounded up.
    """
    first = tl.program_id(0) * BG
    g = first + tl.arange(0, BG)
    e = tl.arange(0, R * C)
    row_block = g // across
    row = (row_block % down * R)[:, None] + (e // C)[None, :]
    col = (g % across * C)[:, None] + (e % C)[None, :]
    ok = (g < total)[:, None] & (row < M) & (col < N)
    start = first // across // down * M + first // across % down * R  # row of the first block
    at = ((row_block // down * M)[:, None] + row - start) * N + col
    X += start.to(tl.int64) * N
    OUT += start.to(tl.int64) * N

    x = tl.load(X + at, mask=ok, other=0.0).to(tl.float32)
    bits = x.to(tl.int32, bitcast=True)
    top = tl.max(bits & 0x7FFFFFFF, 1)
    bad = top >= 0x7F800000
    byte = ((tl.maximum(top, floor) + carry) >> 23) - exponent
    scale = (byte << 23).to(tl.float32, bitcast=True)[:, None]
    inverse = ((254 - byte) << 23).to(tl.float32, bitcast=True)[:, None]
    y = x * inverse
    binade = (y.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    step = tl.maximum(binade, smallest) * magic
    y = (y + step) - step
    sign = bits & -2147483648
    y = ((y.to(tl.int32, bitcast=True) & 0x7FFFFFFF) | sign).to(tl.float32, bitcast=True)
    y = tl.where(bad[:, None], float("nan"), y * scale)
    tl.store(OUT + at, y.to(OUT.dtype.element_ty), mask=ok)
    tl.store(BYTES + g, tl.where(bad, 255, byte).to(tl.uint8), mask=g < total)


def _numbers(mantissa_bits: int, min_exponent: int, largest: float, amax_floor: float) -> tuple:
    """The numbers of a format that the kernel takes; see ``quant.formats.scale_byte``."""
    fraction, exponent = math.frexp(largest)
    carry = 0x7FFFFF - int((2 * fraction - 1) * 2**23)
    (floor,) = struct.unpack("<i", struct.pack("<f", amax_floor))
    return floor, carry, exponent - 1, 2.0**min_exponent, 1.5 * 2.0 ** (23 - mantissa_bits)


def _fake_quant(
    x: Tensor, rows: int, cols: int, mantissa_bits: int, min_exponent: int, largest: float,
    amax_floor: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    L, M, N = x.shape
    down, across = blocks(M, rows), blocks(N, cols)
    out = torch.empty_like(x, dtype=dtype)
    scales = x.new_empty(L, down, across, dtype=torch.uint8)
    tile = _tile(rows * cols, architecture_of(x.device))
    total = L * down * across
    launch(
        fake_quant_blocks, (blocks(total, tile.sizes["BG"]),), x, out, scales, total, across,
        down, M, N, *_numbers(mantissa_bits, min_exponent, largest, amax_floor), R=rows, C=cols,
        **tile.constants(),
    )  # fmt: skip
    return out, scales


def _tile(block: int, architecture: str) -> Tile:
    elements = _ELEMENTS.get(architecture, _ELEMENTS["other"])
    return Tile({"BG": max(1, elements // block)}, warps=_WARPS, stages=1)


define(
    "triton_fake_quant(Tensor x, int rows, int cols, int mantissa_bits, int min_exponent,"
    " float largest, float amax_floor, ScalarType dtype) -> (Tensor, Tensor)",
    _fake_quant,
)


def fake_quant(x: Tensor, fmt: Format, dtype: torch.dtype | None = None) -> Tensor:
    """``quant.formats.fake_quant`` in Triton: same arguments, result and errors."""
    return fake_quant_with_scales(x, fmt, dtype)[0]


def fake_quant_with_scales(
    x: Tensor, fmt: Format, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """``quant.formats.fake_quant_with_scales`` in Triton: same arguments, results and errors.

    Raises:
        ValueError: float64, or fewer dims than a block has.
    """
    if x.dtype == torch.float64:
        raise ValueError("blocks: float64 would be rounded twice; pass float32 or bfloat16")
    if x.dim() < (2 if fmt.rows > 1 else 1):
        raise ValueError(f"blocks of {fmt.rows} rows need a matrix, got shape {tuple(x.shape)}")
    *lead, last = x.shape
    height = lead.pop() if fmt.rows > 1 else math.prod(lead)
    many = math.prod(lead) if fmt.rows > 1 else 1
    out, scales = OPS.triton_fake_quant(
        x.contiguous().view(many, height, last), fmt.rows, fmt.cols, fmt.mantissa_bits,
        fmt.min_exponent, fmt.largest, fmt.amax_floor, dtype or x.dtype,
    )  # fmt: skip
    shape = [*x.shape[:-1], blocks(last, fmt.cols)]
    if fmt.rows > 1:
        shape[-2] = blocks(height, fmt.rows)
    return out.view(x.shape), scales.view(shape)


def _shipped(name: str, rows: int, cols: int) -> Shipped:
    types = {"X": "*fp32", "OUT": "*bf16", "BYTES": "*u8", "N": "i32:16", "M": "i32:16"}
    types |= dict.fromkeys(("total", "across", "down", "floor", "carry", "exponent"), "i32")
    types |= dict.fromkeys(("smallest", "magic"), "fp32")
    tiles = {"other": _tile(rows * cols, "other")}
    return Shipped(name, fake_quant_blocks, types, {"R": rows, "C": cols}, tiles)


SHIPPED = (
    _shipped("MXFP4 1x32", 1, 32),
    _shipped("FP8 1x64", 1, 64),
    _shipped("FP8 1x128", 1, 128),
    _shipped("FP8 128x1", 128, 1),
    _shipped("FP8 128x128", 128, 128),
)
