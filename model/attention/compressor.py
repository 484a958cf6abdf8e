"""Compressor: m tokens become one entry by a softmax over the tokens, per channel.

reference B.5, paper 2.3.1 and 2.3.2. With overlap (CSA) an entry mixes its own block, read from the
second half of the channels, with the block before it, read from the first half; without (HCA) only
its own. Everything is fp32 until the norm.
"""

# Legend: B rows, T tokens, D hidden, E entries, M tokens of a block, C channels of the projections,
# K entry dim
from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.context import RopeTable
from model.kernels.gather import gather_rows
from model.kernels.select import select
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
        self._rope = select("rope", config.kernels)

    def forward(self, u_BTD: Tensor, plan: CompressedPlan, rope: RopeTable) -> Tensor:
        """Entries [B, E, dim] in the dtype of ``u``, normalised, rotated at their first token."""
        k_BTC, z_BTC = self.project(u_BTD)
        k_BEMC, z_BEMC = self._blocks(k_BTC, plan), self._blocks(z_BTC, plan)
        return self.compress(k_BEMC, z_BEMC, plan.has_previous_BE, rope, u_BTD.dtype)

    def project(self, u_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """What every token adds to its entries: values and logits [B, T, C], fp32."""
        u_fp32 = u_BTD.float()
        return self.wkv(u_fp32), self.wgate(u_fp32)

    def compress(
        self,
        k_BEMC: Tensor,
        z_BEMC: Tensor,
        has_previous_BE: Tensor,
        rope: RopeTable,
        dtype: torch.dtype,
    ) -> Tensor:
        """Entries of whole blocks.

        Args:
            k_BEMC: values of the tokens of each block, blocks in order.
            z_BEMC: their logits.
            has_previous_BE: the block before is of the same document (read under overlap).
            rope: at the first token of each block.
            dtype: of the result.
        """
        z_BEMC = z_BEMC + self.ape.float()
        if self.overlap:
            k_BEMC = torch.cat((_previous(k_BEMC[..., : self.dim]), k_BEMC[..., self.dim :]), dim=2)
            z_previous = _previous(z_BEMC[..., : self.dim])
            z_previous = z_previous.masked_fill(~has_previous_BE[..., None, None], float("-inf"))
            z_BEMC = torch.cat((z_previous, z_BEMC[..., self.dim :]), dim=2)
        e_BEK = (z_BEMC.softmax(dim=2) * k_BEMC).sum(dim=2)
        return self.cast(self._rope(self.norm(e_BEK.to(dtype)), *rope))

    def _blocks(self, x_BTC: Tensor, plan: CompressedPlan) -> Tensor:
        B, _, C = x_BTC.shape
        rows = gather_rows(x_BTC, plan.tokens_BEM.flatten(1), plan.slot_BT)
        return rows.view(B, plan.num_entries, self.ratio, C)


def _previous(x_BEMK: Tensor) -> Tensor:
    """Shift by one entry: entry e gets the block of entry e - 1 (zeros for the first of a row)."""
    return torch.cat((torch.zeros_like(x_BEMK[:, :1]), x_BEMK[:, :-1]), dim=1)
