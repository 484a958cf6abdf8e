"""Which held-out documents the training text repeats: containment of word n-grams.

A document's shingles are its runs of n words, case, punctuation and layout ignored (GPT-3,
arXiv:2005.14165, appendix C uses n = 13). Shingles are compared by 64-bit hashes that are the same
in every process.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np

from data.pieces import pieces

_WORD = re.compile(r"\w+")
_WORDS = 1 << 18  # that are remembered, some 30 MB
_MULTIPLIER = 0x9E3779B97F4A7C15


class Shingler:
    """Hashes of the n-grams of words of a text; remembers the hashes of some words."""

    def __init__(self, ngram: int) -> None:
        self.ngram = ngram
        self._words: dict[str, int] = {}

    def __call__(self, text: str) -> np.ndarray:
        """uint64 hashes, in order; a text of fewer words than n is one shingle, none has none."""
        hash_N = np.concatenate([self._hashes(piece) for piece in pieces(text)])
        n = min(self.ngram, len(hash_N))
        if n == 0:
            return hash_N
        shingles = np.zeros(len(hash_N) - n + 1, dtype=np.uint64)
        for offset in range(n):
            shingles = shingles * np.uint64(_MULTIPLIER) + hash_N[offset : offset + len(shingles)]
        return shingles

    def _hashes(self, piece: str) -> np.ndarray:
        known = self._words
        if len(known) > _WORDS:
            known.clear()  # a stream never ends to bring new ones
        words = _WORD.findall(piece.lower())
        for word in words:
            if word not in known:
                known[word] = _word_hash(word)
        return np.fromiter((known[word] for word in words), dtype=np.uint64, count=len(words))


class OverlapCounter:
    """Collects which shingles of the candidates occur in the training text.

    Args:
        candidates: texts that may be held out.
        ngram: words of a shingle.
    """

    def __init__(self, candidates: list[str], ngram: int) -> None:
        self._shingler = Shingler(ngram)
        shingles = [self._shingler(text) for text in candidates]
        self._unique = np.unique(np.concatenate([np.empty(0, np.uint64), *shingles]))
        self._places = [np.searchsorted(self._unique, own) for own in shingles]
        self._hit = np.zeros(len(self._unique), dtype=bool)

    def add(self, text: str) -> None:
        """Mark the candidates' shingles that a training document holds."""
        if len(self._unique):
            self._hit[self._common(self._shingler(text))] = True

    def repeats(self, text: str) -> float:
        """How far a document and the candidates repeat each other, whatever was added before.

        The greater of the fraction of its shingles that the candidates hold, and the fraction of
        any one candidate's shingles that it holds.
        """
        if not len(self._unique):
            return 0.0
        shingles = self._shingler(text)
        common = self._common(shingles)
        if not len(common):
            return 0.0
        own = np.isin(shingles, self._unique[common]).mean()
        hit = np.zeros_like(self._hit)
        hit[common] = True
        return float(max(own, *self._fractions(hit)))

    def merge(self, hit: np.ndarray) -> None:
        """Add the marks that another process collected for the same candidates."""
        self._hit |= hit

    @property
    def hit(self) -> np.ndarray:
        """Marks of the distinct shingles, for :meth:`merge`."""
        return self._hit

    def overlaps(self) -> list[float]:
        """For each candidate the fraction of its shingles that the training text holds too."""
        return self._fractions(self._hit)

    def _fractions(self, hit: np.ndarray) -> list[float]:
        return [float(hit[place].mean()) if len(place) else 0.0 for place in self._places]

    def _common(self, shingles: np.ndarray) -> np.ndarray:
        """Places among the candidates' distinct shingles of those that are given."""
        place = np.searchsorted(self._unique, shingles)
        place[place == len(self._unique)] = 0
        return np.unique(place[self._unique[place] == shingles])


def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
