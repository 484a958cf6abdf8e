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
document of the source.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from data.packing import Span
from data.pool import Cursor, Document, DocumentSource, Fim, as_trained

CHUNK = 32  # documents drawn at a time


class Taken(NamedTuple):
    """What stands in a pool, and where the sources stand behind it."""

    documents: list[Document]
    spans: list[Span]
    cursors: tuple[Cursor, ...]


class Turns:
    """Gives the pools of weighted sources one after the other.

    Args:
        sources: what is drawn from.
        weights: shares of the tokens, one for each source.
        fim: fill-in-the-middle.
    """

    def __init__(
        self, sources: Sequence[DocumentSource], weights: Sequence[float], fim: Fim
    ) -> None:
        self._sources = list(zip(sources, weights, strict=True))
        self._fim = fim
        self._queues = [_Queue(s, w, fim, Cursor()) for s, w in self._sources]

    def take(self, cursors: Sequence[Cursor], num_documents: int, seq_len: int) -> Taken:
        """Pieces of so many documents.

        Args:
            cursors: where the sources stand; behind the pool taken last nothing is read again.
            num_documents: that stand in the pool, whole or in part.
            seq_len: tokens of a row.
        """
        if [queue.cursor for queue in self._queues] != list(cursors):
            self._queues = [
                _Queue(source, weight, self._fim, cursor)
                for (source, weight), cursor in zip(self._sources, cursors, strict=True)
            ]
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
            elif len(documents) == num_documents:
                return Taken(documents, spans, tuple(queue.cursor for queue in self._queues))
            else:
                last[place] = len(documents)
                spans.append(Span(len(documents), start, stop))
                documents.append(document)
            queue.give(stop - start)
            heapq.heapreplace(marks, (queue.mark(seq_len), place))


class _Queue:
    """The documents to come of one source."""

    def __init__(self, source: DocumentSource, weight: float, fim: Fim, cursor: Cursor) -> None:
        self._source = source
        self._weight = weight
        self._fim = fim
        self._ready: deque[tuple[int, Document]] = deque()
        self._next = cursor.draw
        self.cursor = cursor

    def piece(self, seq_len: int) -> tuple[Document, int, int]:
        """The next piece: of which document, from where to where."""
        if not self._ready:
            drawn = self._source.draw(self._next, CHUNK)
            documents = as_trained([document for _, document in drawn], self._fim)
            self._ready.extend(zip([number for number, _ in drawn], documents, strict=True))
            self._next = drawn[-1][0] + 1
        document, start = self._ready[0][1], self.cursor.offset
        return document, start, min(document.length, start + seq_len)

    def mark(self, seq_len: int) -> float:
        """Where the next piece stands in the order of all."""
        _, start, stop = self.piece(seq_len)
        return (self.cursor.tokens + (stop - start) / 2) / self._weight

    def give(self, count: int) -> None:
        """The next piece, of so many tokens, is given."""
        number, document = self._ready[0]
        offset, tokens = self.cursor.offset + count, self.cursor.tokens + count
        if offset < document.length:
            self.cursor = Cursor(number, offset, tokens)
        else:
            self._ready.popleft()
            self.cursor = Cursor(number + 1, 0, tokens)
