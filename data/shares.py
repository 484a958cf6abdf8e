"""Weighted sources take turns by tokens: each has its share of every stretch of a run.

A source gives its documents in its own order, in *pieces*: a whole document, or of one that is
longer than a row the next row of it, where packing cuts it anyway. The piece with which a source
has given n tokens is marked ``(n - piece / 2) / weight``, and the pieces of all sources come in the
order of their marks. So there are no rounds and no rounding: a document of any length gets the
share that was asked for, over as many pools as it takes.

Bound. Up to a mark m every source has given ``weight * m`` tokens, give or take half a piece. With
longest pieces L, the tokens n of source s among N in all obey at any moment

    |n_s - weight_s * N| <= (L_s + weight_s * sum of all L) / 2,

and so twice that over any stretch, such as a pool. L is at most a row, and at most the longest
document of the source. Where rows get longer within a pool whose documents are truncated, add what
shorter rows had left out of it: documents that nobody has read come whole (data/position.py).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from data.config import LongDocuments
from data.errors import ConfigError
from data.packing import NO_CUT, Cut, Span, kept_length
from data.pool import Cursor, Document, DocumentSource, Fim, as_trained

CHUNK = 32  # documents drawn at a time
_BARREN = 100_000  # documents in a row that are all skipped: an error


class Taken(NamedTuple):
    """What stands in a pool, and where the sources stand behind it."""

    documents: list[Document]
    spans: list[Span]
    cursors: tuple[Cursor, ...]
    cut: Cut


class Turns:
    """Gives the pools of weighted sources one after the other.

    Args:
        sources: what is drawn from.
        weights: shares of the tokens, one for each source.
        fim: fill-in-the-middle.
        long: what becomes of documents longer than a row. What is left out counts for no share.
    """

    def __init__(
        self,
        sources: Sequence[DocumentSource],
        weights: Sequence[float],
        fim: Fim,
        long: LongDocuments = LongDocuments.split,
    ) -> None:
        self._sources = list(zip(sources, weights, strict=True))
        self._fim = fim
        self._long = long
        self._queues = self._queues_at([Cursor()] * len(self._sources))

    def take(
        self, cursors: Sequence[Cursor], num_documents: int, seq_len: int, num_rows: int = 0
    ) -> Taken:
        """Pieces of so many documents, at least.

        Args:
            cursors: where the sources stand; behind the pool taken last nothing is read again.
            num_documents: that stand in the pool, whole or in part.
            seq_len: tokens of a row.
            num_rows: rows that the pieces fill at least.
        """
        if [queue.cursor for queue in self._queues] != list(cursors):
            self._queues = self._queues_at(cursors)
        tokens = 0
        marks = [(queue.mark(seq_len), place) for place, queue in enumerate(self._queues)]
        heapq.heapify(marks)
        documents: list[Document] = []
        spans: list[Span] = []
        last: dict[int, int] = {}  # source -> its newest document in this pool
        while True:
            place = marks[0][1]
            queue = self._queues[place]
            document, start, stop = queue.piece(seq_len)
            if place in last and documents[last[place]] is document:
                spans[last[place]] = spans[last[place]]._replace(stop=stop)
            elif len(documents) >= num_documents and tokens >= num_rows * seq_len:
                cut = sum((queue.forget_cut() for queue in self._queues), NO_CUT)
                after = tuple(queue.cursor for queue in self._queues)
                return Taken(documents, spans, after, cut)
            else:
                last[place] = len(documents)
                spans.append(Span(len(documents), start, stop))
                documents.append(document)
            queue.give(stop - start, seq_len)
            tokens += stop - start
            heapq.heapreplace(marks, (queue.mark(seq_len), place))

    def _queues_at(self, cursors: Sequence[Cursor]) -> list[_Queue]:
        return [
            _Queue(source, weight, self._fim, self._long, cursor)
            for (source, weight), cursor in zip(self._sources, cursors, strict=True)
        ]


class _Queue:
    """The documents to come of one source."""

    def __init__(
        self,
        source: DocumentSource,
        weight: float,
        fim: Fim,
        long: LongDocuments,
        cursor: Cursor,
    ) -> None:
        self._source = source
        self._weight = weight
        self._fim = fim
        self._long = long
        self._cut = Cut()
        self._ready: deque[tuple[int, Document]] = deque()
        self._next = cursor.draw
        self.cursor = cursor

    def piece(self, seq_len: int) -> tuple[Document, int, int]:
        """The next piece: of which document, from where to where."""
        for _ in range(_BARREN):
            if not self._ready:
                self._draw()
            number, document = self._ready[0]
            start, kept = self.cursor.offset, kept_length(document.length, seq_len, self._long)
            if start < kept:
                return document, start, min(kept, start + seq_len)
            self._ready.popleft()
            self._cut += Cut(1, document.length)
            self.cursor = Cursor(number + 1, 0, self.cursor.tokens)
        raise ConfigError(
            f"data.packing.long_documents={self._long.value}: the last {_BARREN} documents of"
            f" data.sources.{self._source.name} are longer than a row of {seq_len} tokens"
        )

    def mark(self, seq_len: int) -> float:
        """Where the next piece stands in the order of all."""
        _, start, stop = self.piece(seq_len)
        return (self.cursor.tokens + (stop - start) / 2) / self._weight

    def give(self, count: int, seq_len: int) -> None:
        """The next piece, of so many tokens, is given."""
        number, document = self._ready[0]
        offset, tokens = self.cursor.offset + count, self.cursor.tokens + count
        if offset < (kept := kept_length(document.length, seq_len, self._long)):
            self.cursor = Cursor(number, offset, tokens)
            return
        self._ready.popleft()
        self.cursor = Cursor(number + 1, 0, tokens)
        if kept < document.length:
            self._cut += Cut(1, document.length - kept)

    def forget_cut(self) -> Cut:
        """What was left out of long documents since the last call."""
        cut, self._cut = self._cut, Cut()
        return cut

    def _draw(self) -> None:
        drawn = self._source.draw(self._next, CHUNK)
        documents = as_trained([document for _, document in drawn], self._fim)
        self._ready.extend(zip([number for number, _ in drawn], documents, strict=True))
        self._next = drawn[-1][0] + 1
