"""SequencePlan: where every branch may look, built once per batch from document ids.

Window, CSA, HCA, indexer, MTP and balance loss all read it; no layer counts positions itself.
Documents are maximal runs of equal ids in a row; padding has id -1, forms no entries, sees nothing
and is seen by nothing. A plan is built on the host and moved to the device, so that nothing has to
be read back: what loops need as numbers (:class:`Bounds`) stays on the host.

Under context parallelism every rank builds the plan of the whole row and keeps what its own tokens
need (:class:`SequenceShard`): positions are those of the document, an entry belongs to the rank
that holds its last token, and entries are numbered along the whole row. So every rank knows,
without asking, who holds which entry.
"""

# Legend: B rows, T tokens that are here, E compressed entries of a row (padded to a common count),
# L entries that are computed here, M tokens of an entry's own block, U tokens here and before,
# F entries of all ranks, padding included, S tokens of half a shard, P ranks that share a row
from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from model.scoring_order import Share, balanced_halves, own_halves

P = TypeVar("P")


class SequenceShard(NamedTuple):
    """The contiguous part of every row that a rank holds (context parallelism).

    Attributes:
        index: number of the part.
        count: of parts, all of one length; 1: rows are whole.
        balanced: the indexer's work is shared out evenly (``model/scoring_order.py``).
    """

    index: int = 0
    count: int = 1
    balanced: bool = False

    def tokens(self, row_tokens: int) -> slice:
        """Row positions of the part."""
        assert row_tokens % self.count == 0, (row_tokens, self.count)
        size = row_tokens // self.count
        return slice(self.index * size, (self.index + 1) * size)


class Bounds(NamedTuple):
    """Which entries the queries at each position of any row see; on the host.

    Attributes:
        low_T: the smallest first entry of a row that sees one; E where none does.
        high_T: the largest stop; 0 where none sees an entry.
    """

    low_T: Tensor
    high_T: Tensor

    def of(self, queries: slice) -> tuple[int, int]:
        """``low, high`` of a run of positions; ``low >= high``: nothing is seen."""
        return int(self.low_T[queries].min()), int(self.high_T[queries].max())


@dataclass(frozen=True)
class Blocks:
    """The tokens that feed the entries which are computed here.

    Attributes:
        tokens_BLM: row of the tokens here and before that takes each place of each block; U (one
            past them) where there is none.
        slot_BU: the place l * M + j that a token takes in ``tokens``, or L * M where it feeds none.
        lead: 1: the first block is the one before the first entry, and makes no entry itself.
    """

    tokens_BLM: Tensor
    slot_BU: Tensor
    lead: int = 0


@dataclass(frozen=True)
class Gathering:
    """Where the entries of all ranks come from.

    Attributes:
        source_BE: place of entry e among those of all ranks, rank after rank; F for none.
        target_BF: its inverse; E for none.
    """

    source_BE: Tensor
    target_BF: Tensor


@dataclass(frozen=True)
class Scoring:
    """Which queries a rank scores in the balanced order: half its own, and half of another rank.

    Attributes:
        kept: which half of the shard is scored here, 0 or 1; the other one is sent.
        receiver: number of the rank that scores the other half.
        sender: number of the rank whose half is scored here.
        first_BS: first visible entry of its queries.
        stop_BS: one past the last.
        bounds: of these two over all rows.
    """

    kept: int
    receiver: int
    sender: int
    first_BS: Tensor
    stop_BS: Tensor
    bounds: Bounds


@dataclass(frozen=True)
class CompressedPlan:
    """Compressed entries of one ratio, numbered along the row, document after document.

    A document of n tokens has n // ratio entries; the remainder is dropped (reference B.5). The
    entries that a query may use form one range, those of its document whose last token is not after
    it (B.6). Where entry e has a previous block (``has_previous``), that block is entry e - 1.

    Attributes:
        ratio: tokens per entry (M).
        num_entries: E of the whole row, padding included.
        disjoint: blocks of entries that read their own block alone.
        overlapping: blocks of entries that read the one before too; of whole rows the same.
        valid_BL: an entry that is computed here exists.
        has_previous_BL: it is not its document's first.
        position_BL: position in the document of its block's first token.
        first_BT: int32; first visible entry of query t, of the whole row.
        stop_BT: int32; one past the last visible entry of query t.
        bounds: of these two over all rows.
        gathering: of a shard: how the row's entries are put together.
        scoring: of a shard: who scores whose queries; None: every rank its own.
    """

    ratio: int
    num_entries: int
    disjoint: Blocks
    overlapping: Blocks
    valid_BL: Tensor
    has_previous_BL: Tensor
    position_BL: Tensor
    first_BT: Tensor
    stop_BT: Tensor
    bounds: Bounds
    gathering: Gathering | None = None
    scoring: Scoring | None = None

    def to(self, device: torch.device) -> CompressedPlan:
        """The same on a device; does not wait for it."""
        disjoint = overlapping = _moved(self.disjoint, device)
        if self.overlapping is not self.disjoint:
            overlapping = _moved(self.overlapping, device)
        gathering = None if self.gathering is None else _moved(self.gathering, device)
        scoring = None if self.scoring is None else _moved(self.scoring, device)
        return replace(
            _moved(self, device), disjoint=disjoint, overlapping=overlapping, gathering=gathering,
            scoring=scoring,
        )  # fmt: skip


@dataclass(frozen=True)
class SequencePlan:
    """Positions and visibility of one batch, or of one shard of its rows.

    Attributes:
        valid_BT: not padding.
        position_BT: position inside the document, 0 in padding.
        start_BT: int32; row of the document's first token among the tokens here and those of the
            window before; 0 where it lies still before; for padding one past the token (sees
            nothing).
        row_start_BT: int32; the same in the whole row, however far before.
        document_BT: number of the document in the batch, 0 .. num_documents - 1; padding runs are
            counted too.
        length_BT: tokens of the document that holds t, wherever they are.
        num_documents: runs in the batch.
        compressed: a plan for every ratio in use.
        shard: the part of every row that is here.
        row_tokens: of whole rows.
    """

    valid_BT: Tensor
    position_BT: Tensor
    start_BT: Tensor
    row_start_BT: Tensor
    document_BT: Tensor
    length_BT: Tensor
    num_documents: int
    compressed: dict[int, CompressedPlan]
    shard: SequenceShard
    row_tokens: int

    def some_queries(self, count: int = 64) -> Tensor:
        """Those of ``count`` positions spread over a row that are here, from the shard's start on.

        On the host: how many they are is known without a device.
        """
        here = self.shard.tokens(self.row_tokens)
        pick = torch.linspace(0, self.row_tokens - 1, min(count, self.row_tokens)).long()
        return pick[(pick >= here.start) & (pick < here.stop)] - here.start

    def to(self, device: torch.device) -> SequencePlan:
        """The same on a device; does not wait for it."""
        there = _moved(self, device)
        compressed = {m: plan.to(device) for m, plan in self.compressed.items()}
        return replace(there, compressed=compressed)


def _moved(plan: P, device: torch.device) -> P:
    tensors = {
        f.name: value.to(device, non_blocking=True)
        for f in fields(plan)  # pyright: ignore[reportArgumentType]
        if isinstance(value := getattr(plan, f.name), Tensor)
    }
    return replace(plan, **tensors)  # pyright: ignore[reportArgumentType]


def build_sequence_plan(
    document_ids_BT: Tensor,
    ratios: tuple[int, ...],
    window: int = 1,
    shard: SequenceShard = SequenceShard(),  # noqa: B008  immutable
) -> SequencePlan:
    """Build the plan of a batch.

    Args:
        document_ids_BT: integer ids of whole rows, -1 for padding; best on the host, where the plan
            is built.
        ratios: compression ratios that layers use.
        window: tokens of the window, the query's own included; counts at a shard's edge only.
        shard: the part of every row that is here; as many of them as divide the row.
    """
    document_ids_BT = document_ids_BT.cpu()
    B, T = document_ids_BT.shape
    here = shard.tokens(T)
    valid_BT = document_ids_BT >= 0
    row_T = torch.arange(T)
    begins_BT = torch.ones(B, T, dtype=torch.bool)
    begins_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    run_start_BT = torch.where(begins_BT, row_T, 0).cummax(dim=1).values
    document_BT = begins_BT.flatten().cumsum(0).view(B, T) - 1
    num_documents = int(document_BT[-1, -1]) + 1
    lengths = torch.bincount(document_BT.flatten(), minlength=num_documents)
    start_BT = torch.where(valid_BT, run_start_BT, row_T + 1)[:, here]
    first_key = max(0, here.start - (window - 1))
    return SequencePlan(
        valid_BT=valid_BT[:, here],
        position_BT=torch.where(valid_BT, row_T - run_start_BT, 0)[:, here],
        start_BT=(start_BT - first_key).clamp(min=0).int(),
        row_start_BT=start_BT.int(),
        document_BT=document_BT[:, here],
        length_BT=lengths[document_BT[:, here]],
        num_documents=num_documents,
        compressed={
            m: _compressed(row_T - run_start_BT, run_start_BT, valid_BT, m, shard) for m in ratios
        },
        shard=shard,
        row_tokens=T,
    )


def _compressed(
    position_BT: Tensor, start_BT: Tensor, valid_BT: Tensor, ratio: int, shard: SequenceShard
) -> CompressedPlan:
    B, T = position_BT.shape
    E, here = max(T // ratio, 1), shard.tokens(T)
    closes_BT = valid_BT & ((position_BT + 1) % ratio == 0)
    count_BT = closes_BT.cumsum(dim=1)  # entries closed at or before t, in the whole row
    target_BT = torch.where(closes_BT, count_BT - 1, E)
    last_BE = torch.full((B, E + 1), -1, dtype=torch.int64)
    last_BE = last_BE.scatter(1, target_BT, torch.arange(T).expand(B, T))[:, :E]
    before_BT = count_BT - closes_BT.long()  # entries closed strictly before t
    first_BT = torch.where(valid_BT, before_BT.gather(1, start_BT), 0)
    stop_BT = torch.where(valid_BT, count_BT, 0)
    scoring = _scoring(first_BT, stop_BT, E, shard) if shard.balanced else None
    first_BT, stop_BT = first_BT[:, here], stop_BT[:, here]
    bounds = _bounds(first_BT, stop_BT, E)
    gathering = None
    if shard.count > 1:
        last_BE, gathering = _owned(last_BE, count_BT, ratio, shard)
    valid_BL = last_BE >= 0
    position_BL = position_BT.gather(1, last_BE.clamp(min=0)) - (ratio - 1)
    position_BL = torch.where(valid_BL, position_BL, 0)
    has_previous_BL = valid_BL & (position_BL > 0)
    disjoint = overlapping = _blocks(last_BE, valid_BL, ratio, here, ratio - 1)
    if here.start:
        last = torch.cat((last_BE[:, :1] - ratio, last_BE), dim=1)
        valid = torch.cat((has_previous_BL[:, :1], valid_BL), dim=1)
        overlapping = replace(_blocks(last, valid, ratio, here, 2 * ratio - 1), lead=1)
    return CompressedPlan(
        ratio=ratio,
        num_entries=E,
        disjoint=disjoint,
        overlapping=overlapping,
        valid_BL=valid_BL,
        has_previous_BL=has_previous_BL,
        position_BL=position_BL,
        first_BT=first_BT.int(),
        stop_BT=stop_BT.int(),
        bounds=bounds,
        gathering=gathering,
        scoring=scoring,
    )


def _bounds(first_BT: Tensor, stop_BT: Tensor, num_entries: int) -> Bounds:
    sees_BT = stop_BT > first_BT
    return Bounds(
        torch.where(sees_BT, first_BT, num_entries).amin(dim=0),
        torch.where(sees_BT, stop_BT, 0).amax(dim=0),
    )


def scoring_work(first_BT: Tensor, stop_BT: Tensor, ranks: int) -> list[int]:
    """Entries that the queries of every half of a shard score, in the order of the row."""
    seen_BPS = (stop_BT - first_BT).view(first_BT.shape[0], 2 * ranks, -1)
    return seen_BPS.sum(dim=(0, 2)).tolist()


def _scoring(
    first_BT: Tensor, stop_BT: Tensor, num_entries: int, shard: SequenceShard
) -> Scoring | None:
    """The rank's share of the queries of whole rows, None where every rank keeps its own."""
    work = scoring_work(first_BT, stop_BT, shard.count)
    shares: list[Share] = balanced_halves(work)
    if shares == own_halves(work):
        return None
    kept, other = shares[shard.index]
    receiver = next(rank for rank, share in enumerate(shares) if share.other == kept ^ 1)
    size = first_BT.shape[1] // len(work)
    there = slice(other * size, (other + 1) * size)
    first_BS, stop_BS = first_BT[:, there], stop_BT[:, there]
    bounds = _bounds(first_BS, stop_BS, num_entries)
    return Scoring(kept % 2, receiver, other // 2, first_BS.int(), stop_BS.int(), bounds)


def _blocks(last_BL: Tensor, valid_BL: Tensor, ratio: int, here: slice, before: int) -> Blocks:
    """Blocks that end at some row positions, read from the shard and some rows before it."""
    (B, L), before = last_BL.shape, min(before, here.start)
    U = before + here.stop - here.start
    tokens_BLM = last_BL[..., None] + torch.arange(1 - ratio, 1) - (here.start - before)
    tokens_BLM = torch.where(valid_BL[..., None], tokens_BLM, U)
    slot_BU = torch.full((B, U + 1), L * ratio, dtype=torch.int64)
    places = torch.arange(L * ratio).expand(B, -1)
    # blocks that do not exist all write to the dropped column U
    slot_BU = slot_BU.scatter(1, tokens_BLM.flatten(1), places)[:, :U]
    return Blocks(tokens_BLM, slot_BU)


def _owned(
    last_BE: Tensor, count_BT: Tensor, ratio: int, shard: SequenceShard
) -> tuple[Tensor, Gathering]:
    """The last tokens of the entries that end in a shard, and how all shards' are put together.

    Two entries end at least ``ratio`` tokens apart, so no shard has more than its length in such
    steps, rounded up; all are padded to that, and every rank sends as much.
    """
    (B, E), T = last_BE.shape, count_BT.shape[1]
    size = T // shard.count
    L = -(-size // ratio)
    ends_BP = count_BT[:, size - 1 :: size]  # entries up to the end of each shard
    begins_BP = torch.nn.functional.pad(ends_BP[:, :-1], (1, 0))
    number_BL = begins_BP[:, shard.index, None] + torch.arange(L)
    exists_BL = number_BL < ends_BP[:, shard.index, None]
    own_BL = last_BE.gather(1, number_BL.clamp(max=E - 1)).masked_fill(~exists_BL, -1)
    F = shard.count * L
    holder_BE = last_BE.clamp(min=0) // size
    source_BE = holder_BE * L + torch.arange(E) - begins_BP.gather(1, holder_BE)
    source_BE = torch.where(last_BE >= 0, source_BE, F)
    target_BF = torch.full((B, F + 1), E, dtype=torch.int64)
    target_BF = target_BF.scatter(1, source_BE, torch.arange(E).expand(B, E))[:, :F]
    return own_BL, Gathering(source_BE, target_BF)
