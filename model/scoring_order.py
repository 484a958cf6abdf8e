"""Who scores which queries: the indexer's work shared out over the shards of a row (reference D).

A query scores every entry that it sees, so in a long document the last shard of P has (2P - 1)
times the work of the first. In the balanced order every rank scores one half of its own shard, and
one half of another's for its owner. Halves go together by their work, the heaviest with the
lightest: for one document this is the zig-zag order, half i with half 2P - 1 - i. Only queries and
choices travel; values, attention and gradients stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Share(NamedTuple):
    """The halves that a rank scores; rank r owns numbers 2r and 2r + 1 of all halves of a row.

    Attributes:
        kept: of its own shard.
        other: of another's, or its own second.
    """

    kept: int
    other: int


def own_halves(work: Sequence[int]) -> list[Share]:
    """By rank: its own."""
    return [Share(half, half + 1) for half in range(0, len(work), 2)]


def balanced_halves(work: Sequence[int]) -> list[Share]:
    """By rank: the halves of the balanced order, or its own where that is as even.

    Args:
        work: of each half of a row, in order; an even number of them.

    Half h and its pair's other half belong to at most two ranks, and every rank has two halves.
    So the pairs can be given out such that each rank keeps one half: whoever keeps a half takes
    its pair, and the owner of the pair's other half keeps the other one of its own.
    """
    order = sorted(range(len(work)), key=lambda half: (work[half], half))
    partner = dict(zip(order, reversed(order), strict=True))
    kept: dict[int, int] = {}
    for half in range(0, len(work), 2):
        while half // 2 not in kept:
            kept[half // 2] = half
            half = partner[half] ^ 1
    shares = [Share(kept[rank], partner[kept[rank]]) for rank in range(len(work) // 2)]
    own = own_halves(work)
    return shares if heaviest(shares, work) < heaviest(own, work) else own


def heaviest(shares: Sequence[Share], work: Sequence[int]) -> int:
    """Work of the rank that has most."""
    return max(sum(work[half] for half in share) for share in shares)
