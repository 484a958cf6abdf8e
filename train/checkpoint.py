"""Checkpoints that are complete or absent (DESIGN section 1, points 3 and 4).

One checkpoint is one folder ``checkpoints/step_00000100/``:

    __0_0.distcp ...  tensors of each rank, by torch Distributed Checkpoint, under layout-free names
    .metadata         its index (a pickle)
    state.json        step, tokens, loader position, counters
    manifest.json     size and sha256 of every file above, and its own sha256

It is written under a hidden name, by all ranks at once and behind the steps that follow
(``train/checkpoint_writer.py``), hashed, made durable (fsync) and published by one rename, so a
folder with a public name was complete once. What happened to it since is found by its hashes:
``train/checkpoint_reader.py`` names the first file that differs, and
:meth:`Checkpoints.newest_good` passes a damaged folder over. Nothing is unpickled before the
manifest verifies. The hashes find damage, not malice: whoever can write to the folder can rewrite
the manifest too, so load checkpoints only from people you would run code from.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from parallel.collectives import barrier, gathered, is_main, same_everywhere
from train.checkpoint_files import MANIFEST, STATE, DamagedCheckpointError, fsync, step_of
from train.checkpoint_reader import verify_together
from train.checkpoint_writer import Layout, Report, RunningSave, Snapshot, describe
from train.errors import UserError

log = logging.getLogger(__name__)

_WRITING, _REMOVING = ".writing_", ".removing_"
_LEAVE_SECONDS = 10.0  # how long a run that ends by an error waits for a save that is under way


class CheckpointFailedError(RuntimeError):
    """A checkpoint that a run cannot end without could not be written."""


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

    def removed(self, losses: Mapping[int, float | None]) -> list[int]:
        """Steps that may go.

        Args:
            losses: step -> validation loss, None where it was not measured.
        """
        if not self.last:
            return []
        kept = set(sorted(losses)[-self.last :])
        if self.every:
            kept |= {step for step in losses if step % self.every == 0}
        measured = [(loss, step) for step, loss in losses.items() if loss is not None]
        kept |= {step for _, step in sorted(measured)[: self.best]}
        return sorted(set(losses) - kept)


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
        self.retention = retention or Retention()
        self.saved_step = -1
        self._snapshot = Snapshot()
        self._layout: Layout | None = None
        self._running: RunningSave | None = None
        self._seconds = 0.0

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of ``step``."""
        return self.folder / f"step_{step:08d}"

    def published(self) -> list[Path]:
        """Folders with a checkpoint's name, oldest first, damaged or not."""
        if not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if step_of(p) is not None]
        return sorted(found, key=lambda p: step_of(p) or 0)

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
            self._layout = Layout(own)
        layout, rank = self._layout, dist.get_rank() if dist.is_initialized() else 0
        whole_state = {**state, "step": step}

        def write() -> Report:
            return layout.write(aside, own, rank)

        def publish(reports: list[Report]) -> None:
            layout.complete(aside, reports, whole_state)
            for path in durable_first:
                fsync(path)
            self._publish(aside, self.path(step))
            self._prune()

        self._running = RunningSave(step, write, publish if rank == 0 else None, aside)
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
    def newest_good(self, upto: int | None = None, every: int = 1) -> Path | None:
        """The newest that verifies; a damaged one on the way is named in the log. Collective.

        Args:
            upto: only steps up to this one.
            every: only steps that are a multiple.
        """
        self.wait()
        for path in reversed(same_everywhere(self.published())):
            step = step_of(path) or 0
            if (upto is not None and step > upto) or step % every:
                continue
            try:
                verify_together(path)
            except DamagedCheckpointError as error:
                if is_main():
                    log.warning("%s; passed over", error)
                continue
            return path
        return None

    def set_aside(self, after: int) -> None:
        """Take all checkpoints of later steps out of the row: the run goes back. Collective.

        They keep their files under ``abandoned_step_...``; a killed run does not resume from them.
        """
        self.wait()
        self.saved_step = min(self.saved_step, after)
        if is_main():
            for path in self.published():
                if (step_of(path) or 0) > after:
                    self._move_away(path, "abandoned")
            fsync(self.folder)
        barrier()

    def clean(self) -> None:
        """Remove what a killed run left unpublished or half removed. Collective."""
        if is_main() and self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.startswith((_WRITING, _REMOVING)):
                    shutil.rmtree(path, ignore_errors=True)
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
        if final.exists():
            # Only a damaged folder stands here: a good one of this step would have been resumed.
            moved = self._move_away(final, "damaged")
            log.warning("checkpoint %s stood in the way and is now %s", final, moved.name)
        aside.rename(final)
        fsync(self.folder)
        log.info("saved %s", final)

    def _move_away(self, path: Path, reason: str) -> Path:
        moved = path.with_name(f"{reason}_{path.name}")
        shutil.rmtree(moved, ignore_errors=True)
        return path.rename(moved)

    def _prune(self) -> None:
        of_step = {step_of(path) or 0: path for path in self.published()}
        wanted = self.retention.best > 0
        losses = {step: _val_loss(p) if wanted else None for step, p in of_step.items()}
        for step in self.retention.removed(losses):
            remove(of_step[step])


def remove(path: Path) -> None:
    """Remove a checkpoint; a kill in the middle leaves no folder that looks damaged."""
    removing = path.with_name(f"{_REMOVING}{path.name}")
    shutil.rmtree(removing, ignore_errors=True)
    path.rename(removing)
    shutil.rmtree(removing, ignore_errors=True)


def _val_loss(path: Path) -> float | None:
    """Validation loss that a checkpoint was saved with; None if it has none or cannot be read."""
    try:
        return json.loads((path / STATE).read_text(encoding="utf-8")).get("val_loss")
    except (OSError, ValueError):
        return None


def locate(source: str, asked_by: str = "init_from") -> Path:
    """The checkpoint that ``init_from`` names: itself, or the newest good one of a run folder.

    Args:
        source: the folder.
        asked_by: what named it, for the message.

    Raises:
        UserError: there is none.
    """
    path = Path(source)
    if (path / MANIFEST).exists():
        return path
    for folder in (path / "checkpoints", path):
        good = Checkpoints(folder).newest_good()
        if good is not None:
            return good
    raise UserError(
        f"{asked_by}={source} holds no complete checkpoint (looked for {MANIFEST} in it, and for"
        f" step_* folders in {path / 'checkpoints'})"
    )
