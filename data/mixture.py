"""Which documents a pool holds: sources, weights, epochs.

A source counts its draws 0, 1, 2 ...; draw j is place ``j mod N`` of its pass ``j div N`` in that
pass's own permutation. A pool takes the next draws of every source.

* No weights: all sources together are one long list, every document once per epoch. Pool p holds
  places ``p*P .. p*P + P - 1`` of the epoch's permutation, the last pool fewer.
* Weights: every pool holds the same number of documents of a source, so many that its tokens have
  the source's share (by the mean length of its documents, at least one). Each source passes through
  its own epochs, so that the mixture has a single epoch without end.

A stream stands for itself in its own order: place j is its j-th document. Its first documents are
its validation text and skipped; later documents that repeat them are left out of their pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data.errors import ConfigError
from data.fim import EXTRA_TOKENS, FimCut, fim_cut, fim_tokens
from data.global_batch import DocumentName
from data.keyed import mix, permute
from data.token_store import StoredDocuments, TokenDocuments

_ORDER, _FIM = 1, 2  # purposes of keys


@dataclass(frozen=True)
class Drawn:
    """One document of a pool: where it is stored, its key in this pass, and what it is called."""

    documents: TokenDocuments
    index: int
    key: int
    name: DocumentName


class Source(Protocol):
    """What pools draw from.

    Attributes:
        name: for messages.
        names: of the configured sources whose documents it gives.
    """

    name: str
    names: Sequence[str]

    def draw(self, start: int, count: int) -> list[Drawn]:
        """Draws ``start .. start + count - 1`` of a source without end."""
        ...

    def draw_epoch(self, epoch: int, start: int, count: int) -> list[Drawn] | None:
        """Places ``start .. start + count - 1`` of one pass; fewer at its end, None after it."""
        ...

    def find(self, name: DocumentName) -> Drawn:
        """A document by its name, as it was drawn in its pass."""
        ...

    def mean_length(self) -> float:
        """Tokens of an average document."""
        ...


class StoreSource:
    """Random access: token stores as one list of documents.

    Args:
        name: for messages.
        parts: source -> the training documents of its store, in a fixed order.
        seed: of the run.
    """

    def __init__(self, name: str, parts: Mapping[str, StoredDocuments], seed: int) -> None:
        self.name = name
        self._parts = list(parts.values())
        self.names: Sequence[str] = tuple(parts)
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)
        self._count = int(self._ends[-1])
        self._key = mix(seed, *name.encode())

    def draw(self, start: int, count: int) -> list[Drawn]:
        """Draws of passes one after the other."""
        out: list[Drawn] = []
        while count > 0:
            epoch, place = divmod(start, self._count)
            drawn = self.draw_epoch(epoch, place, count)
            assert drawn is not None
            out += drawn
            start, count = start + len(drawn), count - len(drawn)
        return out

    def draw_epoch(self, epoch: int, start: int, count: int) -> list[Drawn] | None:
        """Places of one pass's permutation."""
        places = np.arange(start, min(start + count, self._count))
        if not len(places):
            return None
        index_N = permute(places, self._count, mix(self._key, _ORDER, epoch))
        part_N = np.searchsorted(self._ends, index_N, side="right")
        return [
            self._drawn(part, place - self._begin(part), epoch)
            for part, place in zip(part_N.tolist(), index_N.tolist(), strict=True)
        ]

    def find(self, name: DocumentName) -> Drawn:
        """A document by its name.

        Raises:
            ValueError: there is none.
        """
        part = self.names.index(name.source)
        if not 0 <= name.document < len(self._parts[part]):
            raise ConfigError(
                f"data.sources.{name.source} has {len(self._parts[part])} training documents, no"
                f" number {name.document}"
            )
        return self._drawn(part, name.document, name.epoch)

    def mean_length(self) -> float:
        """Tokens of an average document."""
        return sum(part.num_tokens for part in self._parts) / self._count

    def _drawn(self, part: int, index: int, epoch: int) -> Drawn:
        key = mix(self._key, _FIM, epoch, self._begin(part) + index)
        name = DocumentName(self.names[part], index, epoch)
        return Drawn(self._parts[part], index, key, name)

    def _begin(self, part: int) -> int:
        return int(self._ends[part - 1]) if part else 0


class Pool:
    """Some documents as they are trained on, fill-in-the-middle applied.

    Args:
        drawn: the documents.
        fim_rate: ``data.fim.rate``.
        fim_ids: the tokenizer's ids, where the rate is above 0.
        key: of the pool, for the order of its rows.
    """

    def __init__(
        self,
        drawn: list[Drawn],
        fim_rate: float,
        fim_ids: tuple[int, int, int] | None,
        key: int,
    ) -> None:
        self.key = key
        self._drawn = drawn
        self._fim_ids = fim_ids
        stored_N = _lengths(drawn)
        self._cuts: list[FimCut | None] = [
            fim_cut(length, fim_rate, d.key) if fim_ids is not None else None
            for length, d in zip(stored_N.tolist(), drawn, strict=True)
        ]
        cut_N = np.array([cut is not None for cut in self._cuts], dtype=bool)
        self.lengths = stored_N + EXTRA_TOKENS * cut_N

    @property
    def num_fim(self) -> int:
        """Documents that are rearranged."""
        return sum(cut is not None for cut in self._cuts)

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens ``start .. stop - 1`` of a document, fewer at its end; int64."""
        drawn, cut = self._drawn[document], self._cuts[document]
        if cut is None or self._fim_ids is None:
            return drawn.documents.tokens(drawn.index, start, stop)
        return fim_tokens(drawn.documents, drawn.index, cut, self._fim_ids, start, stop)

    def name(self, document: int) -> DocumentName:
        """Which document of which source, in which pass."""
        return self._drawn[document].name


class Mixture:
    """Pools of the weighted sources.

    Args:
        sources: what is drawn from.
        weights: shares of the tokens, one for each source; None for a single source, whose passes
            are the epochs.
        pool_documents: documents of a pool.
        fim_rate: ``data.fim.rate``.
        fim_ids: the tokenizer's ids, where the rate is above 0.
        seed: of the run.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        weights: Sequence[float] | None,
        pool_documents: int,
        fim_rate: float,
        fim_ids: tuple[int, int, int] | None,
        seed: int,
    ) -> None:
        self._sources = list(sources)
        self._fim: tuple[float, tuple[int, int, int] | None] = (fim_rate, fim_ids)
        self._seed = seed
        self._quotas: list[int] | None = None
        self._pool_documents = pool_documents
        if weights is not None:
            lengths = [source.mean_length() for source in sources]
            self._quotas = quotas(weights, lengths, pool_documents)

    @property
    def quotas(self) -> dict[str, int] | None:
        """Documents of each source in every pool; None where there are no weights."""
        if self._quotas is None:
            return None
        return dict(zip((s.name for s in self._sources), self._quotas, strict=True))

    def pool(self, epoch: int, number: int) -> Pool | None:
        """A pool of an epoch; None after the last."""
        drawn: list[Drawn] | None = []
        if self._quotas is None:
            (source,) = self._sources
            start = number * self._pool_documents
            drawn = source.draw_epoch(epoch, start, self._pool_documents)
            if drawn is None:
                return None
        else:
            for source, quota in zip(self._sources, self._quotas, strict=True):
                drawn += source.draw(number * quota, quota)
        return Pool(drawn, *self._fim, key=mix(self._seed, epoch, number))

    def document(self, name: DocumentName) -> Pool:
        """A pool of one document, as it was trained on in its pass.

        Raises:
            ValueError: there is no such source or document.
        """
        for source in self._sources:
            if name.source in source.names:
                return Pool([source.find(name)], *self._fim, key=0)
        raise ConfigError(f"data.sources has no {name.source}")


def quotas(
    weights: Sequence[float], mean_lengths: Sequence[float], pool_documents: int
) -> list[int]:
    """Documents of each source in a pool, so that tokens come in the proportion of the weights.

    Largest remainders, at least one document each; the error is below one document of a pool.

    Args:
        weights: shares of the tokens, above 0.
        mean_lengths: tokens of an average document of each source.
        pool_documents: their sum.

    Raises:
        ValueError: more sources than documents in a pool.
    """
    if len(weights) > pool_documents:
        raise ConfigError(
            f"data.packing.pool_documents={pool_documents} must be at least the number of weighted"
            f" sources, {len(weights)}"
        )
    share_S = np.array(weights) / np.array(mean_lengths)
    share_S = share_S / share_S.sum() * pool_documents
    out_S = np.maximum(1, np.floor(share_S)).astype(np.int64)
    while (missing := pool_documents - int(out_S.sum())) != 0:
        gap_S = np.where((out_S > 1) | (missing > 0), share_S - out_S, np.inf)
        out_S[np.argmax(gap_S) if missing > 0 else np.argmin(gap_S)] += 1 if missing > 0 else -1
    return out_S.tolist()


def _lengths(drawn: list[Drawn]) -> np.ndarray:
    """Stored tokens of each document, each store asked once."""
    out = np.empty(len(drawn), dtype=np.int64)
    stores = {id(d.documents): d.documents for d in drawn}
    for identity, documents in stores.items():
        where = [i for i, d in enumerate(drawn) if id(d.documents) == identity]
        out[where] = documents.lengths(np.array([drawn[i].index for i in where], dtype=np.int64))
    return out
