"""Heavily compressed attention: window plus all causal entries of long, disjoint blocks.

reference B.5, paper 2.3.2.
"""

# Legend: B rows, T tokens, D hidden, Q query latent
from __future__ import annotations

from torch import Tensor

from model.attention.compressor import Compressor
from model.attention.core import EntryWork, WindowAttention
from model.config import LayerKind, ModelConfig
from model.context import ForwardContext, RopeTable
from model.kernels.attention import EntrySet


class HeavilyCompressedAttention(WindowAttention):
    """Window attention whose softmax also holds every complete block before the query."""

    def __init__(self, config: ModelConfig, kind: LayerKind, name: str, ratio: int) -> None:
        super().__init__(config, kind, name)
        self.ratio = ratio
        self.compressor = Compressor(config, ratio, config.head_dim, overlap=False)

    def rope(self, context: ForwardContext) -> RopeTable:
        """The compressed layers' table."""
        return context.compressed_rope

    def begin_entries(self, u_BTD: Tensor, context: ForwardContext) -> EntryWork:
        """All visible entries."""
        return _VisibleEntries(self, u_BTD, context)


class _VisibleEntries(EntryWork):
    def __init__(
        self, layer: HeavilyCompressedAttention, u_BTD: Tensor, context: ForwardContext
    ) -> None:
        self._plan = context.plan.compressed[layer.ratio]
        rope = context.entry_rope[layer.ratio]
        self._coming = layer.compressor(u_BTD, self._plan, rope, context.kv_exchange, u_BTD.dtype)

    def pool(self, q_latent_BTQ: Tensor) -> None:
        self._coming.pool()

    def take(self) -> tuple[EntrySet, None]:
        plan = self._plan
        return EntrySet(self._coming.wait(), plan.first_BT, plan.stop_BT, bounds=plan.bounds), None
