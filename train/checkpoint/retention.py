"""Which checkpoints stay: only those that are known to be whole count.

Folders that are set aside have a life too: ``damaged_step_*``, those that did not verify under
their own name, and ``abandoned_step_*`` from before a rollback.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from train.checkpoint.files import STATE, DamagedCheckpointError, step_of
from train.checkpoint.hold import unheld
from train.checkpoint.reader import verify
from train.errors import one_line

log = logging.getLogger(__name__)

REMOVING = ".removing_"
_KEPT_ASIDE = 2  # of the damaged, and of the abandoned
_ASIDE = re.compile(r"(damaged|abandoned)_step_(\d+)(?:_\d+)?")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is published; one reason is enough.

    Attributes:
        last: how many of the newest; 0 = all.
        every: those whose step is a multiple; 0 = none for that.
        best: how many of those with the lowest validation loss, of an evaluation at their step.
    """

    last: int = 0
    every: int = 0
    best: int = 0

    def kept(self, losses: Mapping[int, float | None], is_whole: Callable[[int], bool]) -> set[int]:
        """Steps that have a reason to stay.

        Args:
            losses: step -> validation loss, None where it was not measured.
            is_whole: whether the checkpoint of a step is; asked only where it matters, since the
                answer may take reading the whole of it.
        """
        if not self.last:
            return set(losses)
        measured = sorted((loss, step) for step, loss in losses.items() if loss is not None)
        return {
            *_first(sorted(losses, reverse=True), is_whole, self.last),
            *_first((step for _, step in measured), is_whole, self.best),
            *(step for step in losses if self.every and step % self.every == 0),
        }


def _first(steps: Iterable[int], is_whole: Callable[[int], bool], count: int) -> list[int]:
    found: list[int] = []
    for step in steps:
        if len(found) == count:
            break
        if is_whole(step):
            found.append(step)
    return found


class Known:
    """What this process found out about folders, as long as their files do not change."""

    def __init__(self) -> None:
        self._whole: dict[Path, tuple[object, bool]] = {}

    def note(self, folder: Path, whole: bool) -> None:
        """Remember whether ``folder`` is whole."""
        self._whole[folder] = (_fingerprint(folder), whole)

    def recall(self, folder: Path) -> bool | None:
        """Whether ``folder`` is whole; None: not known of the files that are there now."""
        found, whole = self._whole.get(folder, (None, False))
        return whole if found is not None and found == _fingerprint(folder) else None

    def is_whole(self, folder: Path) -> bool:
        """The same; what is not known is read and compared with its hashes. Not collective."""
        whole = self.recall(folder)
        if whole is None:
            try:
                verify(folder)
                whole = True
            except DamagedCheckpointError as error:
                log.warning("%s; it does not count as one of those that are kept", error)
                whole = False
            self.note(folder, whole)
        return whole

    def forget_all_but(self, folders: Iterable[Path]) -> None:
        """Forget folders that are gone."""
        there = set(folders)
        self._whole = {folder: what for folder, what in self._whole.items() if folder in there}


def _fingerprint(folder: Path) -> object:
    """Changes with any file of a folder; None where it cannot be looked at."""
    try:
        with os.scandir(folder) as entries:
            stats = sorted((entry.name, entry.stat()) for entry in entries)
    except OSError:
        return None
    return [(name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats]


class Pruner:
    """Removes what has no reason to stay. It never fails: it is no part of saving.

    Args:
        folder: ``checkpoints`` of a run.
        retention: the reasons.
        known: which folders are whole.
    """

    def __init__(self, folder: Path, retention: Retention, known: Known) -> None:
        self._folder, self._retention, self._known = folder, retention, known
        self._told: set[str] = set()

    def prune(self, saved: int) -> None:
        """Remove what may go; what cannot be removed is told once, and tried again next time.

        Args:
            saved: the step that was just saved; it stays.
        """
        try:
            paths = published(self._folder)
            of_step = {step_of(path) or 0: path for path in paths}
            for path in (*self._superfluous(of_step, saved), *self._outlived(of_step)):
                self._try(path)
            self._known.forget_all_but(published(self._folder))
        except OSError as error:
            self._tell(self._folder, error)

    def _superfluous(self, of_step: Mapping[int, Path], saved: int) -> list[Path]:
        """Those without a reason to stay, but the damaged."""
        wanted = self._retention.best > 0
        losses = {step: val_loss(path) if wanted else None for step, path in of_step.items()}
        kept = self._retention.kept(losses, lambda step: self._known.is_whole(of_step[step]))
        return [
            path
            for step, path in sorted(of_step.items())
            if step not in {*kept, saved} and self._known.recall(path) is not False
        ]

    def _outlived(self, of_step: Mapping[int, Path]) -> list[Path]:
        """Damaged and abandoned ones that are old: whole ones came since, or others of their kind.

        What cannot be read just now may be whole, so under its own name it goes only where as many
        whole ones are newer as would let it go anyway.
        """
        whole = [step for step, path in of_step.items() if self._known.recall(path)]
        enough = min(_KEPT_ASIDE, self._retention.last or _KEPT_ASIDE)
        kinds: dict[str, list[tuple[int, Path]]] = {"damaged": [], "abandoned": []}
        for step, path in of_step.items():
            if self._known.recall(path) is False:
                kinds["damaged"].append((step, path))
        for path in self._folder.iterdir():
            if match := _ASIDE.fullmatch(path.name):
                kinds[match[1]].append((int(match[2]), path))
        gone: list[Path] = []
        for kind, found in kinds.items():
            for age, (step, path) in enumerate(sorted(found, reverse=True)):
                old = age >= _KEPT_ASIDE and step_of(path) is None
                if old or sum(other > step for other in whole) >= enough:
                    log.info(
                        "removing %s: of %s checkpoints the newest %d stay, until %d later ones"
                        " are whole", path, kind, _KEPT_ASIDE, enough,
                    )  # fmt: skip
                    gone.append(path)
        return gone

    def _try(self, path: Path) -> None:
        try:
            if not remove(path):
                log.info("%s is being read: it stays until the next save", path)
        except OSError as error:
            self._tell(path, error)

    def _tell(self, path: Path, error: OSError) -> None:
        if path.name not in self._told:
            self._told.add(path.name)
            log.warning("%s cannot be removed and stays: %s", path, one_line(error))


def published(folder: Path) -> list[Path]:
    """Folders with a checkpoint's name, oldest first, damaged or not."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0)


def remove(path: Path) -> bool:
    """Remove a checkpoint, unless somebody holds it; whether it is gone.

    A kill in the middle leaves no folder that looks damaged.

    Raises:
        OSError: it, or a part of it, cannot be removed.
    """
    removing = path.with_name(f"{REMOVING}{path.name}_{secrets.token_hex(4)}")
    with unheld(path) as free:
        if not free:
            return False
        try:
            path.rename(removing)
        except FileNotFoundError:
            return True  # somebody was faster
    discard(removing)
    return True


def discard(path: Path) -> None:
    """Delete a folder, a file or a link."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def val_loss(path: Path) -> float | None:
    """Validation loss that a checkpoint was saved with; None if it has none or cannot be read."""
    try:
        if not (path / STATE).is_file():
            return None
        found = json.loads((path / STATE).read_bytes())["val_loss"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    return found if is_number and math.isfinite(found) else None
