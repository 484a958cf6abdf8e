"""A streamed source as something that pools draw from: tokenised while training, in its own order.

Every process reads the whole stream (a pool must be known before its rows can be divided), which is
for what does not fit the disk; scripts/prepare.py is the quick way for the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from data.config import ValidationConfig
from data.errors import ConfigError
from data.global_batch import DocumentName
from data.keyed import mix
from data.near_duplicates import OverlapCounter
from data.pieces import PieceEncoder
from data.pool import Drawn
from data.prepare import reserved_documents
from data.sources import DocumentStream
from data.tokenizer import Tokenizer

_SAMPLE = 256  # documents from which lengths and token frequencies are estimated


class ListDocuments:
    """Tokenised documents in memory."""

    def __init__(self, ids: list[np.ndarray]) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def lengths(self, index_N: np.ndarray) -> np.ndarray:
        """Tokens of some documents, EOS included."""
        return np.array([len(self._ids[i]) for i in index_N], dtype=np.int64)

    def tokens(self, index: int, start: int, stop: int) -> np.ndarray:
        """Some tokens of a document; int64."""
        return self._ids[index][start:stop].astype(np.int64)


class StreamSource:
    """One stream. Its first documents are its validation text; repeats of them are left out.

    Args:
        name: of the source.
        stream: its documents.
        tokenizer: makes the ids.
        validation: ``data.validation``.
        seed: of the run, for fill-in-the-middle.
        min_tokens: shorter documents are left out.
        stated_tokens: of a pass, as the publisher says; 0 = nobody does.
    """

    def __init__(
        self,
        name: str,
        stream: DocumentStream,
        tokenizer: Tokenizer,
        validation: ValidationConfig,
        seed: int,
        min_tokens: int = 0,
        stated_tokens: int = 0,
    ) -> None:
        self.name, self.stated_tokens = name, stated_tokens
        self._min_tokens = min_tokens
        self.names: Sequence[str] = (name,)
        self._stream = stream
        self._encoder = PieceEncoder(tokenizer)
        self._read_count = 0
        # (pass, place) of the first documents of draws, states before
        self._draws: deque[tuple[tuple[int, int], Any]] = deque()
        self._key = mix(seed, *name.encode())
        reserved = reserved_documents(stream, validation.bytes)
        self._first = len(reserved)
        self.validation_texts = [text for text in reserved if text.strip()]
        self._counter = OverlapCounter(self.validation_texts, validation.ngram)
        self._max_overlap = validation.max_overlap
        self._resume = stream.state()
        self._measure(stream, tokenizer.vocab_size)
        if not self._sampled:
            raise ConfigError(
                f"data.sources.{name}: no documents to train on after the first {self._first},"
                f" which data.validation.bytes={validation.bytes} holds out"
            )

    def draw(self, start: int, count: int) -> list[tuple[int, Drawn]]:
        """Draws of passes one after the other; the length of a pass is known once it was read."""
        begin = start
        while True:
            epoch, place = self._locate(start)
            drawn = self.draw_epoch(epoch, place, count)
            if drawn is None:
                self._check_barren(begin, start)
                continue  # the pass ended here: now its length is known
            if drawn:
                first = start - place - self._first
                return [(first + document.name.document, document) for document in drawn]
            start += self._read_count
            self._check_barren(begin, start)

    def draw_epoch(self, epoch: int, start: int, count: int) -> list[Drawn] | None:
        """The next documents of a pass, without those that repeat validation text."""
        self._draws.append(((epoch, start), self._stream.state()))
        places: list[int] = []
        texts = self._stream.each(self._first + start, count)
        ids = list(self._encode(texts, places, self._min_tokens))
        if not self._read_count:
            return None
        documents = ListDocuments(ids)
        return [
            Drawn(
                documents,
                i,
                mix(self._key, epoch, start + place),
                DocumentName(self.name, self._first + start + place, epoch),
            )
            for i, place in enumerate(places)
        ]

    def find(self, name: DocumentName) -> Drawn:
        """A document by its name; reads the stream up to it.

        Raises:
            ValueError: there is none, or it is not trained on.
        """
        if drawn := self.draw_epoch(name.epoch, name.document - self._first, 1):
            return drawn[0]
        raise ConfigError(
            f"data.sources.{self.name} trains on no document {name.document}: it ends before, has"
            " no text there or repeats validation text"
        )

    def state(self, draw: int, epoch: int | None = None) -> list[Any]:
        """Where the draw began that read a document, for :meth:`seek`.

        What was read before is not asked for again. A thread may be drawing meanwhile.

        Args:
            draw: number of the document among all draws or, given a pass, its place there.
            epoch: the pass.
        """
        asked = self._locate(draw) if epoch is None else (epoch, draw)
        while len(self._draws) > 1 and self._draws[1][0] <= asked:
            self._draws.popleft()
        return list(self._draws[0][1]) if self._draws else list(self._resume)

    def seek(self, state: list[Any]) -> None:
        """Spare the next draw the reading of what comes before it."""
        self._draws.clear()
        self._resume = (int(state[0]), state[1])
        self._stream.seek(*self._resume)

    def _check_barren(self, begin: int, start: int) -> None:
        """Refuse a stream of which a whole pass gave nothing."""
        length = self._stream.length
        if length is not None and start - begin > length - self._first:
            raise ConfigError(
                f"data.sources.{self.name}.min_tokens={self._min_tokens}: no document of the stream"
                " is so long, or none is left of those that repeat no validation text"
            )

    def _locate(self, start: int) -> tuple[int, int]:
        if self._stream.length is None:
            return 0, start
        return divmod(start, self._stream.length - self._first)

    def _measure(self, stream: DocumentStream, vocab_size: int) -> None:
        """Count the tokens of the first documents: ``token_counts``, int64 [V]."""
        self.token_counts = np.zeros(vocab_size, dtype=np.int64)
        self._sampled = 0
        for id_T in self._encode(stream.each(self._first, _SAMPLE), []):
            self.token_counts += np.bincount(id_T, minlength=vocab_size)
            self._sampled += 1

    def _encode(
        self, texts: Iterable[str], places: list[int], min_tokens: int = 0
    ) -> Iterator[np.ndarray]:
        """Ids of the documents that have text, are long enough and repeat no validation document.

        Their places among the texts go to ``places``, the count of texts to ``_read_count``.
        """
        read: deque[int] = deque()

        def kept() -> Iterator[str]:
            for place, text in enumerate(texts):
                self._read_count = place + 1
                if text.strip() and self._counter.repeats(text) <= self._max_overlap:
                    read.append(place)
                    yield text

        self._read_count = 0
        for id_T in self._encoder.documents(kept()):
            place = read.popleft()
            if len(id_T) >= min_tokens:
                places.append(place)
                yield id_T
