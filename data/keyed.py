"""Keyed randomness: every draw is a pure function of integers, never the state of a stream.

The bits come from splitmix64 (Steele, Lea and Flood 2014) in wrapping uint64 arithmetic, so they do
not depend on the version of numpy. A permutation is a Feistel network walked inside its domain: any
index can be looked up alone, and nothing is stored however many documents there are.
"""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1
_ROUNDS = 6


def mix(*values: int) -> int:
    """One 64-bit key of a sequence of integers; order matters."""
    key = len(values)
    for value in values:
        key = int(_splitmix(np.array([key ^ (value & _MASK)], dtype=np.uint64))[0])
    return key


def uniform(key: int, count: int) -> np.ndarray:
    """The first ``count`` float64 draws in [0, 1) of a key."""
    counter = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)
    return (_splitmix(counter ^ np.uint64(key)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(index_N: np.ndarray, count: int, key: int) -> np.ndarray:
    """Images of some indices under the key's permutation of ``0 .. count - 1``.

    Args:
        index_N: int64 indices below ``count``.
        count: size of the permuted range.
        key: from :func:`mix`.

    Returns:
        int64, as many as were given.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    round_keys = _splitmix(np.arange(_ROUNDS, dtype=np.uint64) + np.uint64(key))
    x = _feistel(index_N.astype(np.uint64), half, round_keys)
    outside = np.flatnonzero(x >= count)
    while outside.size:  # the domain is at most 4 times larger than count
        x[outside] = _feistel(x[outside], half, round_keys)
        outside = outside[x[outside] >= count]
    return x.astype(np.int64)


def _splitmix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _feistel(x: np.ndarray, half: int, round_keys: np.ndarray) -> np.ndarray:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = x >> shift, x & mask
    for round_key in round_keys:
        left, right = right, left ^ (_splitmix(right ^ round_key) & mask)
    return (left << shift) | right
