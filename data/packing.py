"""Documents into rows: cut to the row's length, remainders packed by best fit.

A document longer than a row fills whole rows with its leading tokens; what is left of each document
is placed, longest first, into the row with the least room that still holds it (reference C.4).
Every token given stands in exactly one row, and padding fills the rest. The result depends only on
the lengths. What else may become of a document longer than a row, :func:`keep` does beforehand and
counts.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data.config import LongDocuments


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


@dataclass(frozen=True)
class Cut:
    """What ``data.packing.long_documents`` did, added up.

    Attributes:
        documents: documents, or parts of them, that were longer than a row.
        tokens: of them that are not trained on.
    """

    documents: int = 0
    tokens: int = 0

    def __add__(self, other: Cut) -> Cut:
        """Both."""
        return Cut(self.documents + other.documents, self.tokens + other.tokens)

    def __sub__(self, other: Cut) -> Cut:
        """Without what turned out not to be."""
        return Cut(self.documents - other.documents, self.tokens - other.tokens)


def whole_documents(lengths: Iterable[int]) -> list[Span]:
    """One span for each document."""
    return [Span(document, 0, length) for document, length in enumerate(lengths) if length]


NO_CUT = Cut()


def kept_length(length: int, seq_len: int, long: LongDocuments) -> int:
    """Leading tokens of a document (or of a part of one) that are trained on in such rows."""
    if length <= seq_len or long is LongDocuments.split:
        return length
    return seq_len if long is LongDocuments.truncate else 0


def keep(spans: Sequence[Span], seq_len: int, long: LongDocuments) -> tuple[list[Span], Cut]:
    """What of some spans is trained on in rows of a length, and what that did to long ones."""
    kept: list[Span] = []
    cut = Cut()
    for span in spans:
        length = kept_length(span.length, seq_len, long)
        if span.length > seq_len:
            cut += Cut(1, span.length - length)
        if length:
            kept.append(span._replace(stop=span.start + length))
    return kept, cut


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
