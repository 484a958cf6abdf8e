"""The rows of an optimizer step: planned everywhere, read from disk only where they are used."""

# Legend: B rows, T tokens of a row, K prediction depths, N tokens of a span
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch

from data.batch import IGNORE, Batch, BatchCounts
from data.packing import NO_CUT, Cut, Row, Span


class DocumentName(NamedTuple):
    """A document in one pass through its source.

    Attributes:
        source: name of the source.
        document: its number there; of a store among the training documents, of a stream its place.
        epoch: number of the pass, from 0.
    """

    source: str
    document: int
    epoch: int


class Sample(NamedTuple):
    """Tokens ``start .. stop - 1`` of a document, as they stand in a row."""

    source: str
    document: int
    epoch: int
    start: int
    stop: int


class RowDocuments(Protocol):
    """The documents that rows refer to."""

    lengths: np.ndarray

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens of a document; int64."""
        ...

    def name(self, document: int) -> DocumentName:
        """What a document is called."""
        ...


class PackedRow(NamedTuple):
    """One row, not yet read from disk."""

    documents: RowDocuments
    spans: Row


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of an optimizer step.

    Attributes:
        counts: normalisers of the whole batch.
        rows: in order; ranks and microbatches take slices of them.
        seq_len: tokens of a row.
        target_bytes: bytes of text that the targets of the first depth stand for; validation only.
        read_tokens: tokens of each source that were read up to the end of this batch; training
            only.
        cut: what became of documents longer than a row up to the end of this batch; training only.
    """

    counts: BatchCounts
    rows: list[PackedRow]
    seq_len: int
    target_bytes: int = 0
    read_tokens: Mapping[str, int] = field(default_factory=dict)
    cut: Cut = NO_CUT

    def source_shares(self) -> dict[str, float]:
        """Fractions of the tokens read so far; empty where there is one source."""
        total = max(1, sum(self.read_tokens.values()))
        several = len(self.read_tokens) > 1
        return {name: n / total for name, n in self.read_tokens.items()} if several else {}

    def share_past(self, tokens: int) -> float:
        """Fraction of tokens with at least ``tokens`` tokens of their own piece before them."""
        lengths = [span.length for row in self.rows for span in row.spans]
        return sum(max(0, n - tokens) for n in lengths) / max(1, sum(lengths))

    def samples(self, row: int) -> list[Sample]:
        """What stands in a row, in order."""
        documents, spans = self.rows[row]
        return [Sample(*documents.name(s.document), s.start, s.stop) for s in spans]

    def batch(self, start: int, stop: int) -> Batch:
        """Read rows ``start .. stop - 1``.

        Raises:
            ValueError: the batch has no such rows.
        """
        if not 0 <= start < stop <= len(self.rows):
            raise ValueError(f"rows {start} to {stop} of a batch of {len(self.rows)} rows")
        depths = len(self.counts.targets_K)
        B, T = stop - start, self.seq_len
        ids_BT = np.zeros((B, T), dtype=np.int64)
        documents_BT = np.full((B, T), -1, dtype=np.int64)
        labels_BTK = np.full((B, T, depths), IGNORE, dtype=np.int64)
        for b, (documents, spans) in enumerate(self.rows[start:stop]):
            t = 0
            for number, (document, first, last) in enumerate(spans):
                n = last - first
                token_N = documents.tokens(document, first, last + depths)
                ids_BT[b, t : t + n] = token_N[:n]
                documents_BT[b, t : t + n] = number
                for k in range(depths):
                    label_N = token_N[1 + k : 1 + k + n]
                    labels_BTK[b, t : t + len(label_N), k] = label_N
                t += n
        ids, documents, labels = map(torch.from_numpy, (ids_BT, documents_BT, labels_BTK))
        return Batch(ids, documents, labels)


def count(rows: Sequence[PackedRow], depths: int) -> BatchCounts:
    """Normalisers of some rows, from the packing alone.

    Args:
        rows: not yet read.
        depths: K, prediction depths.
    """
    spans = [(s, int(row.documents.lengths[s.document])) for row in rows for s in row.spans]
    return BatchCounts(
        tokens=sum(span.length for span, _ in spans),
        targets_K=tuple(_count_targets(spans, depth) for depth in range(depths)),
        documents=len(spans),
    )


def _count_targets(spans: Sequence[tuple[Span, int]], depth: int) -> int:
    """Positions with a label ``depth`` + 1 tokens ahead, in spans of documents of known length."""
    return sum(max(0, min(span.stop, length - 1 - depth) - span.start) for span, length in spans)
