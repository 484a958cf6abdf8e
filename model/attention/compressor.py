"""Compressor: m tokens become one entry by a softmax over the tokens, per channel.

reference B.5, paper 2.3.1 and 2.3.2. With overlap (CSA) an entry mixes its own block, read from the
second half of the channels, with the block before it, read from the first half; without (HCA) only
its own. Everything is fp32 until the norm.
"""

# Legend: B rows, T tokens, U tokens here and before, D hidden, E entries, L entries computed here,
# M tokens of a block, C channels of the projections, K entry dim
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.context import RopeTable
from model.kernels.pool import pool_blocks
from model.kernels.select import select
from model.kv_exchange import Arriving, KVExchange
from model.linear import ActivationCast, Linear
from model.norm import RMSNorm
from model.sequence_plan import CompressedPlan


class Compressor(nn.Module):
    """Compress the token stream by ``ratio``.

    Args:
        config: the model.
        ratio: tokens per entry.
        dim: entry dim (``head_dim``, or ``index_head_dim`` for the indexer's own compressor).
        overlap: also read the previous block.
    """

    def __init__(self, config: ModelConfig, ratio: int, dim: int, overlap: bool) -> None:
        super().__init__()
        self.ratio, self.dim, self.overlap = ratio, dim, overlap
        channels = 2 * dim if overlap else dim
        self.wkv = Linear(config.hidden_size, channels)
        self.wgate = Linear(config.hidden_size, channels)
        self.ape = nn.Parameter(torch.empty(ratio, channels))
        self.norm = RMSNorm(dim, config.rms_norm_eps, config.kernels)
        self.cast = ActivationCast()
        self._pool = select("pool_entries", config.kernels)

    def forward(
        self,
        u_BTD: Tensor,
        plan: CompressedPlan,
        rope: RopeTable,
        exchange: KVExchange,
        dtype: torch.dtype,
    ) -> ComingEntries:
        """Begin with entries of whole rows [B, E, dim], normalised and rotated.

        Args:
            u_BTD: normalised input.
            plan: where entries lie.
            rope: at the first token of each entry that is computed here.
            exchange: brings the tokens before a shard, and the other shards' entries.
            dtype: of the entries.
        """
        before = (2 if self.overlap else 1) * self.ratio - 1
        tokens = exchange.tokens_before(before, *self.project(u_BTD))

        def pooled(k_BUC: Tensor, z_BUC: Tensor) -> Arriving:
            blocks = plan.overlapping if self.overlap else plan.disjoint
            e_BLK = self._pool(
                k_BUC, z_BUC, self.ape.float(), blocks, plan.has_previous_BL, self.overlap, dtype
            )
            return exchange.all_entries(self._finish(e_BLK, rope), plan)

        return ComingEntries(tokens, pooled)

    def project(self, u_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """What every token adds to its entries: values and logits [B, T, C], fp32."""
        u_fp32 = u_BTD.float()
        return self.wkv(u_fp32), self.wgate(u_fp32)

    def compress(
        self,
        k_BLMC: Tensor,
        z_BLMC: Tensor,
        has_previous_BL: Tensor,
        rope: RopeTable,
        dtype: torch.dtype,
    ) -> Tensor:
        """Entries of whole blocks.

        Args:
            k_BLMC: values of the tokens of each block, blocks in order.
            z_BLMC: their logits.
            has_previous_BL: the block before is of the same document (read under overlap).
            rope: at the first token of each block.
            dtype: of the result.
        """
        e_BLK = pool_blocks(k_BLMC, z_BLMC, self.ape.float(), has_previous_BL, self.overlap)
        return self._finish(e_BLK.to(dtype), rope)

    def _finish(self, e_BLK: Tensor, rope: RopeTable) -> Tensor:
        return self.cast(self.norm(e_BLK, rope))


class ComingEntries:
    """Entries in three steps, between which other work hides what travels.

    They are begun (the tokens before a shard travel), pooled (entries of the shards travel) and
    waited for.

    Args:
        tokens: the compressor's values and logits, with those before the shard.
        pooled: makes entries of them.
    """

    def __init__(self, tokens: Arriving, pooled: Callable[[Tensor, Tensor], Arriving]) -> None:
        self._tokens: Arriving | None = tokens
        self._pooled = pooled
        self._entries: Arriving | None = None

    def pool(self) -> None:
        """Make the entries that are computed here."""
        assert self._tokens is not None, "pooled once"
        tokens, self._tokens = self._tokens, None
        self._entries = self._pooled(*tokens.wait())

    def wait(self) -> Tensor:
        """All entries."""
        if self._entries is None:
            self.pool()
        assert self._entries is not None
        return self._entries.wait()[0]
