"""Compressed sparse attention: window plus the indexer's top-k of short, overlapping blocks.

reference B.5, B.7, paper 2.3.1.
"""

# Legend: B rows, T tokens, D hidden, Q query latent, N chosen entries
from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from model.attention.compressor import Compressor
from model.attention.core import Aux, Entries, Finish, WindowAttention
from model.attention.indexer import LightningIndexer
from model.config import IndexerPhase, LayerKind, ModelConfig
from model.context import ForwardContext, RopeTable
from model.kernels.attention import AttentionResult, EntrySet
from model.kernels.indexer import IndexerInputs, indexer_monitors
from model.kernels.select import select


class CompressedSparseAttention(WindowAttention):
    """Window attention plus the chosen entries (all visible ones in the full phases)."""

    def __init__(self, config: ModelConfig, kind: LayerKind, name: str, ratio: int) -> None:
        super().__init__(config, kind, name)
        self.ratio, self.topk = ratio, config.index_topk
        self.compressor = Compressor(config, ratio, config.head_dim, overlap=True)
        self.indexer = LightningIndexer(config, ratio)
        self._index_topk = select("index_topk", config.kernels)
        self._indexer_loss = select("indexer_loss", config.kernels)

    def rope(self, context: ForwardContext) -> RopeTable:
        """The compressed layers' table."""
        return context.compressed_rope

    def entries(self, u_BTD: Tensor, q_latent_BTQ: Tensor, context: ForwardContext) -> Entries:
        """The chosen entries, or in the full phases all visible ones."""
        plan, entry_rope = context.plan.compressed[self.ratio], context.entry_rope[self.ratio]
        u_fp32 = u_BTD.float()
        kv_BEK = self.compressor(u_fp32, plan, entry_rope, context.kv_exchange, u_BTD.dtype)
        entries = EntrySet(kv_BEK, plan.first_BT, plan.stop_BT, bounds=plan.bounds)
        sparse = context.phase is IndexerPhase.sparse
        if not (sparse or context.indexer_loss or context.monitors):
            return entries, None
        indexer = self.indexer(
            u_BTD, u_fp32, q_latent_BTQ, plan, context.compressed_rope, entry_rope,
            context.kv_exchange,
        )  # fmt: skip
        if sparse:
            index_BTN = context.replay.get(self.name)
            if index_BTN is None:
                index_BTN = self._index_topk(
                    indexer, plan.first_BT, plan.stop_BT, self.topk, plan.bounds
                )
            if context.record is not None:
                context.record[self.name] = index_BTN
            entries = replace(entries, index_BTN=index_BTN)
        return entries, _IndexerFinish(self, indexer, entries, context)


class _IndexerFinish(Finish):
    """The indexer's loss and monitors, once attention's denominators are known."""

    def __init__(
        self,
        layer: CompressedSparseAttention,
        indexer: IndexerInputs,
        entries: EntrySet,
        context: ForwardContext,
    ) -> None:
        self.layer, self.indexer, self.entries, self.context = layer, indexer, entries, context

    def __call__(self, q_BTHK: Tensor, result: AttentionResult) -> Aux:
        aux: Aux = {}
        if self.context.indexer_loss:
            aux["indexer_kl"] = self.layer._indexer_loss(
                self.indexer, q_BTHK, result.lse_BTH, self.entries, result.mass_BTN
            )
        if self.context.monitors:
            found = indexer_monitors(
                self.indexer, q_BTHK, result.lse_BTH, self.entries, self.layer.topk,
                self.context.plan.some_queries(),
            )  # fmt: skip
            aux |= {f"indexer_{key}": value for key, value in found.items()}
        return aux
