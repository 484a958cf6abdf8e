"""FP4 weights seen as FP8 without loss, so that an FP8 matmul can run on them (paper 5.2.1).

E4M3 has two more exponent bits than E2M1, enough to absorb the differences between the scales of
the 1x32 groups in a 128x128 block, up to a ratio of 2**14 (reference C.7). Beyond it the smallest
elements would be lost.
"""

# Legend: R rows, C columns
from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from quant.formats import FP8_WEIGHT, MXFP4, NAN_BYTE

LOSSLESS_LOG2 = 14  # largest log2(max / min group scale) of a 128x128 block that stays exact
_FLOOR_BYTE = 1  # scale byte of an MXFP4 group of zeros


def scale_spread(group_bytes: Tensor) -> Tensor:
    """log2 of the largest over the smallest FP4 group scale in each 128x128 block.

    Args:
        group_bytes: uint8 ``[..., R, C / 32]``; groups at the floor count as empty.

    Returns:
        int32 ``[..., ceil(R / 128), ceil(C / 128)]``; 0 for a block with no group that counts.
    """
    skip = (group_bytes <= _FLOOR_BYTE) | (group_bytes == NAN_BYTE)
    byte = group_bytes.int()
    groups = FP8_WEIGHT.cols // MXFP4.cols
    rows, cols = group_bytes.shape[-2:]
    pad = (0, -cols % groups, 0, -rows % FP8_WEIGHT.rows)

    def tiles(t: Tensor, value: int) -> Tensor:
        padded = F.pad(t, pad, value=value)
        return padded.unflatten(-1, (-1, groups)).unflatten(-3, (-1, FP8_WEIGHT.rows))

    low = tiles(byte.masked_fill(skip, NAN_BYTE), NAN_BYTE).amin((-3, -1))
    high = tiles(byte.masked_fill(skip, 0), 0).amax((-3, -1))
    return (high - low).clamp_(min=0)
