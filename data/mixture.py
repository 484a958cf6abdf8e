"""Which documents a pool holds: sources, weights, epochs.

A source counts its draws 0, 1, 2 ...; draw j is place ``j mod N`` of its pass ``j div N`` in that
pass's own permutation. A pool takes the next draws.

* No weights: all sources together are one long list, every document once per epoch. Pool p holds
  places ``p*P .. p*P + P - 1`` of the epoch's permutation, the last pool fewer.
* Weights: the sources take turns by tokens (data/shares.py) until parts of P documents stand in the
  pool; the next pool goes on there, also inside a document. Each source passes through its own
  epochs, so that the mixture has a single epoch without end.

A stream stands for itself in its own order: place j is its j-th document. Its first documents are
its validation text and skipped; later documents that repeat them are left out of their pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from data.errors import ConfigError
from data.global_batch import DocumentName
from data.keyed import mix, permute
from data.pool import Cursor, DocumentSource, Drawn, Fim, Pool, as_trained
from data.shares import Turns
from data.token_store import StoredDocuments

_ORDER, _FIM = 1, 2  # purposes of keys


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

    def draw(self, start: int, count: int) -> list[tuple[int, Drawn]]:
        """Draws of passes one after the other, up to the end of one."""
        epoch, place = divmod(start, self._count)
        drawn = self.draw_epoch(epoch, place, count)
        assert drawn is not None
        return list(enumerate(drawn, start))

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

    def _drawn(self, part: int, index: int, epoch: int) -> Drawn:
        key = mix(self._key, _FIM, epoch, self._begin(part) + index)
        name = DocumentName(self.names[part], index, epoch)
        return Drawn(self._parts[part], index, key, name)

    def _begin(self, part: int) -> int:
        return int(self._ends[part - 1]) if part else 0


class Mixture:
    """The pools of a run.

    Args:
        sources: what is drawn from.
        weights: shares of the tokens, one for each source; None for a single source, whose passes
            are the epochs.
        pool_documents: documents of a pool.
        fim: fill-in-the-middle.
        seed: of the run.
    """

    def __init__(
        self,
        sources: Sequence[DocumentSource],
        weights: Sequence[float] | None,
        pool_documents: int,
        fim: Fim,
        seed: int,
    ) -> None:
        self._sources = list(sources)
        self._fim = fim
        self._seed = seed
        self._pool_documents = pool_documents
        self._turns = None if weights is None else Turns(sources, weights, fim)

    @property
    def start(self) -> tuple[Cursor, ...]:
        """Where the weighted sources stand before the first pool; empty without weights."""
        return () if self._turns is None else tuple(Cursor() for _ in self._sources)

    @property
    def names(self) -> list[str]:
        """The configured sources."""
        return [name for source in self._sources for name in source.names]

    def draws(self, cursors: tuple[Cursor, ...]) -> dict[str, int]:
        """The next draw of every weighted source."""
        names = [source.name for source in self._sources]
        return {name: cursor.draw for name, cursor in zip(names, cursors, strict=False)}

    def pool(
        self, epoch: int, number: int, cursors: tuple[Cursor, ...] = (), seq_len: int = 0
    ) -> Pool | None:
        """A pool of an epoch; None after the last.

        Args:
            epoch: pass over the data.
            number: of the pool in the epoch.
            cursors: where the weighted sources stand before it.
            seq_len: tokens of its first row: where weighted sources cut long documents.
        """
        key = mix(self._seed, epoch, number)
        if self._turns is not None:
            taken = self._turns.take(cursors, self._pool_documents, seq_len)
            return Pool(taken.documents, self._fim.ids, key, taken.spans, taken.cursors)
        (source,) = self._sources
        drawn = source.draw_epoch(epoch, number * self._pool_documents, self._pool_documents)
        return None if drawn is None else self._pool(drawn, key)

    def document(self, name: DocumentName) -> Pool:
        """A pool of one document, as it was trained on in its pass.

        Raises:
            ValueError: there is no such source or document.
        """
        for source in self._sources:
            if name.source in source.names:
                return self._pool([source.find(name)], 0)
        raise ConfigError(f"data.sources has no {name.source}")

    def _pool(self, drawn: list[Drawn], key: int) -> Pool:
        return Pool(as_trained(drawn, self._fim), self._fim.ids, key)
