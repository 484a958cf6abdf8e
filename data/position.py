"""Where a run stands in its data, and the rows of a pool that are still to come there.

Another row length in the middle of a pool: the rows that were taken stay taken; the tokens of the
others, pieces that continue each other joined, are packed anew with the new length (documents of
the pool that are not split: whole, as nobody has read of them). The lengths and row counts that
came before in this pool are part of the position.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from data.config import LongDocuments
from data.keyed import mix, permute
from data.packing import NO_CUT, Cut, Row, keep, pack, unread, whole_documents
from data.pool import Cursor, Pool


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        epoch: pass over the data.
        pool: number in the epoch.
        row: rows taken from the pool with ``seq_len``.
        seq_len: tokens of a row; 0 before the first.
        earlier: (tokens of a row, rows taken) before the row length changed inside this pool.
        cursors: where the sources stood before this pool: each weighted one, or the one pass.
    """

    epoch: int = 0
    pool: int = 0
    row: int = 0
    seq_len: int = 0
    earlier: tuple[tuple[int, int], ...] = ()
    cursors: tuple[Cursor, ...] = ()

    @property
    def first_seq_len(self) -> int:
        """Tokens of a row when this pool began."""
        return self.earlier[0][0] if self.earlier else self.seq_len

    def at(self, seq_len: int) -> Position:
        """The same place, going on with another row length."""
        if seq_len == self.seq_len:
            return self
        taken = ((self.seq_len, self.row),) if self.row else ()
        return replace(self, row=0, seq_len=seq_len, earlier=self.earlier + taken)

    def next_pool(self, cursors: tuple[Cursor, ...]) -> Position:
        """The start of the pool that follows in this epoch."""
        return Position(self.epoch, self.pool + 1, 0, self.seq_len, (), cursors)

    def next_epoch(self, cursors: tuple[Cursor, ...]) -> Position:
        """The start of the next pass."""
        return Position(self.epoch + 1, 0, 0, self.seq_len, (), cursors)


def rows_of(pool: Pool, position: Position, long: LongDocuments) -> tuple[list[Row], Cut]:
    """The rows of a pool at a position's row length, those taken earlier left out.

    Args:
        pool: the documents.
        position: in this pool.
        long: what becomes of documents longer than a row.

    Returns:
        The rows, and what this row length did to long documents, less what an earlier one did to
        those that nobody has read: unless they are split, they are looked at anew, whole.
    """
    spans, read, undone = pool.spans, set[int](), NO_CUT
    for number, (seq_len, taken) in enumerate(position.earlier):
        kept, _ = keep(spans, seq_len, long)
        rows = _shuffled(pack(kept, seq_len), mix(pool.key, number))
        if long is LongDocuments.split:
            spans = unread(rows[taken:])
        else:
            read |= {span.document for row in rows[:taken] for span in row}
            whole = whole_documents(pool.lengths.tolist())
            spans = [span for span in whole if span.document not in read]
            undone = keep(spans, seq_len, long)[1]
    kept, cut = keep(spans, position.seq_len, long)
    rows = _shuffled(pack(kept, position.seq_len), mix(pool.key, len(position.earlier)))
    return rows, cut - undone if position.earlier else cut + pool.cut


def _shuffled(rows: list[Row], key: int) -> list[Row]:
    order = permute(np.arange(len(rows)), len(rows), key) if rows else np.empty(0, np.int64)
    return [rows[i] for i in order.tolist()]
