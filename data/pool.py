"""What pools are made of: documents that sources give, and how they are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from data.fim import EXTRA_TOKENS, FimCut, fim_cut, fim_tokens
from data.global_batch import DocumentName
from data.packing import NO_CUT, Cut, Span, whole_documents
from data.token_store import TokenDocuments


@dataclass(frozen=True)
class Drawn:
    """One document as drawn: where it is stored, its key in this pass, and what it is called."""

    documents: TokenDocuments
    index: int
    key: int
    name: DocumentName


class DocumentSource(Protocol):
    """What pools draw from.

    Attributes:
        name: for messages.
        names: of the configured sources whose documents it gives.
    """

    name: str
    names: Sequence[str]

    def draw(self, start: int, count: int) -> list[tuple[int, Drawn]]:
        """Documents of a source without end, in order, with the numbers of their draws.

        Some from draw ``start`` on: at least one, at most ``count``. Draws without a document (a
        stream's that are not trained on) are passed over.
        """
        ...

    def draw_epoch(self, epoch: int, start: int, count: int) -> list[Drawn] | None:
        """Places ``start .. start + count - 1`` of one pass; fewer at its end, None after it."""
        ...

    def find(self, name: DocumentName) -> Drawn:
        """A document by its name, as it was drawn in its pass."""
        ...


class Cursor(NamedTuple):
    """Where a weighted source stands (data/shares.py), or a pass over sources without weights.

    Attributes:
        draw: number of its next document, or of the one that was begun; of a pass the place.
        offset: tokens of that document that were given.
        tokens: given since the start of the run.
    """

    draw: int = 0
    offset: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Fim:
    """Fill-in-the-middle of a run.

    Attributes:
        rate: ``data.fim.rate``.
        ids: the tokenizer's ids, where the rate is above 0.
    """

    rate: float = 0.0
    ids: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Document:
    """A document as it is trained on.

    Attributes:
        drawn: what is stored.
        cut: where fill-in-the-middle cuts it, if it does.
        length: tokens, those of fill-in-the-middle included.
    """

    drawn: Drawn
    cut: FimCut | None
    length: int


def as_trained(drawn: Sequence[Drawn], fim: Fim) -> list[Document]:
    """Documents with their cuts and lengths; each store is asked once."""
    length_N = np.empty(len(drawn), dtype=np.int64)
    stores = {id(d.documents): d.documents for d in drawn}
    for identity, documents in stores.items():
        where = [i for i, d in enumerate(drawn) if id(d.documents) == identity]
        length_N[where] = documents.lengths(np.array([drawn[i].index for i in where], np.int64))
    out = []
    for d, length in zip(drawn, length_N.tolist(), strict=True):
        cut = fim_cut(length, fim.rate, d.key) if fim.ids is not None else None
        out.append(Document(d, cut, length + (EXTRA_TOKENS if cut else 0)))
    return out


class Pool:
    """Some documents, or parts of them, inside which rows are filled and shuffled.

    Args:
        documents: as they are trained on.
        fim_ids: the tokenizer's ids for fill-in-the-middle.
        key: of the pool, for the order of its rows.
        spans: the parts that stand in this pool, disjoint; None: the whole documents.
        after: where the sources stand behind this pool.
        cut: what was left out of long documents when they were drawn.

    Attributes:
        lengths: tokens of the whole documents; int64.
        spans: the parts that stand in this pool.
        after: as given.
        cut: as given.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        fim_ids: tuple[int, int, int] | None,
        key: int,
        spans: list[Span] | None = None,
        after: tuple[Cursor, ...] = (),
        cut: Cut = NO_CUT,
    ) -> None:
        self.key = key
        self.after = after
        self.cut = cut
        self._documents = documents
        self._fim_ids = fim_ids
        self.lengths = np.array([d.length for d in documents], dtype=np.int64)
        self.spans = whole_documents(self.lengths.tolist()) if spans is None else spans

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens ``start .. stop - 1`` of a document, fewer at its end; int64."""
        drawn, cut = self._documents[document].drawn, self._documents[document].cut
        if cut is None or self._fim_ids is None:
            return drawn.documents.tokens(drawn.index, start, stop)
        return fim_tokens(drawn.documents, drawn.index, cut, self._fim_ids, start, stop)

    def name(self, document: int) -> DocumentName:
        """Which document of which source, in which pass."""
        return self._documents[document].drawn.name
