"""Documents into rows: cut to the row's length, remainders packed by best fit.

A document longer than a row fills whole rows with its leading tokens; what is left of each document
is placed, longest first, into the row with the least room that still holds it (reference C.4).
Nothing is dropped: every token of a pool stands in exactly one row, and padding fills the rest. The
result depends only on the lengths.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """Tokens ``start .. stop - 1`` of a document of a pool."""

    document: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Tokens."""
        return self.stop - self.start


Row = tuple[Span, ...]


def whole_documents(lengths: Iterable[int]) -> list[Span]:
    """One span for each document."""
    return [Span(document, 0, length) for document, length in enumerate(lengths) if length]


def pack(spans: Sequence[Span], seq_len: int) -> list[Row]:
    """Rows that hold all spans.

    Args:
        spans: disjoint parts of documents.
        seq_len: tokens of a row.

    Returns:
        First the rows that one long document fills, then the shared ones.
    """
    rows: list[Row] = []
    rest: list[Span] = []
    for document, start, stop in spans:
        whole = (stop - start) // seq_len
        cuts = [start + i * seq_len for i in range(whole + 1)]
        rows += [(Span(document, a, a + seq_len),) for a in cuts[:-1]]
        if cuts[-1] < stop:
            rest.append(Span(document, cuts[-1], stop))
    return rows + _best_fit(rest, seq_len)


def unread(rows: Iterable[Row]) -> list[Span]:
    """The spans of some rows, those that continue each other joined, in order of document."""
    spans: list[Span] = []
    for span in sorted(span for row in rows for span in row):
        if spans and spans[-1].document == span.document and spans[-1].stop == span.start:
            spans[-1] = spans[-1]._replace(stop=span.stop)
        else:
            spans.append(span)
    return spans


def _best_fit(spans: list[Span], seq_len: int) -> list[Row]:
    rows: list[list[Span]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for span in sorted(spans, key=lambda s: (-s.length, s)):
        place = bisect_left(room, (span.length, -1))
        if place == len(room):
            rows.append([])
            free, row = seq_len, len(rows) - 1
        else:
            free, row = room.pop(place)
        rows[row].append(span)
        if free > span.length:
            insort(room, (free - span.length, row))
    return [tuple(row) for row in rows]
