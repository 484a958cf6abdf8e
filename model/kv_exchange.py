"""The seam through which attention reaches the rest of a row: what other ranks hold of it.

Where rows are whole there is nothing to bring (:class:`WholeRows`). Context parallelism stands
behind the same Protocol (``parallel/context_parallel.py``); gradients of what is brought return to
the rank that holds it (reference D). What is asked for travels while local work goes on, and is
waited for where it is used (:class:`Arriving`).
"""

# Legend: B rows, T tokens here, U tokens here and before, C channels, L entries computed here, E
# entries of whole rows, K entry dim, J indexer heads, L their dim, N chosen entries
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from model.sequence_plan import Bounds, CompressedPlan, SequenceShard

# Of some queries: their indexer queries, head weights, first and stop, and bounds of these two.
Score = Callable[[Tensor, Tensor, Tensor, Tensor, Bounds], Tensor]


class Arriving(Protocol):
    """Tensors on their way."""

    def wait(self) -> tuple[Tensor, ...]:
        """They are here; asked for once."""
        ...


@dataclass(frozen=True)
class Here:
    """They were here all the time."""

    tensors: tuple[Tensor, ...]

    def wait(self) -> tuple[Tensor, ...]:
        """At once."""
        return self.tensors


class Queries(Protocol):
    """The indexer's queries, on their way to the ranks that score them."""

    def choose(self, score: Score) -> Tensor:
        """What the queries of the tokens here choose [B, T, N], wherever they are scored."""
        ...


@dataclass(frozen=True)
class OwnQueries:
    """Every rank scores its own."""

    q_BTJL: Tensor
    w_BTJ: Tensor
    plan: CompressedPlan

    def choose(self, score: Score) -> Tensor:
        """Score them."""
        plan = self.plan
        return score(self.q_BTJL, self.w_BTJ, plan.first_BT, plan.stop_BT, plan.bounds)


class KVExchange(Protocol):
    """Brings what lies on other ranks; every rank of a row calls the same in the same order.

    Attributes:
        shard: the part of every row that is here.
    """

    shard: SequenceShard

    def tokens_before(self, count: int, *x_BTC: Tensor) -> Arriving:
        """Tensors [B, U, C] that begin up to ``count`` tokens before the shard.

        Args:
            count: tokens before the shard; cut at the row's beginning.
            x_BTC: of the tokens here; all of one dtype.
        """
        ...

    def all_entries(self, entries_BLK: Tensor, plan: CompressedPlan) -> Arriving:
        """The entries of whole rows [B, E, K], of those that are computed here."""
        ...

    def to_score(self, q_BTJL: Tensor, w_BTJ: Tensor, plan: CompressedPlan) -> Queries:
        """Hand over the indexer's queries and head weights for their choice, without gradients."""
        ...

    def add_up(self, counts: Tensor) -> Tensor:
        """Integers summed over all parts of the rows."""
        ...


class WholeRows:
    """Rows are whole: everything is here."""

    shard = SequenceShard()

    def tokens_before(self, count: int, *x_BTC: Tensor) -> Arriving:
        """Nothing lies before."""
        return Here(x_BTC)

    def all_entries(self, entries_BLK: Tensor, plan: CompressedPlan) -> Arriving:
        """They are all."""
        return Here((entries_BLK,))

    def to_score(self, q_BTJL: Tensor, w_BTJ: Tensor, plan: CompressedPlan) -> Queries:
        """They are scored here."""
        return OwnQueries(q_BTJL, w_BTJ, plan)

    def add_up(self, counts: Tensor) -> Tensor:
        """They are all."""
        return counts
