"""FP8 weights as Transformer Engine's block-scaled tensors hold them, rounded from the master.

The bytes and scales are those of ``quant/formats.py``, which the export stores: what is multiplied
on tensor cores and what is exported are the same numbers. Both orientations are laid out here (the
forward pass reads rows, dgrad reads columns), since a block of 128x128 has one scale in either.
"""

# Legend: M matrices (1, the groups of a block linear, or experts), O out, I in; o, i blocks of 128
from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quant.formats import FP8_WEIGHT, MXFP4, BlockFormat, fake_quant, quantise, scale_value

_SCALES = 4  # Transformer Engine pads the last dim of a scale tensor to a multiple of this
# FP4 groups may be smaller than the floor of FP8_WEIGHT: without one their values stay exact.
_NO_FLOOR = replace(FP8_WEIGHT, amax_floor=FP8_WEIGHT.largest * 2.0**-126)


class Fp8Matrices(NamedTuple):
    """M matrices [O, I] in E4M3 with one power-of-two scale a block of 128x128.

    Attributes:
        rows: uint8 [M, O, I], the codes.
        row_scales: float32 [M, o, i], what a code is multiplied by; i padded to a multiple of 4.
        columns: uint8 [M, I, O], the codes transposed.
        column_scales: float32 [M, i, o]; o padded to a multiple of 4.
    """

    rows: Tensor
    row_scales: Tensor
    columns: Tensor
    column_scales: Tensor


@torch.no_grad()
def fp8_matrices(master_MOI: Tensor, fmt: BlockFormat) -> Fp8Matrices:
    """Round fp32 masters once, straight to FP8.

    Args:
        master_MOI: float32 [M, O, I].
        fmt: FP8_WEIGHT; or MXFP4, whose values FP8 holds without loss (``quant/lossless.py``).
    """
    if fmt is MXFP4:
        master_MOI = fake_quant(master_MOI, MXFP4, torch.float32)
    q = quantise(master_MOI, _NO_FLOOR if fmt is MXFP4 else FP8_WEIGHT)
    codes = q.codes.view(torch.uint8)
    scales = scale_value(q.scale.view(torch.uint8))
    return Fp8Matrices(
        codes, _padded(scales), codes.transpose(1, 2).contiguous(), _padded(scales.transpose(1, 2))
    )


def _padded(scales: Tensor) -> Tensor:
    return F.pad(scales, (0, -scales.shape[-1] % _SCALES)).contiguous()
