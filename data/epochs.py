"""How often a run passes through its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class SourceUse:
    """What is read of one source.

    Attributes:
        name: of the source; ``all`` where sources without weights are one list.
        tokens: of its training documents; None: a stream, whose length nobody knows.
        read: tokens that are read of it.
        stated: tokens of a stream, as its publisher says; 0 = nobody does.
    """

    name: str
    tokens: int | None
    read: float
    stated: int = 0

    @property
    def epochs(self) -> float | None:
        """Passes over it; None where its length is not known."""
        return self.read / self.tokens if self.tokens else None

    @property
    def foretold_epochs(self) -> float | None:
        """The same, of a stream by what its publisher says."""
        return self.read / self.stated if self.tokens is None and self.stated else self.epochs


def planned_uses(
    source_tokens: Mapping[str, int | None],
    weights: Mapping[str, float],
    read: float,
    stated: Mapping[str, int] | None = None,
) -> list[SourceUse]:
    """What a run of so many tokens reads of each source.

    Args:
        source_tokens: training tokens by source; None of a stream.
        weights: shares by source; empty: all together are one list.
        read: tokens of the run.
        stated: tokens of streams, as their publishers say.
    """
    shares = {name: weights[name] * read for name in weights}
    found = uses(source_tokens, weights, shares or {next(iter(source_tokens)): read})
    return [replace(use, stated=(stated or {}).get(use.name, 0)) for use in found]


def uses(
    source_tokens: Mapping[str, int | None], weights: Mapping[str, float], read: Mapping[str, float]
) -> list[SourceUse]:
    """What was read of each source, by name; other arguments as of :func:`planned_uses`."""
    if weights:
        return [SourceUse(name, source_tokens[name], read.get(name, 0)) for name in weights]
    known = [tokens for tokens in source_tokens.values() if tokens is not None]
    whole = sum(known) if len(known) == len(source_tokens) else None
    name = next(iter(source_tokens)) if len(source_tokens) == 1 else "all"
    return [SourceUse(name, whole, sum(read.values()))]


def most_epochs(found: list[SourceUse]) -> float | None:
    """Passes over the source that is passed over most often; None where no length is known."""
    return max((use.epochs for use in found if use.epochs is not None), default=None)
