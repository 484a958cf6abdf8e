"""Tokens of a block become one entry by a softmax over them, per channel (reference B.5)."""

# Legend: B rows, U tokens here and before, L entries or blocks, M tokens of a block, C channels of
# the projections, K entry dim
from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.gather import gather_rows
from model.sequence_plan import Blocks


def pool_entries(
    k_BUC: Tensor,
    z_BUC: Tensor,
    ape_MC: Tensor,
    blocks: Blocks,
    has_previous_BL: Tensor,
    overlap: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Entries of the blocks of a plan, from what every token adds.

    Args:
        k_BUC: values, fp32.
        z_BUC: logits, fp32.
        ape_MC: added to the logits, by place in the block.
        blocks: tokens of each block; entries that do not exist are zeros.
        has_previous_BL: the block before an entry's is of the same document (read under overlap).
        overlap: an entry also reads the block before: that one by the first half of the channels,
            its own by the second.
        dtype: of the result.

    Returns:
        [B, L, K]; K is C / 2 under overlap, else C.
    """

    def gathered(x_BUC: Tensor) -> Tensor:
        B, L, M = blocks.tokens_BLM.shape
        return gather_rows(x_BUC, blocks.tokens_BLM.flatten(1), blocks.slot_BU).view(B, L, M, -1)

    k_BLMC, z_BLMC = gathered(k_BUC), gathered(z_BUC)
    return pool_blocks(k_BLMC, z_BLMC, ape_MC, has_previous_BL, overlap, blocks.lead).to(dtype)


def pool_blocks(
    k_BLMC: Tensor,
    z_BLMC: Tensor,
    ape_MC: Tensor,
    has_previous_BL: Tensor,
    overlap: bool,
    lead: int = 0,
) -> Tensor:
    """The same from whole blocks, in order; fp32 [B, L, K].

    Args:
        k_BLMC: values of the tokens of each block.
        z_BLMC: their logits.
        ape_MC: added to the logits.
        has_previous_BL: as above.
        overlap: as above.
        lead: 1: the first block makes no entry, it only comes before the second.
    """
    z_BLMC = z_BLMC + ape_MC
    if overlap:
        k_previous, k_own = _both(k_BLMC, lead)
        z_previous, z_own = _both(z_BLMC, lead)
        z_previous = z_previous.masked_fill(~has_previous_BL[..., None, None], float("-inf"))
        k_BLMC = torch.cat((k_previous, k_own), dim=2)
        z_BLMC = torch.cat((z_previous, z_own), dim=2)
    return (z_BLMC.softmax(dim=2) * k_BLMC).sum(dim=2)


def _both(x_BLMC: Tensor, lead: int) -> tuple[Tensor, Tensor]:
    """What each entry reads of the block before it and of its own.

    Without a leading block the first entry of a row gets zeros for the one before.
    """
    K = x_BLMC.shape[-1] // 2
    previous, own = x_BLMC[..., :K], x_BLMC[:, lead:, :, K:]
    if not lead:
        previous = torch.cat((torch.zeros_like(previous[:, :1]), previous), dim=1)
    return previous[:, :-1], own
