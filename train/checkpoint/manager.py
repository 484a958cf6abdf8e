"""Checkpoints that are complete or absent (reference P.1).

One checkpoint is one folder ``checkpoints/step_00000100/``:

    __0_0.distcp ...  tensors of each rank, by torch Distributed Checkpoint, under layout-free names
    .metadata         its index (a pickle)
    state.json        step, tokens, loader position, counters
    manifest.json     size and sha256 of every file above, and its own sha256

It is written under a hidden name, by all ranks at once and behind the steps that follow
(``train/checkpoint/writer.py``), hashed, made durable (fsync) and published by one rename, so a
folder with a public name was complete once. What happened to it since is found by its hashes:
``train/checkpoint/reader.py`` names the first file that differs, and
:meth:`Checkpoints.hold_newest` passes a damaged folder over. Nothing is unpickled before the
manifest verifies. The hashes find damage, not malice: whoever can write to the folder can rewrite
the manifest too, so load checkpoints only from people you would run code from.
"""

from __future__ import annotations

import itertools
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from parallel.collectives import barrier, gathered, is_main, same_everywhere
from train.checkpoint.files import MANIFEST, DamagedCheckpointError, fsync, step_of
from train.checkpoint.hold import Hold, unheld
from train.checkpoint.reader import together, verify_together
from train.checkpoint.retention import REMOVING, Known, Pruner, Retention, discard, published
from train.checkpoint.writer import RunningSave, ShardAssignment, Snapshot, WrittenFile, describe
from train.errors import TrainingFailedError, UserError, one_line

log = logging.getLogger(__name__)

T = TypeVar("T")
_WRITING = ".writing_"
_READ_SECONDS = 30.0  # how long a folder that must be renamed waits for its readers
_LEAVE_SECONDS = 10.0  # how long a run that ends by an error waits for a save that is under way


class CheckpointFailedError(TrainingFailedError):
    """A checkpoint that a run cannot end without could not be written."""


class Checkpoints:
    """The ``checkpoints`` folder of a run: saving, retention, finding the newest whole one.

    As a context: a run that leaves it by an error lets a save that is under way end first.

    Args:
        folder: made at the first save.
        retention: which checkpoints stay.
        background: whether training goes on while files are written; costs a copy of the state in
            host memory.

    Attributes:
        saved_step: newest step that is known, on every rank, to be complete; -1: none.
    """

    def __init__(
        self, folder: Path, retention: Retention | None = None, background: bool = False
    ) -> None:
        self.folder, self.background = folder, background
        self.saved_step = -1
        self._known = Known()
        self._pruner = Pruner(folder, retention or Retention(), self._known)
        self._snapshot = Snapshot()
        self._layout: ShardAssignment | None = None
        self._running: RunningSave | None = None
        self._seconds = 0.0

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of ``step``."""
        return self.folder / f"step_{step:08d}"

    def published(self) -> list[Path]:
        """Folders with a checkpoint's name, oldest first, damaged or not."""
        return published(self.folder)

    # ---- saving ------------------------------------------------------------------------------
    def start(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        durable_first: Sequence[Path] = (),
    ) -> None:
        """Begin to save the state as it is now; what cannot be written is logged. Collective.

        With ``background`` the tensors may change as soon as this returns; without, the save has
        ended by then. A save that is still running is waited for.

        Args:
            step: that ends here.
            tensors: flat name -> tensor (or DTensor), layout-free names.
            state: JSON values; rank 0's are written.
            durable_first: files that the checkpoint counts on; made durable before it appears.
        """
        self.wait()
        aside = self._open_aside(step)
        if aside is None:
            return
        own = self._snapshot.take(tensors) if self.background else dict(tensors)
        if self._layout is None or self._layout.described != describe(own):
            self._layout = ShardAssignment(own)
        layout, rank = self._layout, dist.get_rank() if dist.is_initialized() else 0
        whole_state = {**state, "step": step}

        def write() -> WrittenFile:
            return layout.write(aside, own, rank)

        def publish(reports: list[WrittenFile]) -> None:
            layout.complete(aside, reports, whole_state)
            for path in durable_first:
                fsync(path)
            fsync(self.folder.parent)  # so that they and this folder have their names
            self._publish(aside, self.path(step))

        self._running = RunningSave(
            step, write, publish if rank == 0 else None, lambda: self._pruner.prune(step), aside
        )
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Let the save that is running end; afterwards all ranks know what became of it.

        Collective. While it waits, ranks talk to each other, so that a lost one is noticed.
        """
        save = self._running
        if save is None:
            return
        while True:
            if not dist.is_initialized():
                save.join()
            everyone = gathered((save.running, save.published, save.error))
            errors = {rank: error for rank, (_, _, error) in enumerate(everyone) if error}
            if errors:
                save.give_up.set()
            if not any(running for running, _, _ in everyone):
                break
            save.join(0.1)
        self._running = None
        self._seconds += save.tell_seconds()
        if any(published for _, published, _ in everyone):
            self.saved_step = save.step
        elif is_main():
            shutil.rmtree(save.folder, ignore_errors=True)
            for rank, error in errors.items():
                if rank:
                    log.error("checkpoint of step %d failed: rank %d: %s", save.step, rank, error)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Save and wait. Collective.

        Raises:
            CheckpointFailedError: it could not be written; older checkpoints are untouched.
        """
        self.start(step, tensors, state)
        self.require(step)
        return self.path(step)

    def require(self, step: int) -> None:
        """Wait for the save of ``step``. Collective.

        Raises:
            CheckpointFailedError: it could not be written; the log says why.
        """
        self.wait()
        if self.saved_step != step:
            raise CheckpointFailedError(
                f"checkpoint {self.path(step)} could not be written (see the log);"
                " older checkpoints are untouched"
            )

    def background_seconds(self) -> float:
        """What saves took behind the steps, as far as they ended and this was not told before."""
        told, self._seconds = self._seconds, 0.0
        if self._running is not None:
            told += self._running.tell_seconds()
        return told if self.background else 0.0

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        # Other ranks may be gone: no collectives here. A second Ctrl-C means now.
        if self._running is not None and kind is not KeyboardInterrupt:
            self._running.join(_LEAVE_SECONDS)

    # ---- finding -----------------------------------------------------------------------------
    def hold_newest(self, upto: int | None = None, every: int = 1) -> Hold | None:
        """The newest that verifies, held; a damaged one on the way is named in the log. Collective.

        Args:
            upto: only steps up to this one.
            every: only steps that are a multiple.
        """
        self.wait()
        tried: set[Path] = set()
        while True:  # look again each time: another process may save and prune meanwhile
            found = [
                path
                for path in same_everywhere(self.published())
                if path not in tried
                and (upto is None or (step_of(path) or 0) <= upto)
                and (step_of(path) or 0) % every == 0
            ]
            if not found:
                return None
            tried.add(found[-1])
            try:
                hold = hold_together(found[-1])
            except DamagedCheckpointError as error:
                self._known.note(found[-1], whole=False)
                if is_main():
                    log.warning("%s; passed over", error)
                continue
            self._known.note(found[-1], whole=True)
            return hold

    def set_aside(self, after: int) -> None:
        """Take all checkpoints of later steps out of the row: the run goes back. Collective.

        They keep their files under ``abandoned_step_...``; a killed run does not resume from them.
        """
        self.wait()
        self.saved_step = min(self.saved_step, after)
        if is_main():
            for path in self.published():
                if (step_of(path) or 0) > after:
                    _move_away(path, "abandoned")
            fsync(self.folder)
        barrier()

    def clean(self) -> None:
        """Remove what a killed run left unpublished or half removed. Collective."""
        if is_main() and self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.startswith((_WRITING, REMOVING)):
                    try:
                        discard(path)
                    except OSError as error:
                        log.warning("%s cannot be removed: %s", path, one_line(error))
        barrier()

    # ---- rank 0's part -----------------------------------------------------------------------
    def _open_aside(self, step: int) -> Path | None:
        """A new hidden folder, known to all ranks; None if it cannot be made. Collective.

        Its name is new each time: what a process cut off from this run still writes is another's.
        """
        aside = self.folder / f"{_WRITING}step_{step:08d}_{secrets.token_hex(4)}"
        problem = ""
        if is_main():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                aside.mkdir()
            except OSError as error:
                problem = str(error)
                log.error("checkpoint of step %d failed: %s", step, problem)
        aside, problem = same_everywhere((aside, problem))
        return None if problem else aside

    def _publish(self, aside: Path, final: Path) -> None:
        if os.path.lexists(final):
            # Mostly a damaged folder: a good one of this step would have been resumed.
            moved = _move_away(final, "abandoned" if self._known.is_whole(final) else "damaged")
            log.warning("checkpoint %s stood in the way and is now %s", final, moved.name)
        aside.rename(final)
        fsync(self.folder)
        self._known.note(final, whole=True)
        log.info("saved %s", final)


def hold_together(folder: Path) -> Hold:
    """Hold a checkpoint on every rank, and verify it, every rank its share. Collective.

    Raises:
        DamagedCheckpointError: the same on every rank.
    """
    hold = together(lambda: Hold(folder))
    try:
        verify_together(folder)
    except DamagedCheckpointError:
        hold.close()
        raise
    return hold


def _move_away(path: Path, reason: str) -> Path:
    """Rename a checkpoint, once those who read it have done so, or have had time for it."""
    names = (f"{reason}_{path.name}" + (f"_{n}" if n else "") for n in itertools.count())
    moved = next(new for name in names if not os.path.lexists(new := path.with_name(name)))
    deadline = time.monotonic() + _READ_SECONDS
    while True:
        with unheld(path) as free:
            if free or time.monotonic() > deadline:
                if not free:
                    log.warning("%s is being read, and becomes %s all the same", path, moved.name)
                return path.rename(moved)
        time.sleep(0.05)


def hold(source: str, asked_by: str = "init_from") -> Hold:
    """The checkpoint that ``init_from`` names, held: itself, or the newest good one of a run.

    Args:
        source: the folder of either.
        asked_by: what named it, for the message.

    Raises:
        UserError: there is none.
    """
    path = Path(source)
    if (path / MANIFEST).exists():
        return Hold(path)
    for folder in (path / "checkpoints", path):
        found = Checkpoints(folder).hold_newest()
        if found is not None:
            return found
    raise _holds_none(source, asked_by)


def check_source(source: str, asked_by: str = "init_from") -> None:
    """Refuse a folder in which nothing bears a checkpoint's name; arguments as of :func:`hold`.

    Raises:
        UserError: there is none.
    """
    path = Path(source)
    if not (path / MANIFEST).exists() and not published(path / "checkpoints"):
        if not published(path):
            raise _holds_none(source, asked_by)


def _holds_none(source: str, asked_by: str) -> UserError:
    path = Path(source)
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return UserError(
            f"{asked_by}={source} is a model folder of another format: v4 import_hf {source}"
            f" runs/imported makes it {asked_by}=runs/imported"
        )
    return UserError(
        f"{asked_by}={source} holds no complete checkpoint (looked for {MANIFEST} in it, and for"
        f" step_* folders in {path / 'checkpoints'})"
    )


def read_held(find: Callable[[], Hold | None], read: Callable[[Path], T]) -> T | None:
    """Read what ``find`` holds, or the next that it finds where one vanished. Collective.

    Args:
        find: gives a checkpoint; None: there is none.
        read: reads the folder.
    """
    while (found := find()) is not None:
        try:
            with found:
                return read(found.folder)
        except DamagedCheckpointError:
            if same_everywhere(found.folder.exists()):
                raise
    return None
