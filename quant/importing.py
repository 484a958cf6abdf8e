"""Reads the released checkpoint's quantised layout back into values (V4_SPEC C.6, E.1).

It shares no code with the writer (``quant/export.py``, ``quant/formats.py``): element values come
from the bit fields, scales are plain powers of two, blocks are found by index. So the two can check
each other, and a released checkpoint is read by its published definition.
"""

# Legend: R rows, C columns, r, c scale blocks along them
from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from quant.errors import ConfigError

# What a nibble or a byte stands for, by the order of the codes.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_GROUP = 32  # columns that share a scale in FP4
_BLOCK = 128  # rows, and columns, that share a scale in FP8


def dequantise_official(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, Tensor]]:
    """Official tensors of a quantised checkpoint (FP4 or FP8 experts alike), scales taken in.

    A weight and its scale may come in any order and far apart; only what waits for its partner is
    held.

    Args:
        tensors: names and stored tensors.
        dtype: of quantised weights in the result; float32 and bfloat16 hold them exactly. Other
            tensors keep theirs.

    Yields:
        Official name and value.

    Raises:
        ValueError: a weight without a scale, a scale without a weight, or shapes that do not fit.
    """
    weights: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for name, tensor in tensors:
        stem, _, leaf = name.rpartition(".")
        if tensor.dtype == torch.float8_e8m0fnu and leaf == "scale":
            scales[stem] = tensor
        elif tensor.dtype in (torch.int8, torch.float8_e4m3fn) and leaf == "weight":
            weights[stem] = tensor
        else:
            yield name, tensor
            continue
        if stem in weights and stem in scales:
            value = _decode(stem, weights.pop(stem), scales.pop(stem))
            yield f"{stem}.weight", value.to(dtype)
    for stem in [*weights, *scales]:
        missing = "scale" if stem in weights else "weight"
        raise ConfigError(f"checkpoint: {stem}.{missing} is missing (its partner is there)")


def _decode(stem: str, codes: Tensor, scale: Tensor) -> Tensor:
    if codes.dtype == torch.int8:
        elements, rows, cols = _fp4_elements(codes), 1, _GROUP
    else:
        elements, rows, cols = _fp8_elements(codes), _BLOCK, _BLOCK
    R, C = elements.shape
    expected = (-(-R // rows), -(-C // cols))
    if tuple(scale.shape) != expected:
        raise ConfigError(
            f"checkpoint: {stem}.scale has shape {tuple(scale.shape)}, but {stem}.weight of"
            f" {R} x {C} values needs {expected}"
        )
    row_R = torch.arange(R, device=codes.device) // rows
    col_C = torch.arange(C, device=codes.device) // cols
    return elements * _powers(scale)[row_R][:, col_C]


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
