"""Reads the released checkpoint's quantised layout back into values (reference C.6, E.1).

It shares no code with the writer (``quant/export.py``, ``quant/formats.py``): element values come
from the bit fields, scales are plain powers of two, blocks are found by index. So the two can check
each other, and a released checkpoint is read by its published definition.
"""

# Legend: R rows, C columns, r, c scale blocks along them
from __future__ import annotations

import torch
from torch import Tensor

from quant.errors import ConfigError

# What a nibble or a byte stands for, by the order of the codes.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_GROUP = 32  # columns that share a scale in FP4
_BLOCK = 128  # rows, and columns, that share a scale in FP8
_CODES, _SCALES = (torch.int8, torch.float8_e4m3fn), (torch.float8_e8m0fnu,)


def decode(stem: str, codes: Tensor, scale: Tensor) -> Tensor:
    """Values [R, C] in fp32 of a stored weight.

    Args:
        stem: name of the weight without its last part, for messages.
        codes: int8 (two FP4 codes) [R, C / 2], or float8_e4m3fn [R, C].
        scale: float8_e8m0fnu, see :func:`scale_shape`.

    Raises:
        ConfigError: other dtypes, or shapes that do not fit.
    """
    packed = codes.dtype == torch.int8
    for leaf, tensor, known in (("weight", codes, _CODES), ("scale", scale, _SCALES)):
        if tensor.dtype not in known:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in known)
            raise ConfigError(f"checkpoint: {stem}.{leaf} has dtype {tensor.dtype}, not {names}")
    elements = _fp4_elements(codes) if packed else _fp8_elements(codes)
    R, C = elements.shape
    expected = scale_shape(R, C, packed)
    if tuple(scale.shape) != expected:
        raise ConfigError(
            f"checkpoint: {stem}.scale has shape {tuple(scale.shape)}, but {stem}.weight of"
            f" {R} x {C} values needs {expected}"
        )
    rows, cols = (1, _GROUP) if packed else (_BLOCK, _BLOCK)
    row_R = torch.arange(R, device=codes.device) // rows
    col_C = torch.arange(C, device=codes.device) // cols
    return elements * _powers(scale)[row_R][:, col_C]


def scale_shape(rows: int, cols: int, packed: bool) -> tuple[int, int]:
    """Shape of the scales of a weight of ``rows`` x ``cols`` values; ``packed``: in FP4."""
    return (rows, -(-cols // _GROUP)) if packed else (-(-rows // _BLOCK), -(-cols // _BLOCK))


def _fp4_elements(packed: Tensor) -> Tensor:
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=packed.device)
    byte = packed.to(torch.int64) % 256  # int8 is signed
    pairs = torch.stack((table[byte % 16], table[byte // 16]), dim=-1)
    return pairs.reshape(packed.shape[0], 2 * packed.shape[1])


def _fp8_elements(codes: Tensor) -> Tensor:
    """Values from sign, 4 exponent bits (bias 7) and 3 mantissa bits; 0x7F and 0xFF are NaN."""
    code = torch.arange(256, device=codes.device)
    exponent, mantissa = code // 8 % 16, (code % 8).double() / 8
    magnitude = torch.where(
        exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7).double()
    )
    magnitude[code % 128 == 127] = torch.nan
    table = torch.where(code < 128, magnitude, -magnitude).float()
    return table[codes.view(torch.uint8).to(torch.int64)]


def _powers(scale: Tensor) -> Tensor:
    byte = scale.view(torch.uint8)
    # In float64, where the smallest, 2**-127, is no subnormal.
    power = 2.0 ** (byte.double() - 127)
    return torch.where(byte == 255, torch.nan, power).float()
