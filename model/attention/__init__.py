"""Attention by layer kind: the registry table."""

from collections.abc import Callable

from model.attention.core import WindowAttention
from model.attention.csa import CompressedSparseAttention
from model.attention.hca import HeavilyCompressedAttention
from model.attention.multi_head import MultiHeadAttention
from model.config import LayerKind, ModelConfig

Builder = Callable[[ModelConfig, LayerKind, str, int], WindowAttention | MultiHeadAttention]

ATTENTION: dict[LayerKind, Builder] = {
    LayerKind.swa: lambda config, kind, name, ratio: WindowAttention(config, kind, name),
    LayerKind.dense: lambda config, kind, name, ratio: WindowAttention(config, kind, name),
    LayerKind.mha: MultiHeadAttention,
    LayerKind.csa: CompressedSparseAttention,
    LayerKind.hca: HeavilyCompressedAttention,
}
