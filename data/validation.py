"""The held-out documents as rows, with the bytes of text that each row's targets stand for.

The first token of a document is never a target (there is no beginning-of-document token) and the
end-of-document token stands for no byte. All other bytes of a document belong to exactly one
target, so nats divided by bytes is exact whatever the tokenizer, and :meth:`ValidationSet.text`
gives the same bytes to other compressors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from data.global_batch import DocumentName
from data.keyed import mix, permute
from data.packing import Row, Span, pack, whole_documents


class ValidationSet:
    """Documents in memory, as a pool of which rows are packed.

    Args:
        ids: of each document, EOS included.
        byte_ends: for each document where its tokens end in its bytes.
        texts: UTF-8 of each document.
        seed: orders the rows, so that the first ones are a sample of all documents.
    """

    def __init__(
        self,
        ids: Sequence[np.ndarray],
        byte_ends: Sequence[np.ndarray],
        texts: Sequence[bytes],
        seed: int,
    ) -> None:
        self._ids = list(ids)
        self._byte_ends = list(byte_ends)
        self._texts = list(texts)
        self._seed = seed
        self.lengths = np.array([len(document) for document in ids], dtype=np.int64)

    @property
    def num_bytes(self) -> int:
        """Text of all documents."""
        return sum(map(len, self._texts))

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens ``start .. stop - 1`` of a document, fewer at its end; int64."""
        return self._ids[document][start:stop]

    def longest(self, most: int, min_tokens: int) -> list[np.ndarray]:
        """The longest documents of at least so many tokens, int64 ids, the longest first."""
        order = np.argsort(-self.lengths, kind="stable")[:most]
        return [self._ids[i].astype(np.int64) for i in order if self.lengths[i] >= min_tokens]

    def name(self, document: int) -> DocumentName:
        """Its number among the held-out documents of all sources."""
        return DocumentName("validation", document, 0)

    def rows(self, seq_len: int, num_tokens: int) -> list[Row]:
        """Rows for an evaluation, always the same.

        Args:
            seq_len: tokens of a row.
            num_tokens: of the rows together, padding included, rounded up to a row; 0 = all.
        """
        rows = pack(whole_documents(self.lengths.tolist()), seq_len)
        order = permute(np.arange(len(rows)), len(rows), mix(self._seed, len(rows)))
        wanted = math.ceil(num_tokens / seq_len) if num_tokens else len(rows)
        return [rows[i] for i in order[:wanted].tolist()]

    def target_bytes(self, rows: Sequence[Row]) -> int:
        """Bytes of text that the targets of some rows stand for (first prediction depth)."""
        return sum(b - a for row in rows for _, a, b in map(self._scored, row))

    def text(self, rows: Sequence[Row]) -> bytes:
        """Those bytes, in order of document and position."""
        spans = sorted(span for row in rows for span in row)
        return b"".join(self._texts[d][a:b] for d, a, b in map(self._scored, spans))

    def documents_read(self, rows: Sequence[Row]) -> bytes:
        """The bytes of documents that some rows hold: :meth:`text` with first tokens.

        Equal for equal documents of a whole split, whatever the tokenizer and the rows' length.
        """
        spans = sorted(span for row in rows for span in row)
        parts = ((d, 0 if s.start == 0 else a, b) for s in spans for d, a, b in [self._scored(s)])
        return b"".join(self._texts[d][a:b] for d, a, b in parts)

    def beginning(self, most: int) -> bytes:
        """The first bytes of the first document that holds more than white space; maybe none."""
        return next((text[:most] for text in self._texts if text.strip()), b"")

    def _scored(self, span: Span) -> tuple[int, int, int]:
        """Document and byte range of the targets of a span."""
        ends = self._byte_ends[span.document]
        last = min(span.stop, len(ends) - 1)
        return span.document, int(ends[span.start]), int(ends[last])
