"""Rows of a KV cache in the released formats (reference B.7, C.6, F), for ``model/cache.py``.

A KV row is FP8 codes of the plain channels, bf16 of the rotated ones, and a scale byte per 64
channels, padded to 8 bytes; an indexer key is two FP4 codes a byte and a scale byte per 32. What
the casts of ``quant=fp4_qat`` produce is stored without loss, so decoding from such a cache equals
the forward pass of the model with those casts.
"""

# Legend: N rows, K channels, X bytes of a stored row
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from model.cache import CacheFormats
from model.config import ModelConfig
from quant.formats import FP8_KV, MXFP4, Quantised, dequantise, quantise

_SCALE_PADDING = 8  # bytes that the scales of a KV row are padded to a multiple of


class FP8Rows:
    """KV rows: FP8, the last ``rope_dim`` channels bf16.

    Args:
        rope_dim: rotated channels, which come last.
    """

    dtype = torch.uint8

    def __init__(self, rope_dim: int) -> None:
        self.rope_dim = rope_dim

    def width(self, dim: int) -> int:
        """Bytes of a row."""
        plain = dim - self.rope_dim
        scales = FP8_KV.scale_shape((plain,))[0]
        return plain + 2 * self.rope_dim + scales + -scales % _SCALE_PADDING

    def encode(self, x_NK: Tensor) -> Tensor:
        """[N, K] to bytes [N, X]."""
        plain = x_NK.shape[-1] - self.rope_dim
        q = quantise(x_NK[:, :plain].float(), FP8_KV)
        rope = x_NK[:, plain:].to(torch.bfloat16).contiguous().view(torch.uint8)
        scale = q.scale.view(torch.uint8)
        scale = F.pad(scale, (0, -scale.shape[-1] % _SCALE_PADDING))
        return torch.cat((q.codes.view(torch.uint8), rope, scale), dim=-1)

    def decode(self, rows_X: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        """Bytes [..., X] to [..., dim]."""
        plain, scales = dim - self.rope_dim, FP8_KV.scale_shape((dim - self.rope_dim,))[0]
        rope_end = plain + 2 * self.rope_dim
        q = Quantised(
            rows_X[..., :plain].contiguous().view(torch.float8_e4m3fn),
            rows_X[..., rope_end : rope_end + scales].contiguous().view(torch.float8_e8m0fnu),
        )
        rope = rows_X[..., plain:rope_end].contiguous().view(torch.bfloat16)
        return torch.cat((dequantise(q, FP8_KV, dtype), rope.to(dtype)), dim=-1)


class FP4Rows:
    """Indexer keys: FP4, scales behind the codes."""

    dtype = torch.uint8

    def width(self, dim: int) -> int:
        """Bytes of a row."""
        return dim // 2 + MXFP4.scale_shape((dim,))[0]

    def encode(self, x_NK: Tensor) -> Tensor:
        """[N, K] to bytes [N, X]."""
        q = quantise(x_NK.float(), MXFP4)
        return torch.cat((q.codes.view(torch.uint8), q.scale.view(torch.uint8)), dim=-1)

    def decode(self, rows_X: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        """Bytes [..., X] to [..., dim]."""
        codes, scale = rows_X[..., : dim // 2].contiguous(), rows_X[..., dim // 2 :].contiguous()
        q = Quantised(codes.view(torch.int8), scale.view(torch.float8_e8m0fnu))
        return dequantise(q, MXFP4, dtype)


def released_formats(config: ModelConfig) -> CacheFormats:
    """FP8 rows and FP4 indexer keys."""
    return CacheFormats(FP8Rows(config.qk_rope_head_dim), FP4Rows())
