"""Interleaved partial RoPE with YaRN on the compressed layers (reference B.4).

A layer has one table, used for q, window KV, compressed entries, the indexer's q and k, and
(inverted) the output. Only the LAST ``2 * R`` channels are rotated, as pairs (0,1), (2,3), ...;
there is no attention factor.
"""

# Legend: B rows, T tokens, R rotation pairs, K channels
from __future__ import annotations

import math

import torch
from torch import Tensor

from model.config import ModelConfig, RopeScaling


def yarn_frequencies(dim: int, base: float, scaling: RopeScaling | None) -> Tensor:
    """Angular frequencies [dim / 2] in radians per token, float64.

    Args:
        dim: rotated channels.
        base: RoPE base.
        scaling: YaRN settings, or None for plain RoPE.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    frequencies = base**-exponents
    if scaling is None or scaling.factor == 1.0:
        return frequencies

    def correction(rotations: float) -> float:
        original = scaling.original_max_position_embeddings
        return dim * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(base))

    low = max(math.floor(correction(scaling.beta_fast)), 0)
    high = min(math.ceil(correction(scaling.beta_slow)), dim - 1)
    width = max(high - low, 0.001)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp)


def rope_frequencies(config: ModelConfig, compressed: bool, yarn: bool = True) -> Tensor:
    """Frequencies [R] of a window-only (``compressed=False``) or compressed layer."""
    dim = config.qk_rope_head_dim
    if not compressed:
        return yarn_frequencies(dim, config.rope_theta, None)
    return yarn_frequencies(dim, config.compress_rope_theta, config.rope_scaling if yarn else None)


def rope_tables(positions: Tensor, frequencies_R: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine [..., R] in fp32 of integer positions [...]; angles are formed in float64.

    At a million tokens an fp32 angle would be off by 0.03 radians.
    """
    angles = positions.to(torch.float64)[..., None] * frequencies_R.to(
        positions.device, non_blocking=True
    )
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last 2R channels of ``x [..., K]`` as interleaved pairs; fp32 inside.

    Args:
        x: [B, T, K], or [B, T, H, K] with heads.
        cos: [B, T, R].
        sin: [B, T, R]; negate it for the inverse rotation.
    """
    if x.dim() == cos.dim() + 1:
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    rope_dim = 2 * cos.shape[-1]
    plain, rotated = x[..., :-rope_dim], x[..., -rope_dim:].float()
    even, odd = rotated[..., 0::2], rotated[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((plain, turned.to(x.dtype)), dim=-1)
