"""FLOPs of a decoded token and bytes of its cache, beside V3.2 and a GQA cache (reference F)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from model.config import LayerKind, ModelConfig
from model.parameter_counts import parameter_counts


@dataclass(frozen=True)
class DecodingFlops:
    """FLOPs of one decoded token (reference F).

    Attributes:
        gemm: matmuls with weights; FP8.
        core: scores and values of the core attention; bf16, so twice the cost of FP8.
        index: the indexer's scores.
        index_weight: cost of an indexer FLOP in FP8 ones: a half in FP4 (V4), one in FP8 (V3.2).
    """

    gemm: float
    core: float
    index: float
    index_weight: float = 0.5

    @property
    def raw(self) -> float:
        """Each operation once, whatever its format."""
        return self.gemm + self.core + self.index

    @property
    def fp8_equivalent(self) -> float:
        """Each operation in units of an FP8 one; the weights fit the paper's figure 1."""
        return self.gemm + 2 * self.core + self.index_weight * self.index


def decoding_flops(config: ModelConfig, context: int) -> DecodingFlops:
    """FLOPs of the token that follows ``context`` tokens (main model, no MTP)."""
    core = index = 0.0
    for layer in range(config.num_hidden_layers):
        kind, ratio = config.kind(layer), config.ratio(layer)
        keys = context if kind is LayerKind.dense else min(config.sliding_window, context)
        if kind is LayerKind.csa:
            keys += min(config.index_topk, context // ratio)
            index += 2.0 * config.index_n_heads * config.index_head_dim * (context // ratio)
        elif kind is LayerKind.hca:
            keys += context // ratio
        core += 4.0 * config.num_attention_heads * config.head_dim * keys
    return DecodingFlops(2.0 * parameter_counts(config).active_without_embedding, core, index)


def v32_decoding_flops(context: int) -> DecodingFlops:
    """DeepSeek-V3.2: 61 layers, 128 heads of 576 + 512, top-2048, indexer of 64 heads of 128."""
    core = 61 * 2.0 * 128 * (576 + 512) * min(2048, context)
    return DecodingFlops(2 * 37e9, core, 61 * 2.0 * 64 * 128 * context, index_weight=1.0)


def kv_cache_bytes(config: ModelConfig, context: int, value_bytes: int = 0) -> int:
    """Bytes of KV cache after ``context`` tokens: window rows, entries and indexer keys.

    As released (reference F) an entry or window row is FP8 with a scale per 64 channels (padded to
    8) and bf16 RoPE channels; an indexer key is FP4 with a scale per 32 channels.

    Args:
        config: the model.
        context: tokens.
        value_bytes: of every channel (2: bf16); 0: the released formats.
    """
    plain = config.head_dim - config.qk_rope_head_dim
    row = plain + 2 * config.qk_rope_head_dim + 8 * math.ceil(math.ceil(plain / 64) / 8)
    index_row = math.ceil(config.index_head_dim / 2) + math.ceil(config.index_head_dim / 32)
    if value_bytes:
        row, index_row = value_bytes * config.head_dim, value_bytes * config.index_head_dim
    total = 0
    for layer in range(config.num_hidden_layers):
        kind, ratio = config.kind(layer), config.ratio(layer)
        window = context if kind is LayerKind.dense else min(config.sliding_window, context)
        total += window * row
        if kind is LayerKind.csa:
            total += context // ratio * (row + index_row)
        elif kind is LayerKind.hca:
            total += context // ratio * row
    return total


def v32_kv_cache_bytes(context: int) -> int:
    """DeepSeek-V3.2: 61 layers, 656 bytes of latent and 132 of indexer key a token."""
    return 61 * (656 + 132) * context


def gqa8_kv_cache_bytes(layers: int, context: int) -> int:
    """A bf16 cache of 8 KV heads of 128 channels, keys and values."""
    return layers * 2 * 8 * 128 * 2 * context
