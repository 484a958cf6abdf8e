"""Context parallelism: ranks hold contiguous shards of every row (reference D, paper 3).

What a shard's tokens need of the others is little: the window's and the compressor's tokens just
before it, and all compressed entries. :class:`ShardedRows` brings both behind the seam
``kv_exchange`` of the model. An exchange departs where it is asked for and is waited for where its
values are used; local work between the two hides it. Backward likewise: gradients depart for the
rank that holds what was brought where they arise, and that rank waits for them only where it adds
them up, behind the gradients of the same local work. Several ranks' parts are added up in the
order of ranks, so that equal inputs give equal bits.

Who sends what follows from the shard's length and from the plan, which every rank builds of the
whole row: no counts are exchanged and none is read from a device.
"""

# Legend: B rows, S tokens of a shard, U tokens of a shard and before, C channels, L entries
# computed here, E entries of whole rows, F entries of all ranks with their padding, K entry dim, P
# ranks, J indexer heads, N chosen entries, H half a shard's tokens
from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from model.kernels.gather import gather_rows
from model.kv_exchange import Arriving, Here, OwnQueries, Queries, Score
from model.sequence_plan import Bounds, CompressedPlan, Scoring, SequenceShard


class ShardedRows:
    """Brings what the other ranks of a row hold, behind ``model/kv_exchange.py``.

    Args:
        group: the ranks that share rows, in the order of their shards.
        balanced: ranks score queries for each other (``model/scoring_order.py``).
    """

    def __init__(self, group: dist.ProcessGroup, balanced: bool = False) -> None:
        self._group = group
        self.shard = SequenceShard(group.rank(), group.size(), balanced)

    def tokens_before(self, count: int, *x_BSC: Tensor) -> Arriving:
        """Tensors [B, U, C] that begin up to ``count`` tokens before the shard."""
        if not count:
            return Here(x_BSC)
        return _Brought(_TokenTrip(self._group, count), *x_BSC)

    def all_entries(self, entries_BLK: Tensor, plan: CompressedPlan) -> Arriving:
        """The entries of whole rows [B, E, K], of those that are computed here."""
        return _WholeRowEntries(_Brought(_EntryTrip(self._group), entries_BLK), plan)

    def to_score(self, q_BTJL: Tensor, w_BTJ: Tensor, plan: CompressedPlan) -> Queries:
        """Hand over the indexer's queries and head weights for their choice, without gradients."""
        if plan.scoring is None:
            return OwnQueries(q_BTJL, w_BTJ, plan)
        return _SharedQueries(self._group, q_BTJL, w_BTJ, plan, plan.scoring)

    def add_up(self, counts: Tensor) -> Tensor:
        """Integers summed over all parts of the rows."""
        counts = counts.clone()
        dist.all_reduce(counts, group=self._group)
        return counts


# ---- there and back, for autograd ----------------------------------------------------------------
class _Trip(Protocol):
    """One exchange, forward and backward, each in two halves."""

    def depart(self, *x: Tensor) -> None:
        """Send what others need of these."""
        ...

    def arrive(self) -> tuple[Tensor, ...]:
        """Wait for what others hold; those sent, with it."""
        ...

    def depart_back(self, *grads: Tensor) -> None:
        """Send the gradients of what was brought to those who hold it."""
        ...

    def arrive_back(self) -> tuple[Tensor, ...]:
        """Wait for one's own; the gradients of what was sent."""
        ...


class _Brought:
    """A trip that has departed; its values, for autograd, when it has arrived."""

    def __init__(self, trip: _Trip, *x: Tensor) -> None:
        self._trip = trip
        self._ticket: Tensor = _Depart.apply(trip, *x)

    def wait(self) -> tuple[Tensor, ...]:
        return _Arrive.apply(self._trip, self._ticket)


class _Depart(torch.autograd.Function):
    """Begins a trip. Its empty result ties it to :class:`_Arrive`: backward runs the other way."""

    @staticmethod
    def forward(ctx: Any, trip: _Trip, *x: Tensor) -> Tensor:
        ctx.trip = trip
        trip.depart(*x)
        return x[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.trip.arrive_back()


class _Arrive(torch.autograd.Function):
    """Ends a trip."""

    @staticmethod
    def forward(ctx: Any, trip: _Trip, ticket: Tensor) -> tuple[Tensor, ...]:
        ctx.trip = trip
        return trip.arrive()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        ctx.trip.depart_back(*grads)
        return None, grads[0].new_empty(0)


class _WholeRowEntries:
    """Entries of all ranks, put in the order of the row when they have arrived."""

    def __init__(self, brought: Arriving, plan: CompressedPlan) -> None:
        self._brought, self._gathering = brought, plan.gathering

    def wait(self) -> tuple[Tensor]:
        assert self._gathering is not None
        (entries_BFK,) = self._brought.wait()
        return (gather_rows(entries_BFK, self._gathering.source_BE, self._gathering.target_BF),)


# ---- what travels --------------------------------------------------------------------------------
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


class _TokenTrip:
    """Puts the tokens before a shard in front of it."""

    def __init__(self, group: dist.ProcessGroup, count: int) -> None:
        self._group, self._count = group, count

    def depart(self, *x_BSC: Tensor) -> None:
        S, ranks, mine = x_BSC[0].shape[1], self._group.size(), self._group.rank()
        self._sent = rows_sent(S, self._count, mine, ranks)
        self._received = [
            _length(rows_sent(S, self._count, rank, ranks)[mine]) for rank in range(ranks)
        ]
        self._channels = [x.shape[-1] for x in x_BSC]
        skipped = max(0, S - self._count)  # of the shard: sent to nobody
        last = torch.cat([x[:, skipped:] for x in x_BSC], dim=-1)
        parts = [last[:, rows.start - skipped :] for rows in self._sent]
        self._here: tuple[Tensor, ...] = x_BSC
        self._way = _Swap(parts, self._received, self._group)

    def arrive(self) -> tuple[Tensor, ...]:
        here, self._here = self._here, ()  # kept by autograd, not by the trip
        pieces = self._way.wait().split(self._channels, dim=-1)
        return tuple(torch.cat((p, x), dim=1) for p, x in zip(pieces, here, strict=True))

    def depart_back(self, *grad_BUC: Tensor) -> None:
        before = sum(self._received)
        joined = torch.cat([g[:, :before] for g in grad_BUC], dim=-1)
        lengths = [_length(s) for s in self._sent]
        self._own = [g[:, before:] for g in grad_BUC]
        self._way = _Swap(list(joined.split(self._received, dim=1)), lengths, self._group)

    def arrive_back(self) -> tuple[Tensor, ...]:
        grads, self._own = [g.clone() for g in self._own], []
        parts = self._way.wait().split([_length(s) for s in self._sent], dim=1)
        for part, rows in zip(parts, self._sent, strict=True):
            for grad, piece in zip(grads, part.split(self._channels, dim=-1), strict=True):
                grad[:, rows] += piece
        return tuple(grads)


class _EntryTrip:
    """Entries of all ranks, rank after rank; gradients add up in fp32 where they came from."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def depart(self, *entries: Tensor) -> None:
        (entries_BLK,) = entries
        B, L, K = entries_BLK.shape
        self._sent, self._out = (
            entries_BLK.contiguous(),
            entries_BLK.new_empty(self._group.size() * B, L, K),
        )
        self._work = dist.all_gather_single(self._out, self._sent, group=self._group, async_op=True)

    def arrive(self) -> tuple[Tensor]:
        _wait(self._work)
        B, L, K = self._sent.shape
        ranks, out = self._group.size(), self._out
        del self._sent, self._out
        return (out.view(ranks, B, L, K).transpose(0, 1).reshape(B, ranks * L, K),)

    def depart_back(self, *grads: Tensor) -> None:
        (grad_BFK,) = grads
        (B, F, K), ranks = grad_BFK.shape, self._group.size()
        self._sent = grad_BFK.view(B, ranks, F // ranks, K).transpose(0, 1).contiguous()
        self._out = torch.empty_like(self._sent)
        self._work = dist.all_to_all_single(self._out, self._sent, group=self._group, async_op=True)

    def arrive_back(self) -> tuple[Tensor]:
        _wait(self._work)
        back_PBLK = self._out
        del self._sent, self._out
        total_BLK = back_PBLK[0].float()
        for part_BLK in back_PBLK[1:]:
            total_BLK += part_BLK
        return (total_BLK.to(back_PBLK.dtype),)


class _SharedQueries:
    """Half of the queries are scored elsewhere, and half of another rank's here.

    Queries travel while the keys do; choices travel back while the half that stays is scored.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        q_BSJL: Tensor,
        w_BSJ: Tensor,
        plan: CompressedPlan,
        scoring: Scoring,
    ) -> None:
        self._group, self._plan, self._scoring = group, plan, scoring
        self._heads = q_BSJL.shape[2:]
        q_BSC = q_BSJL.detach().flatten(2)
        self._here = [x.chunk(2, dim=1)[scoring.kept] for x in (q_BSC, w_BSJ.detach())]
        self._ways = [
            self._send(x.chunk(2, dim=1)[1 - scoring.kept], scoring.receiver, scoring.sender)
            for x in (q_BSC, w_BSJ.detach())
        ]

    @torch.no_grad()
    def choose(self, score: Score) -> Tensor:
        plan, scoring = self._plan, self._scoring
        theirs_BHN = self._scored(
            score, [way.wait() for way in self._ways], scoring.first_BS, scoring.stop_BS,
            scoring.bounds,
        )  # fmt: skip
        back = self._send(theirs_BHN.int(), scoring.sender, scoring.receiver)
        H = scoring.first_BS.shape[1]
        kept = slice(scoring.kept * H, (scoring.kept + 1) * H)
        bounds = Bounds(plan.bounds.low_T[kept], plan.bounds.high_T[kept])
        mine_BHN = self._scored(
            score, self._here, plan.first_BT[:, kept], plan.stop_BT[:, kept], bounds
        )
        halves = [mine_BHN, back.wait().to(mine_BHN.dtype)]
        return torch.cat(halves if scoring.kept == 0 else halves[::-1], dim=1)

    def _scored(
        self, score: Score, half: list[Tensor], first_BH: Tensor, stop_BH: Tensor, bounds: Bounds
    ) -> Tensor:
        q_BHC, w_BHJ = half
        q_BHJL = q_BHC.unflatten(2, self._heads).contiguous()
        return score(
            q_BHJL, w_BHJ.contiguous(), first_BH.contiguous(), stop_BH.contiguous(), bounds
        )

    def _send(self, x_BHC: Tensor, receiver: int, sender: int) -> _Swap:
        """To one rank, and as much from one."""
        ranks = range(self._group.size())
        parts = [x_BHC if rank == receiver else x_BHC[:, :0] for rank in ranks]
        received = [x_BHC.shape[1] if rank == sender else 0 for rank in ranks]
        return _Swap(parts, received, self._group)


class _Swap:
    """Tokens that every rank sends to every other, on their way; alive until they have arrived."""

    def __init__(
        self, parts_BNC: list[Tensor], received: list[int], group: dist.ProcessGroup
    ) -> None:
        B, _, C = parts_BNC[0].shape
        sent = [part.shape[1] for part in parts_BNC]
        self._flat = torch.cat([part.transpose(0, 1) for part in parts_BNC])
        self._back = self._flat.new_empty(sum(received), B, C)
        self._work = dist.all_to_all_single(
            self._back, self._flat, received, sent, group=group, async_op=True
        )

    def wait(self) -> Tensor:
        """Those received, in the order of ranks [B, sum of received, C]."""
        _wait(self._work)
        return self._back.transpose(0, 1)


def _wait(work: dist.Work | None) -> None:
    assert work is not None, "a rank outside the group"
    work.wait()


def _length(rows: slice) -> int:
    return rows.stop - rows.start
