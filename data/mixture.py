"""Which documents a pool holds: sources, weights, epochs.

A source counts its draws 0, 1, 2 ...; draw j is place ``j mod N`` of its pass ``j div N`` in that
pass's own permutation. A pool takes the next draws: ``data.packing.pool_documents`` of them, and
more until their tokens fill ``pool_rows`` rows.

* No weights: all sources together are one long list, every document once per epoch. Pools hold the
  next places of the epoch's permutation, the last pool what is left.
* Weights: the sources take turns by tokens (data/shares.py) until the pool is full; the next pool
  goes on there, also inside a document. Each source passes through its own epochs, so that the
  mixture has a single epoch without end.

Documents below a source's ``min_tokens`` have no place in a pass, those from ``long_tokens`` on
have ``long_times`` places.

A stream stands for itself in its own order: place j is its j-th document. Its first documents are
its validation text and skipped; later documents that repeat them are left out of their pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from data.config import PackingConfig, SourceConfig
from data.errors import ConfigError
from data.global_batch import DocumentName
from data.keyed import mix, permute
from data.packing import kept_length
from data.pool import Cursor, Document, DocumentSource, Drawn, Fim, Pool, as_trained
from data.shares import CHUNK, Turns
from data.token_store import StoredDocuments

_ORDER, _FIM = 1, 2  # purposes of keys


class StoreSource:
    """Random access: token stores as one list of documents.

    Args:
        name: for messages.
        parts: source -> the training documents of its store, in a fixed order.
        seed: of the run.
        sources: which documents of a store have how many places in a pass; none given: one each.

    Raises:
        ConfigError: a source has no document of its ``min_tokens``.
    """

    def __init__(
        self,
        name: str,
        parts: Mapping[str, StoredDocuments],
        seed: int,
        sources: Mapping[str, SourceConfig] | None = None,
    ) -> None:
        self.name = name
        self._parts = list(parts.values())
        self.names: Sequence[str] = tuple(parts)
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)
        chosen = {name: (sources or {}).get(name, SourceConfig()) for name in parts}
        self._places = _places(parts, chosen)
        self._count = int(self._ends[-1]) if self._places is None else len(self._places)
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
        if self._places is not None:
            index_N = self._places[index_N]
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
        packing: how large a pool is.
        fim: fill-in-the-middle.
        seed: of the run.
    """

    def __init__(
        self,
        sources: Sequence[DocumentSource],
        weights: Sequence[float] | None,
        packing: PackingConfig,
        fim: Fim,
        seed: int,
    ) -> None:
        self._sources = list(sources)
        self._fim = fim
        self._seed = seed
        self._packing = packing
        self._turns = (
            None if weights is None else Turns(sources, weights, fim, packing.long_documents)
        )

    @property
    def start(self) -> tuple[Cursor, ...]:
        """Where the sources stand before the first pool: one cursor each, or one of the pass."""
        return tuple(Cursor() for _ in self._sources)

    @property
    def pool_documents(self) -> int:
        """Documents of a pool, at least."""
        return self._packing.pool_documents

    @property
    def weighted(self) -> bool:
        """Whether the sources take turns by weights."""
        return self._turns is not None

    @property
    def names(self) -> list[str]:
        """The configured sources."""
        return [name for source in self._sources for name in source.names]

    def draws(self, cursors: tuple[Cursor, ...]) -> dict[str, int]:
        """The next draw of every source; without weights the next place of the pass."""
        names = [source.name for source in self._sources]
        return {name: cursor.draw for name, cursor in zip(names, cursors, strict=True)}

    def pool(
        self, epoch: int, number: int, cursors: tuple[Cursor, ...], seq_len: int
    ) -> Pool | None:
        """A pool of an epoch; None after the last.

        Args:
            epoch: pass over the data.
            number: of the pool in the epoch.
            cursors: where the sources stand before it.
            seq_len: tokens of its first row: where weighted sources cut long documents.
        """
        key = mix(self._seed, epoch, number)
        wanted, rows = self._packing.pool_documents, self._packing.pool_rows
        if self._turns is not None:
            taken = self._turns.take(cursors, wanted, seq_len, rows)
            return Pool(taken.documents, self._fim.ids, key, taken.spans, taken.cursors, taken.cut)
        (source,), (place, *_) = self._sources, cursors[0]
        documents: list[Document] = []
        tokens = 0
        while wanted or tokens < rows * seq_len:
            count = wanted or CHUNK
            drawn = source.draw_epoch(epoch, place, count)
            if drawn is None:
                break
            some = as_trained(drawn, self._fim)
            long = self._packing.long_documents
            tokens += sum(kept_length(document.length, seq_len, long) for document in some)
            documents += some
            place, wanted = place + count, 0
        if place == cursors[0].draw:
            return None
        return Pool(documents, self._fim.ids, key, after=(Cursor(place),))

    def document(self, name: DocumentName) -> Pool:
        """A pool of one document, as it was trained on in its pass.

        Raises:
            ValueError: there is no such source or document.
        """
        for source in self._sources:
            if name.source in source.names:
                return Pool(as_trained([source.find(name)], self._fim), self._fim.ids, 0)
        raise ConfigError(f"data.sources has no {name.source}")


def pass_tokens(part: StoredDocuments, source: SourceConfig) -> int:
    """Tokens of one pass over a source: short documents left out, long ones as often as asked."""
    places = _places({"": part}, {"": source})
    return part.num_tokens if places is None else int(part.lengths(places).sum())


def _places(
    parts: Mapping[str, StoredDocuments], sources: Mapping[str, SourceConfig]
) -> np.ndarray | None:
    """Documents by place of a pass, int64; None: every document has one."""
    asked = [(s.min_tokens, s.long_tokens, s.long_times) for s in sources.values()]
    if all(some == (0, 0, 1) for some in asked):
        return None
    found, begin = [], 0
    for name, part in parts.items():
        source, index_N = sources[name], np.arange(len(part))
        length_N = part.lengths(index_N)
        times_N = (length_N >= source.min_tokens).astype(np.int64)
        if source.long_tokens:
            times_N[length_N >= source.long_tokens] *= source.long_times
        if not times_N.any():
            raise ConfigError(
                f"data.sources.{name}.min_tokens={source.min_tokens}: no training document is so"
                f" long, the longest has {length_N.max(initial=0)} tokens"
            )
        if source.long_tokens > length_N.max(initial=0):
            raise ConfigError(
                f"data.sources.{name}.long_tokens={source.long_tokens}: no training document is so"
                f" long, the longest has {length_N.max(initial=0)} tokens"
            )
        found.append(np.repeat(begin + index_N, times_N))
        begin += len(part)
    return np.concatenate(found)
