"""FP4 weights seen as FP8 without loss, so that an FP8 matmul can run on them (paper 5.2.1).

E4M3 has two more exponent bits than E2M1, enough to absorb the differences between the scales of
the 1x32 groups in a 128x128 block, up to a ratio of 2**14 (reference C.7). Beyond it the smallest
elements would be lost, which :func:`fp4_to_fp8` refuses to do.
"""

# Legend: R rows, C columns
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.errors import ConfigError
from quant.formats import (
    FP8_WEIGHT,
    MXFP4,
    NAN_BYTE,
    Quantised,
    fp4_value,
    scale_value,
    unpack_fp4,
)

LOSSLESS_LOG2 = 14  # largest log2(max / min group scale) of a 128x128 block that stays exact
_FLOOR_BYTE = 1  # scale byte of an MXFP4 group of zeros


def fp4_to_fp8(q: Quantised) -> Quantised:
    """The same values as FP8 with 128x128 blocks: block scale = largest group scale / 2**6.

    Groups of zeros do not count; a group whose scale is NaN gets NaN elements.

    Args:
        q: MXFP4, ``[..., R, C / 2]`` codes.

    Raises:
        ValueError: group scales in one block spread beyond 2**14, where the smallest element is
            lost.
    """
    codes = unpack_fp4(q.codes)
    group_bytes = q.scale.view(torch.uint8)
    empty = _group_is_empty(codes)
    spread = scale_spread(group_bytes, empty)
    if (worst := int(spread.max())) > LOSSLESS_LOG2:
        raise ConfigError(
            f"FP4 -> FP8 is not exact: group scales of a 128x128 block differ by 2**{worst}, the"
            f" bound is 2**{LOSSLESS_LOG2}"
            f" ({int((spread > LOSSLESS_LOG2).sum())} of {spread.numel()} blocks are beyond)"
        )
    _, high = _block_extremes(group_bytes, empty)
    block_bytes = (high - 6).clamp_(min=0)
    factor_byte = group_bytes.int() - _spread_to(block_bytes, group_bytes.shape) + 127
    # Groups of zeros may stand anywhere: their factor only has to be finite.
    factor_byte = torch.where(group_bytes == NAN_BYTE, NAN_BYTE, factor_byte.clamp_(0, 127 + 6))
    factor = scale_value(factor_byte.to(torch.uint8))
    columns = factor.repeat_interleave(MXFP4.cols, dim=-1)[..., : codes.shape[-1]]
    elements = fp4_value(codes) * columns
    return Quantised(
        elements.to(torch.float8_e4m3fn), block_bytes.to(torch.uint8).view(torch.float8_e8m0fnu)
    )


def scale_spread(group_bytes: Tensor, empty: Tensor | None = None) -> Tensor:
    """log2 of the largest over the smallest FP4 group scale in each 128x128 block.

    Args:
        group_bytes: uint8 ``[..., R, C / 32]``.
        empty: groups that hold zeros only; without it, groups at the floor count as empty.

    Returns:
        int32 ``[..., ceil(R / 128), ceil(C / 128)]``; 0 for a block with no group that counts.
    """
    low, high = _block_extremes(group_bytes, group_bytes <= _FLOOR_BYTE if empty is None else empty)
    return (high - low).clamp_(min=0)


def _block_extremes(group_bytes: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest scale byte of each 128x128 block, int32; (255, 0): no group counts."""
    skip = empty | (group_bytes == NAN_BYTE)
    byte = group_bytes.int()
    groups = FP8_WEIGHT.cols // MXFP4.cols
    rows, cols = group_bytes.shape[-2:]
    pad = (0, -cols % groups, 0, -rows % FP8_WEIGHT.rows)

    def tiles(t: Tensor, value: int) -> Tensor:
        padded = F.pad(t, pad, value=value)
        return padded.unflatten(-1, (-1, groups)).unflatten(-3, (-1, FP8_WEIGHT.rows))

    low = tiles(byte.masked_fill(skip, NAN_BYTE), NAN_BYTE).amin((-3, -1))
    high = tiles(byte.masked_fill(skip, 0), 0).amax((-3, -1))
    return low, high


def _group_is_empty(codes: Tensor) -> Tensor:
    magnitude = codes & 0x7
    padded = F.pad(magnitude, (0, -codes.shape[-1] % MXFP4.cols))
    return padded.unflatten(-1, (-1, MXFP4.cols)).amax(-1) == 0


def _spread_to(block: Tensor, group_shape: torch.Size) -> Tensor:
    """Repeat a value per 128x128 block to every FP4 group in it."""
    rows, cols = group_shape[-2:]
    full = block.repeat_interleave(FP8_WEIGHT.rows, -2)
    return full.repeat_interleave(FP8_WEIGHT.cols // MXFP4.cols, -1)[..., :rows, :cols]
