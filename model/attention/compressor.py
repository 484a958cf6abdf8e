"""Compressor: m tokens become one entry by a softmax over the tokens, per channel.

reference B.5, paper 2.3.1 and 2.3.2. With overlap (CSA) an entry mixes its own block, read from the
second half of the channels, with the block before it, read from the first half; without (HCA) only
its own. Everything is fp32 until the norm.
"""

# Legend: B rows, T tokens, U tokens here and before, D hidden, E entries, L entries computed here,
# M tokens of a block, C channels of the projections, K entry dim
from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.context import RopeTable
from model.kernels.gather import gather_rows
from model.kernels.select import select
from model.kv_exchange import KVExchange
from model.linear import ActivationCast, Linear
from model.norm import RMSNorm
from model.sequence_plan import Blocks, CompressedPlan


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
        self._rope = select("rope", config.kernels)

    def forward(
        self, u_BTD: Tensor, plan: CompressedPlan, rope: RopeTable, exchange: KVExchange
    ) -> Tensor:
        """Entries of whole rows [B, E, dim] in the dtype of ``u``, normalised and rotated.

        Args:
            u_BTD: normalised input.
            plan: where entries lie.
            rope: at the first token of each entry that is computed here.
            exchange: brings the tokens before a shard, and the other shards' entries.
        """
        blocks = plan.overlapping if self.overlap else plan.disjoint
        before = (2 if self.overlap else 1) * self.ratio - 1
        k_BUC, z_BUC = exchange.tokens_before(before, *self.project(u_BTD))
        k_BLMC, z_BLMC = self._blocks(k_BUC, blocks), self._blocks(z_BUC, blocks)
        entries_BLK = self.compress(
            k_BLMC, z_BLMC, plan.has_previous_BL, rope, u_BTD.dtype, blocks.lead
        )
        return exchange.all_entries(entries_BLK, plan)

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
        lead: int = 0,
    ) -> Tensor:
        """Entries of whole blocks.

        Args:
            k_BLMC: values of the tokens of each block, blocks in order.
            z_BLMC: their logits.
            has_previous_BL: the block before is of the same document (read under overlap).
            rope: at the first token of each block.
            dtype: of the result.
            lead: 1: the first block makes no entry, it only comes before the second.
        """
        z_BLMC = z_BLMC + self.ape.float()
        if self.overlap:
            k_previous, k_own = self._both(k_BLMC, lead)
            z_previous, z_own = self._both(z_BLMC, lead)
            z_previous = z_previous.masked_fill(~has_previous_BL[..., None, None], float("-inf"))
            k_BLMC = torch.cat((k_previous, k_own), dim=2)
            z_BLMC = torch.cat((z_previous, z_own), dim=2)
        e_BLK = (z_BLMC.softmax(dim=2) * k_BLMC).sum(dim=2)
        return self.cast(self._rope(self.norm(e_BLK.to(dtype)), *rope))

    def _blocks(self, x_BUC: Tensor, blocks: Blocks) -> Tensor:
        B, L, M = blocks.tokens_BLM.shape
        rows = gather_rows(x_BUC, blocks.tokens_BLM.flatten(1), blocks.slot_BU)
        return rows.view(B, L, M, -1)

    def _both(self, x_BLMC: Tensor, lead: int) -> tuple[Tensor, Tensor]:
        """What each entry reads of the block before it and of its own.

        Without a leading block the first entry of a row gets zeros for the one before.
        """
        previous, own = x_BLMC[..., : self.dim], x_BLMC[:, lead:, :, self.dim :]
        if not lead:
            previous = torch.cat((torch.zeros_like(previous[:, :1]), previous), dim=1)
        return previous[:, :-1], own
