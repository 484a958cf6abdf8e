"""Compressed sparse attention: window plus the indexer's top-k of short, overlapping blocks.

reference B.5, B.7, paper 2.3.1.
"""

# Legend: B rows, T tokens, D hidden, Q query latent, E entries, J indexer heads, L indexer head
# dim, N chosen entries
from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from model.attention.compressor import ComingEntries, Compressor
from model.attention.core import Aux, EntryWork, Finish, WindowAttention
from model.attention.indexer import LightningIndexer
from model.config import IndexerPhase, LayerKind, ModelConfig
from model.context import ForwardContext, RopeTable
from model.kernels.attention import AttentionResult, EntrySet
from model.kernels.indexer import IndexerInputs, indexer_monitors
from model.kernels.select import select
from model.sequence_plan import Bounds


class CompressedSparseAttention(WindowAttention):
    """Window attention plus the chosen entries (all visible ones in the full phases)."""

    def __init__(self, config: ModelConfig, kind: LayerKind, name: str, ratio: int) -> None:
        super().__init__(config, kind, name)
        self.ratio, self.topk = ratio, config.index_topk
        self.compressor = Compressor(config, ratio, config.head_dim, overlap=True)
        self.indexer = LightningIndexer(config, ratio)
        self._index_topk = select("index_topk", config.kernels)
        self._indexer_loss = select("indexer_loss", config.kernels, config.deterministic)

    def rope(self, context: ForwardContext) -> RopeTable:
        """The compressed layers' table."""
        return context.compressed_rope

    def begin_entries(self, u_BTD: Tensor, context: ForwardContext) -> EntryWork:
        """The chosen entries, or in the full phases all visible ones."""
        return _ChosenEntries(self, u_BTD, context)


class _ChosenEntries(EntryWork):
    """Entries and the indexer's keys, compressed side by side; then the choice."""

    def __init__(
        self, layer: CompressedSparseAttention, u_BTD: Tensor, context: ForwardContext
    ) -> None:
        self._layer, self._context, self._u_BTD = layer, context, u_BTD
        self._plan, rope = context.plan.compressed[layer.ratio], context.entry_rope[layer.ratio]
        self._sparse = context.phase is IndexerPhase.sparse
        self._keys: ComingEntries | None = None
        shared = self._plan, rope, context.kv_exchange, u_BTD.dtype
        u_fp32 = u_BTD.float()
        self._coming = layer.compressor(u_fp32, *shared)
        if self._sparse or context.indexer_loss or context.monitors:
            # detached: the LM loss never reaches the indexer, its own loss never the model
            self._keys = layer.indexer.compressor(u_fp32.detach(), *shared)

    def pool(self, q_latent_BTQ: Tensor) -> None:
        self._coming.pool()
        if self._keys is None:
            return
        self._keys.pool()
        context, layer = self._context, self._layer
        self._queries = layer.indexer(self._u_BTD, q_latent_BTQ, context.compressed_rope)
        if self._sparse and layer.name not in context.replay:
            q_BTJL, w_BTJ = self._queries
            self._to_score = context.kv_exchange.to_score(q_BTJL, w_BTJ, self._plan)

    def take(self) -> tuple[EntrySet, Finish | None]:
        layer, context = self._layer, self._context
        if self._keys is None:
            return self._visible(), None
        (q_BTJL, w_BTJ), index_BTN = self._queries, None
        k_BEL = self._keys.wait()
        if self._sparse:
            index_BTN = context.replay.get(layer.name)
            if index_BTN is None:
                index_BTN = self._choice(k_BEL)
            if context.record is not None:
                context.record[layer.name] = index_BTN
        entries = replace(self._visible(), index_BTN=index_BTN)
        return entries, _IndexerFinish(layer, (q_BTJL, k_BEL, w_BTJ), entries, context)

    def _choice(self, k_BEL: Tensor) -> Tensor:
        layer = self._layer

        def score(q: Tensor, w: Tensor, first: Tensor, stop: Tensor, bounds: Bounds) -> Tensor:
            return layer._index_topk((q, k_BEL, w), first, stop, layer.topk, bounds)

        return self._to_score.choose(score)

    def _visible(self) -> EntrySet:
        plan = self._plan
        return EntrySet(self._coming.wait(), plan.first_BT, plan.stop_BT, bounds=plan.bounds)


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
