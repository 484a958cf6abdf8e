"""The slow twin of ``quant/formats.py``: elements as tables, scales by search, block by block.

It shares no code with the fast path on purpose. Tests hold the two together, bit for bit; nothing
else should use it.
"""

# Legend: R rows, C columns, K magnitudes of an element type
from __future__ import annotations

import math
from bisect import bisect_left

import torch
from torch import Tensor


def e2m1_magnitudes() -> list[float]:
    """Values of the FP4 codes 0..7 from their bit fields: 2 exponent bits (bias 1), 1 mantissa."""
    return [_minifloat(code, exponent_bits=2, mantissa_bits=1, bias=1) for code in range(8)]


def e4m3_magnitudes() -> list[float]:
    """Values of the FP8 codes 0..126, from their bit fields; code 127 is NaN."""
    return [_minifloat(code, exponent_bits=4, mantissa_bits=3, bias=7) for code in range(127)]


def _minifloat(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    if exponent == 0:
        return math.ldexp(mantissa, 1 - bias)
    return math.ldexp(1 + mantissa, exponent - bias)


def scale_exponent(amax: float, largest: float, floor: float) -> int:
    """Smallest e with ``largest * 2 ** e >= max(amax, floor)``, found by trying."""
    exponent = -200
    while math.ldexp(largest, exponent) < max(amax, floor):
        exponent += 1
    return exponent


def nearest_code(magnitude: float, magnitudes: list[float]) -> int:
    """Index of the nearest entry of an ascending table; of two equally near the even index."""
    above = min(bisect_left(magnitudes, magnitude), len(magnitudes) - 1)
    below = max(above - 1, 0)
    to_above, to_below = abs(magnitudes[above] - magnitude), abs(magnitude - magnitudes[below])
    if to_above == to_below:
        return above if above % 2 == 0 else below
    return above if to_above < to_below else below


def quantise_blocks(
    x_RC: Tensor, magnitudes: list[float], floor: float, rows: int, cols: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a matrix block by block.

    Args:
        x_RC: any floating dtype.
        magnitudes: element type, codes in order.
        floor: smallest largest magnitude that is taken for a block.
        rows: rows of a block.
        cols: columns of a block.

    Returns:
        Codes of the magnitudes int64 ``[R, C]`` (sign not included), scale bytes int64 ``[r, c]``,
        and the values that they stand for, float64 ``[R, C]``. A block with NaN or Inf: codes 0,
        byte 255, values NaN.
    """
    x = x_RC.detach().double()
    num_rows, num_cols = x.shape
    codes = torch.zeros(x.shape, dtype=torch.int64)
    scales = torch.zeros(-(-num_rows // rows), -(-num_cols // cols), dtype=torch.int64)
    values = torch.empty_like(x)
    for top in range(0, num_rows, rows):
        for left in range(0, num_cols, cols):
            block = x[top : top + rows, left : left + cols]
            out = values[top : top + rows, left : left + cols]
            if not torch.isfinite(block).all():
                scales[top // rows, left // cols] = 255
                out.fill_(torch.nan)
                continue
            exponent = scale_exponent(float(block.abs().max()), magnitudes[-1], floor)
            scales[top // rows, left // cols] = exponent + 127
            for i, row in enumerate(block.tolist()):
                for j, value in enumerate(row):
                    code = nearest_code(abs(math.ldexp(value, -exponent)), magnitudes)
                    codes[top + i, left + j] = code
                    out[i, j] = math.copysign(math.ldexp(magnitudes[code], exponent), value)
    return codes, scales, values
