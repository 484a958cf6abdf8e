"""Checkpoints that are complete or absent (DESIGN section 1, points 3 and 4).

One checkpoint is one folder ``checkpoints/step_00000100/``:

    __0_0.distcp ...  tensors of each rank, by torch Distributed Checkpoint, under layout-free names
    .metadata         its index (a pickle)
    state.json        step, tokens, loader position, counters
    manifest.json     size and sha256 of every file above, and its own sha256

It is written under a hidden name, hashed, made durable (fsync) and published by one rename, so a
folder with a public name was complete once. What happened to it since is found by its hashes:
:func:`verify` names the first file that differs, :meth:`Checkpoints.newest_good` passes a damaged
folder over. Nothing is unpickled before the manifest verifies. The hashes find damage, not malice:
whoever can write to the folder can rewrite the manifest too, so load checkpoints only from people
you would run code from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from train.errors import UserError

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
_NAME = re.compile(r"step_(\d{8,})")


class DamagedCheckpointError(UserError):
    """A checkpoint folder whose content is not what was written; the text names the file."""


def step_of(path: Path) -> int | None:
    """Step of a checkpoint folder by its name; None if the name is no checkpoint's."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else None


# ---- one folder ----------------------------------------------------------------------------------
def write(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a complete, durable checkpoint into the empty ``folder``. Collective.

    Args:
        folder: exists and is empty; the same path on every rank.
        tensors: flat name -> tensor (or DTensor), layout-free names.
        state: JSON values; the same on every rank.
    """
    writer = dcp.FileSystemWriter(folder, sync_files=True, overwrite=False, thread_count=1)
    with _quiet_dcp():
        dcp.save(dict(tensors), storage_writer=writer, no_dist=not dist.is_initialized())
    if not _is_main():
        return
    (folder / STATE).write_text(json.dumps(state, indent=1, allow_nan=False), encoding="utf-8")
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
    }
    manifest = {"format": FORMAT, "step": state["step"], "files": files}
    (folder / MANIFEST).write_text(_seal(manifest), encoding="utf-8")
    for path in folder.iterdir():
        _fsync(path)
    _fsync(folder)


def verify(folder: Path) -> dict[str, Any]:
    """Compare every file with the manifest and return the parsed ``state.json``.

    Raises:
        DamagedCheckpointError: names the folder, the file and what is wrong with it.
    """
    manifest = _open_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpointError(f"checkpoint {folder}: file {name} is missing")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise DamagedCheckpointError(
                f"checkpoint {folder}: file {name} has {size} bytes, {entry['bytes']} were written"
            )
        found = sha256_of(path)
        if found != entry["sha256"]:
            raise DamagedCheckpointError(
                f"checkpoint {folder}: file {name} has sha256 {found[:12]}, not the"
                f" {entry['sha256'][:12]} that was written"
            )
    step = step_of(folder)
    if step is not None and step != manifest["step"]:
        raise DamagedCheckpointError(
            f"checkpoint {folder}: its manifest is of step {manifest['step']}"
        )
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def read(folder: Path, tensors: Mapping[str, Tensor], partial: bool = False) -> dict[str, Any]:
    """Verify ``folder``, then load into ``tensors`` in place. Collective.

    Args:
        folder: a checkpoint.
        tensors: flat name -> tensor (or DTensor) of the wanted shape; filled.
        partial: whether the checkpoint may hold tensors that are not asked for.

    Returns:
        The state that was saved beside the tensors.

    Raises:
        DamagedCheckpointError: see :func:`verify`.
        UserError: names or shapes differ from those of ``tensors``: another model's checkpoint.
    """
    state = verify(folder)
    reader = dcp.FileSystemReader(folder)
    _check_same_tensors(folder, saved_tensors(folder), tensors, partial)
    with _quiet_dcp():
        dcp.load(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())
    return state


def saved_tensors(folder: Path) -> dict[str, torch.Size]:
    """Name -> shape of the tensors in a verified ``folder`` (its index is a pickle)."""
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: e.size for name, e in entries.items() if isinstance(e, TensorStorageMetadata)}


def _check_same_tensors(
    folder: Path, saved: Mapping[str, torch.Size], wanted: Mapping[str, Tensor], partial: bool
) -> None:
    missing = sorted(set(wanted) - set(saved))
    extra = [] if partial else sorted(set(saved) - set(wanted))
    if missing or extra:
        first = f"{missing[0]} is not in it" if missing else f"{extra[0]} is not in this run"
        raise UserError(
            f"checkpoint {folder} is of another model or optimizer: {first} ({len(missing)} tensors"
            f" missing, {len(extra)} unknown, of {len(wanted)})"
        )
    for name, tensor in wanted.items():
        if saved[name] != tensor.shape:
            raise UserError(
                f"checkpoint {folder} is of another model: {name} has shape"
                f" {list(saved[name])} there and {list(tensor.shape)} here"
            )


# ---- the folder of a run -------------------------------------------------------------------------
class Checkpoints:
    """The ``checkpoints`` folder of a run: publishing, retention, finding the newest whole one.

    Args:
        folder: made at the first save.
        keep_last: how many of the newest stay; 0 = all.
    """

    def __init__(self, folder: Path, keep_last: int = 0) -> None:
        self.folder = folder
        self.keep_last = keep_last

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of ``step``."""
        return self.folder / f"step_{step:08d}"

    def published(self) -> list[Path]:
        """Folders with a checkpoint's name, oldest first, damaged or not."""
        if not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if step_of(p) is not None]
        return sorted(found, key=lambda p: step_of(p) or 0)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Publish the checkpoint of ``step``, then remove what retention lets go. Collective.

        Raises:
            OSError, dcp.api.CheckpointException: it could not be written; older checkpoints are
            untouched.
        """
        final, aside = self.path(step), self.folder / f".writing_step_{step:08d}"
        if _is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
        _barrier()
        try:
            write(aside, tensors, {**state, "step": step})
            if _is_main():
                self._publish(aside, final)
        except BaseException:
            if _is_main():
                shutil.rmtree(aside, ignore_errors=True)
            raise
        if _is_main():
            self._prune()
        _barrier()
        return final

    def newest_good(self) -> Path | None:
        """The newest that verifies; a damaged one on the way is named in the log. Collective."""
        chosen: list[Path | None] = [None]
        if _is_main():
            for path in reversed(self.published()):
                try:
                    verify(path)
                except DamagedCheckpointError as error:
                    log.warning("%s; passed over", error)
                    continue
                chosen = [path]
                break
        if dist.is_initialized():
            dist.broadcast_object_list(chosen, src=0)
        return chosen[0]

    def clean(self) -> None:
        """Remove what a killed run left unpublished or half removed."""
        if _is_main() and self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.name.startswith((".writing_", ".removing_")):
                    shutil.rmtree(path, ignore_errors=True)
        _barrier()

    def _publish(self, aside: Path, final: Path) -> None:
        if final.exists():
            # Only a damaged folder stands here: a good one of this step would have been resumed.
            damaged = final.with_name(f"damaged_{final.name}")
            shutil.rmtree(damaged, ignore_errors=True)
            final.rename(damaged)
            log.warning("checkpoint %s stood in the way and is now %s", final, damaged.name)
        aside.rename(final)
        _fsync(self.folder)

    def _prune(self) -> None:
        kept = self.published()
        for path in kept[: len(kept) - self.keep_last] if self.keep_last else []:
            # Renamed first: a kill during the removal must not leave a folder that looks damaged.
            removing = path.with_name(f".removing_{path.name}")
            path.rename(removing)
            shutil.rmtree(removing, ignore_errors=True)


def locate(source: str) -> Path:
    """The checkpoint that ``init_from`` names: itself, or the newest good one of a run folder.

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
        f"init_from={source} holds no complete checkpoint (looked for {MANIFEST} in it, and for"
        f" step_* folders in {path / 'checkpoints'})"
    )


# ---- hashes, durability --------------------------------------------------------------------------
def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(manifest: dict[str, Any]) -> str:
    """Text of a manifest: its canonical JSON with the sha256 of itself without that key."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, indent=1, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def _open_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise DamagedCheckpointError(f"checkpoint {folder}: file {MANIFEST} is missing")
    try:
        text = path.read_bytes().decode("utf-8")
        manifest = json.loads(text)
        intact = isinstance(manifest, dict) and _seal(manifest) == text
    except ValueError:
        intact, manifest = False, {}
    if not intact:
        raise DamagedCheckpointError(
            f"checkpoint {folder}: file {MANIFEST} ({path.stat().st_size} bytes) is not what"
            " was written"
        )
    if manifest["format"] != FORMAT:
        raise DamagedCheckpointError(
            f"checkpoint {folder}: format {manifest['format']}, this code reads format {FORMAT}"
        )
    return manifest


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _quiet_dcp() -> Iterator[None]:
    """Distributed Checkpoint warns without a process group, even when told so by ``no_dist``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")
        yield


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
