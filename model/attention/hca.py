"""Heavily compressed attention: window plus all causal entries of long, disjoint blocks.

reference B.5, paper 2.3.2.
"""

# Legend: B rows, T tokens, D hidden, Q query latent
from __future__ import annotations

from torch import Tensor

from model.attention.compressor import Compressor
from model.attention.core import Entries, WindowAttention
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

    def entries(self, u_BTD: Tensor, q_latent_BTQ: Tensor, context: ForwardContext) -> Entries:
        """All visible entries."""
        plan = context.plan.compressed[self.ratio]
        rope = context.entry_rope[self.ratio]
        kv_BEK = self.compressor(u_BTD, plan, rope, context.kv_exchange, u_BTD.dtype)
        return EntrySet(kv_BEK, plan.first_BT, plan.stop_BT, bounds=plan.bounds), None
