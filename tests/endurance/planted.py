"""Faults that were mended, to be put back: lives that do not find them are worth nothing.

Each does to today's code what the code did when the fault was found. A child calls it before it
starts the command; undisturbed runs, with which lives are compared, are made without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import train.checkpoint.manager
import train.checkpoint.retention
import train.loop
import train.run_folder.lock
from train.checkpoint.files import step_of
from train.checkpoint.manager import Checkpoints
from train.checkpoint.retention import Pruner, published, remove
from train.checkpoint.writer import Snapshot
from train.loop import Trainer


def pruning_counts_damaged() -> None:
    """A1: retention goes by names, so that damaged checkpoints drive good ones out."""

    def prune(self: Pruner, _: int) -> None:
        of_step = {step_of(path) or 0: path for path in published(self._folder)}
        kept = self._retention.kept(dict.fromkeys(of_step), lambda _: True)
        for step in sorted(of_step.keys() - kept):
            with suppress(OSError):
                remove(of_step[step])

    Pruner.prune = prune


def last_save_is_not_judged() -> None:
    """A2: weights that are not finite are saved at the end of a run."""
    save_last, judge = Trainer._save_last, train.loop.first_not_finite

    def unjudged(self: Trainer) -> None:
        train.loop.first_not_finite = lambda _: ""
        try:
            save_last(self)
        finally:
            train.loop.first_not_finite = judge

    Trainer._save_last = unjudged


def nobody_owns_a_folder() -> None:
    """A4: two starts run in one folder."""

    @contextmanager
    def owned(_: Path) -> Iterator[None]:
        yield

    train.run_folder.lock.owned = owned


def pruning_is_part_of_saving() -> None:
    """A10: a save whose pruning fails counts as failed."""
    publish = Checkpoints._publish

    def publish_and_prune(self: Checkpoints, aside: Path, final: Path) -> None:
        publish(self, aside, final)
        of_step = {step_of(path) or 0: path for path in self.published()}
        for path in self._pruner._superfluous(of_step, step_of(final) or 0):
            remove(path)

    Checkpoints._publish = publish_and_prune


def readers_hold_nothing() -> None:
    """C4: what an export reads is removed under its hands."""

    @contextmanager
    def unheld(_: Path) -> Iterator[bool]:
        yield True

    train.checkpoint.retention.unheld = train.checkpoint.manager.unheld = unheld


def buffers_grow() -> None:
    """D1: names of chosen experts contain the step, so every save has buffers of its own."""
    take = Snapshot.take

    def keeping(self: Any, tensors: Any) -> Any:
        copies = take(self, tensors)
        self.kept = getattr(self, "kept", [])
        self.kept += [copy.clone() for name, copy in copies.items() if "anticipated" in name]
        return copies

    Snapshot.take = keeping


def metrics_are_not_durable() -> None:
    """No line of FAULTS: a checkpoint appears before the metrics that it counts on."""
    fsync = train.checkpoint.manager.fsync
    train.checkpoint.manager.fsync = lambda path: fsync(path) if path.is_dir() else None


FAULTS: dict[str, Callable[[], None]] = {
    "A1": pruning_counts_damaged,
    "A2": last_save_is_not_judged,
    "A4": nobody_owns_a_folder,
    "A10": pruning_is_part_of_saving,
    "C4": readers_hold_nothing,
    "D1": buffers_grow,
    "unsynced": metrics_are_not_durable,
}
