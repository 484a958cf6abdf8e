"""Context parallelism: ranks hold contiguous shards of every row (reference D, paper 3).

What a shard's tokens need of the others is little: the window's and the compressor's tokens just
before it, and all compressed entries. :class:`ShardedRows` brings both behind the seam
``kv_exchange`` of the model. Each exchange is a function of autograd whose backward pass sends
gradients back to the rank that holds what was brought; several ranks' parts are added up there in
the order of ranks, so that equal inputs give equal bits.

Who sends what follows from the shard's length and from the plan, which every rank builds of the
whole row: no counts are exchanged and none is read from a device.
"""

# Legend: B rows, S tokens of a shard, U tokens of a shard and before, C channels, L entries
# computed here, E entries of whole rows, F entries of all ranks with their padding, K entry dim, P
# ranks
from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from model.kernels.gather import gather_rows
from model.sequence_plan import CompressedPlan, SequenceShard


class ShardedRows:
    """Brings what the other ranks of a row hold, behind ``model/kv_exchange.py``.

    Args:
        group: the ranks that share rows, in the order of their shards.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.shard = SequenceShard(group.rank(), group.size())

    def tokens_before(self, count: int, *x_BSC: Tensor) -> tuple[Tensor, ...]:
        """Tensors [B, U, C] that begin up to ``count`` tokens before the shard."""
        return _TokensBefore.apply(self._group, count, *x_BSC) if count else x_BSC

    def all_entries(self, entries_BLK: Tensor, plan: CompressedPlan) -> Tensor:
        """The entries of whole rows [B, E, K], of those that are computed here."""
        assert plan.gathering is not None
        entries_BFK = _OfAllRanks.apply(self._group, entries_BLK)
        return gather_rows(entries_BFK, plan.gathering.source_BE, plan.gathering.target_BF)

    def add_up(self, counts: Tensor) -> Tensor:
        """Integers summed over all parts of the rows."""
        counts = counts.clone()
        dist.all_reduce(counts, group=self._group)
        return counts


def rows_sent(size: int, count: int, sender: int, ranks: int) -> list[slice]:
    """Tokens of the sender's shard that lie up to ``count`` tokens before each rank's shard.

    Args:
        size: tokens of a shard.
        count: tokens before a shard; may span several shards.
        sender: number of the rank.
        ranks: that share a row.
    """
    sent = []
    for rank in range(ranks):
        first = max(0, (rank - sender) * size - count) if rank > sender else size
        sent.append(slice(min(first, size), size))
    return sent


class _TokensBefore(torch.autograd.Function):
    """Puts the tokens before a shard in front of it."""

    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, count: int, *x_BSC: Tensor
    ) -> tuple[Tensor, ...]:
        S, ranks, mine = x_BSC[0].shape[1], group.size(), group.rank()
        ctx.group, ctx.sent = group, rows_sent(S, count, mine, ranks)
        ctx.received = [_length(rows_sent(S, count, rank, ranks)[mine]) for rank in range(ranks)]
        ctx.channels = [x.shape[-1] for x in x_BSC]
        skipped = max(0, S - count)  # of the shard: sent to nobody
        last = torch.cat([x[:, skipped:] for x in x_BSC], dim=-1)
        before = _swap([last[:, rows.start - skipped :] for rows in ctx.sent], ctx.received, group)
        pieces = before.split(ctx.channels, dim=-1)
        return tuple(torch.cat((p, x), dim=1) for p, x in zip(pieces, x_BSC, strict=True))

    @staticmethod
    def backward(ctx: Any, *grad_BUC: Tensor) -> tuple[Tensor | None, ...]:
        before = sum(ctx.received)
        joined = torch.cat([g[:, :before] for g in grad_BUC], dim=-1)
        lengths = [_length(s) for s in ctx.sent]
        returned = _swap(list(joined.split(ctx.received, dim=1)), lengths, ctx.group)
        grads = [g[:, before:].clone() for g in grad_BUC]
        for part, rows in zip(returned.split(lengths, dim=1), ctx.sent, strict=True):
            for grad, piece in zip(grads, part.split(ctx.channels, dim=-1), strict=True):
                grad[:, rows] += piece
        return None, None, *grads


class _OfAllRanks(torch.autograd.Function):
    """Entries of all ranks, rank after rank; gradients add up in fp32 where they came from."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, entries_BLK: Tensor) -> Tensor:
        ctx.group = group
        (B, L, K), ranks = entries_BLK.shape, group.size()
        out = entries_BLK.new_empty(ranks * B, L, K)
        dist.all_gather_single(out, entries_BLK.contiguous(), group=group)
        return out.view(ranks, B, L, K).transpose(0, 1).reshape(B, ranks * L, K)

    @staticmethod
    def backward(ctx: Any, grad_BFK: Tensor) -> tuple[None, Tensor]:
        (B, F, K), ranks = grad_BFK.shape, ctx.group.size()
        sent_PBLK = grad_BFK.view(B, ranks, F // ranks, K).transpose(0, 1).contiguous()
        back_PBLK = torch.empty_like(sent_PBLK)
        dist.all_to_all_single(back_PBLK, sent_PBLK, group=ctx.group)
        total_BLK = back_PBLK[0].float()
        for rank in range(1, ranks):
            total_BLK += back_PBLK[rank]
        return None, total_BLK.to(grad_BFK.dtype)


def _swap(parts_BNC: list[Tensor], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send each rank its tokens; those received, in the order of ranks [B, sum of received, C]."""
    B, _, C = parts_BNC[0].shape
    sent = [part.shape[1] for part in parts_BNC]
    flat = torch.cat([part.transpose(0, 1) for part in parts_BNC])
    back = flat.new_empty(sum(received), B, C)
    dist.all_to_all_single(back, flat, received, sent, group=group)
    return back.transpose(0, 1)


def _length(rows: slice) -> int:
    return rows.stop - rows.start
