"""SequencePlan: where every branch may look, built once per batch from document ids.

Window, CSA, HCA, indexer, MTP and balance loss all read it; no layer counts positions itself.
Documents are maximal runs of equal ids in a row; padding has id -1, forms no entries, sees nothing
and is seen by nothing. A plan is built on the host and moved to the device, so that nothing has to
be read back: what loops need as numbers (:class:`Bounds`) stays on the host.
"""

# Legend: B rows, T tokens, E compressed entries of a row (padded to a common count), M tokens of an
# entry's own block
from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

P = TypeVar("P")


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
class CompressedPlan:
    """Compressed entries of one ratio, numbered along the row, document after document.

    A document of n tokens has n // ratio entries; the remainder is dropped (reference B.5). The
    entries that a query may use form one range, those of its document whose last token is not after
    it (B.6). Where entry e has a previous block (``has_previous``), that block is entry e - 1.

    Attributes:
        ratio: tokens per entry (M).
        tokens_BEM: row positions of the tokens of each entry's own block; T (one past the row)
            where there is none.
        slot_BT: the place e * M + j that token t takes in ``tokens``, or E * M where it feeds no
            entry.
        valid_BE: entry exists.
        has_previous_BE: the entry is not its document's first.
        position_BE: position in the document of the block's first token.
        first_BT: first visible entry of query t.
        stop_BT: one past the last visible entry of query t.
        bounds: of these two over all rows.
    """

    ratio: int
    tokens_BEM: Tensor
    slot_BT: Tensor
    valid_BE: Tensor
    has_previous_BE: Tensor
    position_BE: Tensor
    first_BT: Tensor
    stop_BT: Tensor
    bounds: Bounds

    @property
    def num_entries(self) -> int:
        """E, padding included."""
        return self.valid_BE.shape[1]


@dataclass(frozen=True)
class SequencePlan:
    """Positions and visibility of one batch.

    Attributes:
        valid_BT: not padding.
        position_BT: position inside the document, 0 in padding.
        start_BT: row position of the document's first token; for padding one past the token (sees
            nothing).
        document_BT: number of the document in the batch, 0 .. num_documents - 1; padding runs are
            counted too.
        length_BT: tokens of the document that holds t.
        num_documents: runs in the batch.
        compressed: a plan for every ratio in use.
    """

    valid_BT: Tensor
    position_BT: Tensor
    start_BT: Tensor
    document_BT: Tensor
    length_BT: Tensor
    num_documents: int
    compressed: dict[int, CompressedPlan]

    def to(self, device: torch.device) -> SequencePlan:
        """The same on a device; does not wait for it."""
        there = _moved(self, device)
        compressed = {m: _moved(plan, device) for m, plan in self.compressed.items()}
        return replace(there, compressed=compressed)


def _moved(plan: P, device: torch.device) -> P:
    tensors = {
        f.name: value.to(device, non_blocking=True)
        for f in fields(plan)  # pyright: ignore[reportArgumentType]
        if isinstance(value := getattr(plan, f.name), Tensor)
    }
    return replace(plan, **tensors)  # pyright: ignore[reportArgumentType]


def build_sequence_plan(document_ids_BT: Tensor, ratios: tuple[int, ...]) -> SequencePlan:
    """Build the plan of a batch.

    Args:
        document_ids_BT: integer ids, -1 for padding; best on the host, where the plan is built.
        ratios: compression ratios that layers use.
    """
    document_ids_BT = document_ids_BT.cpu()
    B, T = document_ids_BT.shape
    valid_BT = document_ids_BT >= 0
    row_T = torch.arange(T)
    begins_BT = torch.ones(B, T, dtype=torch.bool)
    begins_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    run_start_BT = torch.where(begins_BT, row_T, 0).cummax(dim=1).values
    document_BT = begins_BT.flatten().cumsum(0).view(B, T) - 1
    num_documents = int(document_BT[-1, -1]) + 1
    lengths = torch.bincount(document_BT.flatten(), minlength=num_documents)
    return SequencePlan(
        valid_BT=valid_BT,
        position_BT=torch.where(valid_BT, row_T - run_start_BT, 0),
        start_BT=torch.where(valid_BT, run_start_BT, row_T + 1),
        document_BT=document_BT,
        length_BT=lengths[document_BT],
        num_documents=num_documents,
        compressed={
            m: _compressed(row_T - run_start_BT, run_start_BT, valid_BT, m) for m in ratios
        },
    )


def _compressed(
    position_BT: Tensor, start_BT: Tensor, valid_BT: Tensor, ratio: int
) -> CompressedPlan:
    B, T = position_BT.shape
    E = max(T // ratio, 1)
    row_T = torch.arange(T)
    closes_BT = valid_BT & ((position_BT + 1) % ratio == 0)
    count_BT = closes_BT.cumsum(dim=1)  # entries closed at or before t, in the whole row
    target_BT = torch.where(closes_BT, count_BT - 1, E)
    last_BE = torch.full((B, E + 1), -1, dtype=torch.int64)
    last_BE = last_BE.scatter(1, target_BT, row_T.expand(B, T))[:, :E]
    valid_BE = torch.arange(E) < count_BT[:, -1:]
    tokens_BEM = last_BE[..., None] + torch.arange(1 - ratio, 1)
    tokens_BEM = torch.where(valid_BE[..., None], tokens_BEM, T)
    slot_BT = torch.full((B, T + 1), E * ratio, dtype=torch.int64)
    places = torch.arange(E * ratio).expand(B, -1)
    slot_BT = slot_BT.scatter(1, tokens_BEM.flatten(1), places)[:, :T]
    # padding entries all wrote to the dropped column T
    position_BE = position_BT.gather(1, last_BE.clamp(min=0)) - (ratio - 1)
    position_BE = torch.where(valid_BE, position_BE, 0)
    before_BT = count_BT - closes_BT.long()  # entries closed strictly before t
    first_BT = torch.where(valid_BT, before_BT.gather(1, start_BT), 0)
    stop_BT = torch.where(valid_BT, count_BT, 0)
    sees_BT = stop_BT > first_BT
    bounds = Bounds(
        torch.where(sees_BT, first_BT, E).amin(dim=0),
        torch.where(sees_BT, stop_BT, 0).amax(dim=0),
    )
    return CompressedPlan(
        ratio=ratio,
        tokens_BEM=tokens_BEM,
        slot_BT=slot_BT,
        valid_BE=valid_BE,
        has_previous_BE=valid_BE & (position_BE > 0),
        position_BE=position_BE,
        first_BT=first_BT,
        stop_BT=stop_BT,
        bounds=bounds,
    )
