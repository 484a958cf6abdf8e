"""The seam through which attention reaches the rest of a row: what other ranks hold of it.

Where rows are whole there is nothing to bring (:class:`WholeRows`). Context parallelism stands
behind the same Protocol (``parallel/context_parallel.py``); gradients of what is brought return to
the rank that holds it (reference D).
"""

# Legend: B rows, T tokens here, U tokens here and before, C channels, L entries computed here, E
# entries of whole rows, K entry dim
from __future__ import annotations

from typing import Protocol

from torch import Tensor

from model.sequence_plan import CompressedPlan, SequenceShard


class KVExchange(Protocol):
    """Brings what lies on other ranks; every rank of a row calls the same in the same order.

    Attributes:
        shard: the part of every row that is here.
    """

    shard: SequenceShard

    def tokens_before(self, count: int, *x_BTC: Tensor) -> tuple[Tensor, ...]:
        """Tensors [B, U, C] that begin up to ``count`` tokens before the shard.

        Args:
            count: tokens before the shard; cut at the row's beginning.
            x_BTC: of the tokens here; all of one dtype.
        """
        ...

    def all_entries(self, entries_BLK: Tensor, plan: CompressedPlan) -> Tensor:
        """The entries of whole rows [B, E, K], of those that are computed here."""
        ...

    def add_up(self, counts: Tensor) -> Tensor:
        """Integers summed over all parts of the rows."""
        ...


class WholeRows:
    """Rows are whole: everything is here."""

    shard = SequenceShard()

    def tokens_before(self, count: int, *x_BTC: Tensor) -> tuple[Tensor, ...]:
        """Nothing lies before."""
        return x_BTC

    def all_entries(self, entries_BLK: Tensor, plan: CompressedPlan) -> Tensor:
        """They are all."""
        return entries_BLK

    def add_up(self, counts: Tensor) -> Tensor:
        """They are all."""
        return counts
