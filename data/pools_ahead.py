"""Pools with their rows: while one is trained on, a thread draws and packs the one behind it.

A pool of long rows holds tens of thousands of documents (or, of a stream, tokenises them): work of
seconds that no step should wait for. What is planned depends on the position alone, so that it does
not matter which thread did it; :class:`PoolsAhead` only decides when. One thread draws at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import NamedTuple

from data.config import LongDocuments
from data.mixture import Mixture
from data.packing import Cut, Row
from data.pool import Pool
from data.position import Position, rows_of


class PlannedPool(NamedTuple):
    """A pool, its rows from a position's row length on, and what that length did to documents."""

    pool: Pool
    rows: list[Row]
    cut: Cut


class PoolsAhead:
    """Gives the pool at a position, planned beforehand where that could be known.

    Args:
        mixture: draws pools; nobody else lets it draw.
        long: what becomes of documents longer than a row.
        rewind: called with the position at which drawing goes on, where that is not the one behind
            the last pool (a stream must be read anew from there).
    """

    def __init__(
        self, mixture: Mixture, long: LongDocuments, rewind: Callable[[Position], None]
    ) -> None:
        self._mixture = mixture
        self._long = long
        self._rewind = rewind
        self._here: tuple[Position, PlannedPool] | None = None
        self._behind: tuple[Position, Future[PlannedPool | None]] | None = None

    def at(self, position: Position) -> PlannedPool | None:
        """The pool at a position; None after the last of an epoch.

        Raises:
            ConfigError: it cannot be drawn; also where a thread found that out earlier.
        """
        start = replace(position, row=0)
        if self._here is not None and self._here[0] == start:
            return self._here[1]
        if self._here is not None and _same_pool(self._here[0], start):
            pool = self._here[1].pool
            planned = PlannedPool(pool, *rows_of(pool, start, self._long))
        else:
            planned = self._next(start)
        if planned is None:
            self._here = None
            return None
        self._here = start, planned
        return planned

    def draw_ahead(self, position: Position) -> None:
        """Begin with the pool behind the one at a position, unless that has begun."""
        assert self._here is not None
        target = position.next_pool(self._here[1].pool.after)
        if self._behind is None:
            planned: Future[PlannedPool | None] = Future()
            self._behind = target, planned
            # of its own, not of an executor: it ends with the draw, and no exit waits for it
            threading.Thread(
                target=self._draw, args=(target, planned), name="pools", daemon=True
            ).start()

    def forget(self) -> None:
        """Wait for what is being drawn and drop it: drawing goes on elsewhere."""
        if self._behind is not None:
            self._behind[1].exception()  # waits
        self._here = self._behind = None

    def _next(self, start: Position) -> PlannedPool | None:
        if self._behind is not None:
            target, planned = self._behind
            if target == start:
                self._behind = None
                return planned.result()
            self.forget()
            self._rewind(start)
        return self._plan(start)

    def _draw(self, target: Position, planned: Future[PlannedPool | None]) -> None:
        try:
            planned.set_result(self._plan(target))
        except BaseException as error:  # told where the pool is asked for
            planned.set_exception(error)

    def _plan(self, start: Position) -> PlannedPool | None:
        p = start
        pool = self._mixture.pool(p.epoch, p.pool, p.cursors, p.first_seq_len)
        return None if pool is None else PlannedPool(pool, *rows_of(pool, p, self._long))


def _same_pool(a: Position, b: Position) -> bool:
    places = ((p.epoch, p.pool, p.cursors, p.first_seq_len) for p in (a, b))
    return next(places) == next(places)
