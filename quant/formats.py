"""The number formats of DeepSeek-V4: MXFP4 and FP8 E4M3 blocks with UE8M0 scales.

reference C.6, paper section 5.2.1.

A block of numbers shares one power-of-two scale ``2 ** (byte - 127)``: the smallest power of two
with which the largest magnitude of the block still fits the element type (the ceil rule), so
nothing ever saturates. Elements round to nearest, ties to even. Everything here is exact arithmetic
on float bits: no ``log2``, no reciprocal of 6 or 448, so that a maximum that lies on an edge gets
the right scale on every machine.

What is defined beyond the paper:

* A block that holds NaN or Inf gets the scale byte 255 (NaN): all of it dequantises to NaN, and the
  step is seen to be non-finite. Such a block is never repaired in silence.
* A shape that is no multiple of the block has shorter blocks at its ends (as if padded with zeros).
* Zeros keep their sign; a block of zeros gets the scale of the floor.
* float64 is refused: rounding it to float32 first would round twice.

``tests/quant/reference.py`` holds the slow table-driven twin. This file does not train anything:
gradients are in ``quant/fake_quant.py``.
"""

# Legend: N rows (leading dims flattened), R rows of one matrix, C columns (the contraction dim,
# last), r, c blocks along R and C
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NAN_BYTE = 255  # UE8M0 has no infinity and one NaN
_FLOAT_EXPONENT = 0x7F800000
_FLOAT_MANTISSA = 0x007FFFFF
# Elements worked on at once on a CPU: all passes over a chunk of this size stay in its cache.
_CHUNK = 256 * 1024
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class BlockFormat:
    """An element type, and the block that shares one scale.

    Attributes:
        name: as it stands in reports.
        mantissa_bits: explicit mantissa bits of an element.
        min_exponent: exponent of the smallest normal element; below it the spacing is constant.
        largest: largest element.
        amax_floor: a block's largest magnitude is taken to be at least this.
        rows, cols: shape of a block; ``rows`` 1 means that each row is on its own.
    """

    name: str
    mantissa_bits: int
    min_exponent: int
    largest: float
    amax_floor: float
    rows: int
    cols: int

    @property
    def packed(self) -> bool:
        """Whether two elements share a byte."""
        return self.mantissa_bits == 1

    def scale_shape(self, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a tensor of ``shape``."""
        *lead, last = shape
        if self.rows > 1:
            lead[-1] = -(-lead[-1] // self.rows)
        return (*lead, -(-last // self.cols))


MXFP4 = BlockFormat("mxfp4_1x32", 1, 0, 6.0, 6 * 2.0**-126, 1, 32)
FP8_WEIGHT = BlockFormat("fp8_e4m3_128x128", 3, -6, 448.0, 1e-4, 128, 128)
FP8_ACTIVATION = BlockFormat("fp8_e4m3_1x128", 3, -6, 448.0, 1e-4, 1, 128)
FP8_COLUMN = BlockFormat("fp8_e4m3_128x1", 3, -6, 448.0, 1e-4, 128, 1)  # operands of wgrad
FP8_KV = BlockFormat("fp8_e4m3_1x64", 3, -6, 448.0, 1e-4, 1, 64)


class Quantised(NamedTuple):
    """A quantised tensor as it is stored.

    Attributes:
        codes: float8_e4m3fn ``[..., C]``, or int8 ``[..., C / 2]`` with two FP4 codes (low nibble =
            even column).
        scale: float8_e8m0fnu, shape ``format.scale_shape``.
    """

    codes: Tensor
    scale: Tensor


def fake_quant(x: Tensor, fmt: BlockFormat, dtype: torch.dtype | None = None) -> Tensor:
    """Round ``x [..., C]`` to the values that ``fmt`` can store; same shape, contiguous.

    Args:
        x: float32, bfloat16 or float16.
        fmt: element type and block.
        dtype: of the result; float32 and bfloat16 hold it exactly. None: that of ``x``.

    Raises:
        ValueError: float64, or fewer dims than a block has.
    """
    return fake_quant_with_scales(x, fmt, dtype)[0]


def fake_quant_with_scales(
    x: Tensor, fmt: BlockFormat, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`fake_quant`, and the scale bytes as uint8, shape ``fmt.scale_shape(x.shape)``."""
    x_NC, rows = _as_rows(x, fmt)
    out_NC, bytes_nc = torch.empty_like(x_NC, dtype=dtype), _empty_scales(x_NC, fmt)
    for at, tiles, scale in _scaled(x_NC, fmt, bytes_nc):
        values = _round_to_elements_(tiles * scale.reciprocal(), tiles, fmt).mul_(scale)
        out_NC[at] = _untile(values, x_NC.shape[1])
    return _restore(out_NC, x.shape, rows), bytes_nc.view(fmt.scale_shape(x.shape))


def quantise(x: Tensor, fmt: BlockFormat) -> Quantised:
    """Store ``x [..., C]`` in ``fmt``; ``dequantise`` of it equals :func:`fake_quant` bit for bit.

    Raises:
        ValueError: as :func:`fake_quant`, or an odd ``C`` where two elements share a byte.
    """
    if fmt.packed and x.shape[-1] % 2:
        raise ValueError(
            f"{fmt.name} packs two columns a byte: shape {tuple(x.shape)} has an odd last dim"
        )
    x_NC, rows = _as_rows(x, fmt)
    code_dtype = torch.uint8 if fmt.packed else torch.float8_e4m3fn
    codes_NC, bytes_nc = torch.empty_like(x_NC, dtype=code_dtype), _empty_scales(x_NC, fmt)
    for at, tiles, scale in _scaled(x_NC, fmt, bytes_nc):
        scaled = tiles * scale.reciprocal()
        # torch's own FP8 cast rounds as _round_to_elements_ does, and never has to saturate here.
        elements = fp4_code(_round_to_elements_(scaled, tiles, fmt)) if fmt.packed else scaled
        codes_NC[at] = _untile(elements.to(code_dtype), x_NC.shape[1])
    codes = _restore(codes_NC, x.shape, rows)
    scale = bytes_nc.view(fmt.scale_shape(x.shape)).view(torch.float8_e8m0fnu)
    return Quantised(pack_fp4(codes) if fmt.packed else codes, scale)


def dequantise(q: Quantised, fmt: BlockFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of a stored tensor; exact in float32 and bfloat16 wherever those reach.

    Raises:
        ValueError: the scale's shape is not that of the codes.
    """
    elements = fp4_value(unpack_fp4(q.codes)) if fmt.packed else q.codes.float()
    expected = fmt.scale_shape(elements.shape)
    if tuple(q.scale.shape) != expected:
        raise ValueError(
            f"scale of shape {tuple(q.scale.shape)} does not belong to {fmt.name} codes of shape"
            f" {tuple(q.codes.shape)}, which need {expected}"
        )
    x_NC, rows = _as_rows(elements, fmt)
    scale_nc = scale_value(q.scale.view(torch.uint8)).reshape(-1, expected[-1])
    values_NC = _untile(_tiles(x_NC, fmt) * _broadcast(scale_nc), x_NC.shape[1])
    return _restore(values_NC, elements.shape, rows).to(dtype)


def scale_byte(amax: Tensor, fmt: BlockFormat) -> Tensor:
    """UE8M0 byte of ``2 ** ceil(log2(max(amax, floor) / largest))``, exactly.

    It is 255 (NaN) where ``amax`` is not finite.

    Args:
        amax: float32, not negative.
        fmt: gives the floor and the largest element.
    """
    fraction, exponent = math.frexp(
        fmt.largest
    )  # fraction in [.5, 1): largest = (2 * fraction) * 2 ** (exponent - 1)
    mantissa = int((2 * fraction - 1) * 2**23)
    # A mantissa above that of `largest` carries into the exponent: that is the ceil.
    bits = amax.clamp_min(fmt.amax_floor).view(torch.int32)
    byte = ((bits + (_FLOAT_MANTISSA - mantissa)) >> 23) - (exponent - 1)
    return torch.where(torch.isfinite(amax), byte, NAN_BYTE).to(torch.uint8)


def scale_value(byte: Tensor) -> Tensor:
    """Value of UE8M0 bytes (uint8), float32."""
    return byte.view(torch.float8_e8m0fnu).float()


def _round_to_elements_(y: Tensor, sign: Tensor, fmt: BlockFormat) -> Tensor:
    """Round float32 ``y`` (at most ``largest``) in place to elements, ties to even.

    Zeros take their sign from ``sign``, which is ``y`` before scaling.

    Adding and taking off 1.5 * 2**k, k chosen so that one unit in the last place of the sum is the
    spacing of the elements around ``y``, leaves the rounding to the adder.
    """
    magic = 1.5 * 2.0 ** (23 - fmt.mantissa_bits)
    binade = y.view(torch.int32).bitwise_and(_FLOAT_EXPONENT).view(torch.float32)
    binade.clamp_(min=2.0**fmt.min_exponent)
    return y.add_(binade, alpha=magic).sub_(binade, alpha=magic).copysign_(sign)


def fp4_code(elements: Tensor) -> Tensor:
    """Codes (uint8, bit 3 the sign) of E2M1 elements, float32; any code for NaN."""
    bits = elements.view(torch.int32)
    # Exponent and first mantissa bit, counted from 1.0 = code 2: .5 gives 0 and 0 much less.
    code = (bits & 0x7FFFFFFF).bitwise_right_shift_(22).sub_(252)
    half = code == 0
    return code.clamp_(0, 7).add_(half).bitwise_or_((bits >> 28) & 8).to(torch.uint8)


def fp4_value(codes: Tensor) -> Tensor:
    """float32 values of FP4 codes (uint8, 0..15)."""
    signed = [*_FP4_VALUES, *(-value for value in _FP4_VALUES)]
    return torch.tensor(signed, device=codes.device)[codes.to(torch.int32)]


def pack_fp4(codes: Tensor) -> Tensor:
    """Uint8 codes ``[..., C]`` as int8 ``[..., C / 2]``, the even column in the low nibble."""
    return (codes[..., 0::2] | codes[..., 1::2] << 4).view(torch.int8)


def unpack_fp4(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_fp4`."""
    byte = packed.view(torch.uint8)
    return torch.stack([byte & 0xF, byte >> 4], dim=-1).flatten(-2)


def _as_rows(x: Tensor, fmt: BlockFormat) -> tuple[Tensor, int]:
    """``x`` as a matrix, rows padded to a multiple of the block; and the padded R."""
    if x.dtype == torch.float64:
        raise ValueError(f"{fmt.name}: float64 would be rounded twice; pass float32 or bfloat16")
    if x.dim() < (2 if fmt.rows > 1 else 1):
        raise ValueError(f"{fmt.name} needs a matrix, got shape {tuple(x.shape)}")
    if fmt.rows == 1:
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), 1
    rows = x.shape[-2] + -x.shape[-2] % fmt.rows
    if rows != x.shape[-2]:
        x = F.pad(x, (0, 0, 0, rows - x.shape[-2]))
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), rows


def _restore(out_NC: Tensor, shape: torch.Size, rows: int) -> Tensor:
    if rows == 1 or rows == shape[-2]:
        return out_NC.view(shape)
    return out_NC.view(*shape[:-2], rows, shape[-1])[..., : shape[-2], :].contiguous()


def _chunks(x_NC: Tensor, fmt: BlockFormat) -> Iterator[slice]:
    """Row ranges that are worked on in turn: on a CPU what its cache holds, else all at once."""
    total, cols = x_NC.shape
    if cols == 0:
        return
    step = total
    if x_NC.device.type == "cpu":
        step = max(1, _CHUNK // max(1, cols * fmt.rows)) * fmt.rows
    for start in range(0, total, max(1, step)):
        yield slice(start, min(start + step, total))


def _empty_scales(x_NC: Tensor, fmt: BlockFormat) -> Tensor:
    """Room for the scale byte of every block."""
    blocks = x_NC.shape[0] // fmt.rows, -(-x_NC.shape[1] // fmt.cols)
    return x_NC.new_empty(blocks, dtype=torch.uint8)


def _scaled(
    x_NC: Tensor, fmt: BlockFormat, bytes_nc: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Row ranges, their tiles in fp32 and the scales of these, whose bytes are written."""
    for at in _chunks(x_NC, fmt):
        blocks = slice(at.start // fmt.rows, at.stop // fmt.rows)
        tiles = _tiles(x_NC[at].float(), fmt)
        bytes_nc[blocks] = scale_byte(_amax(tiles), fmt)
        yield at, tiles, _broadcast(scale_value(bytes_nc[blocks]))


def _tiles(x_NC: Tensor, fmt: BlockFormat) -> Tensor:
    """``[N, C]`` as ``[n, rows, c, cols]``, padded with zeros at the right."""
    x_NC = F.pad(x_NC, (0, -x_NC.shape[1] % fmt.cols)) if x_NC.shape[1] % fmt.cols else x_NC
    return x_NC.view(-1, fmt.rows, x_NC.shape[1] // fmt.cols, fmt.cols)


def _untile(tiles: Tensor, cols: int) -> Tensor:
    flat = tiles.reshape(tiles.shape[0] * tiles.shape[1], -1)
    return flat[:, :cols]


def _amax(tiles: Tensor) -> Tensor:
    largest = tiles.abs()
    largest = largest.squeeze(-1) if tiles.shape[-1] == 1 else largest.amax(-1)
    return largest.squeeze(1) if tiles.shape[1] == 1 else largest.amax(1)


def _broadcast(scale_nc: Tensor) -> Tensor:
    return scale_nc[:, None, :, None]
