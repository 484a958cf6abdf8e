"""Reading one checkpoint folder: nothing is unpickled, and nothing loaded, before it verifies."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from parallel.collectives import gathered
from train.checkpoint.files import (
    INDEX,
    STATE,
    DamagedCheckpointError,
    check_file,
    open_manifest,
    step_of,
    unreadable,
)
from train.errors import UserError, one_line

T = TypeVar("T")


def verify(folder: Path, share: int = 0, shares: int = 1) -> dict[str, Any]:
    """Compare the files with the manifest and return the parsed ``state.json``.

    Args:
        folder: a checkpoint.
        share: number of this caller, of ``shares`` that divide the files among them.
        shares: how many there are; 1 = look at every file.

    Raises:
        DamagedCheckpointError: names the folder, the file and what is wrong with it.
    """
    manifest = open_manifest(folder)
    for name, entry in list(manifest["files"].items())[share::shares]:
        check_file(folder, name, entry)
    step = step_of(folder)
    if step is not None and step != manifest["step"]:
        raise DamagedCheckpointError(
            f"checkpoint {folder}: its manifest is of step {manifest['step']}"
        )
    return read_state(folder, manifest)


def verify_together(folder: Path) -> dict[str, Any]:
    """:func:`verify`, every rank its share of the files. Collective.

    Raises:
        DamagedCheckpointError: the same on every rank.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return together(lambda: verify(folder, rank, ranks))


def together(look: Callable[[], T]) -> T:
    """What each rank sees, if none sees damage. Collective.

    Raises:
        DamagedCheckpointError: of the first rank that does, on every rank.
    """
    found, problem = None, None
    try:
        found = look()
    except DamagedCheckpointError as error:
        problem = str(error)
    problems = [text for text in gathered(problem) if text is not None]
    if problems:
        raise DamagedCheckpointError(problems[0])
    return cast(T, found)


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
    state = verify_together(folder)
    saved = together(lambda: SavedTensors(folder))
    _check_same_tensors(folder, saved.shapes, tensors, partial)
    saved.load(tensors)
    return state


class SavedTensors:
    """The tensors of one verified checkpoint, by name; its index, a pickle, is read once.

    Args:
        folder: of the checkpoint.

    Attributes:
        shapes: of every tensor.
        dtypes: of every tensor.

    Raises:
        DamagedCheckpointError: the index cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._reader = folder, _OneIndex(folder)
        try:
            entries = self._reader.read_metadata().state_dict_metadata.items()
        except Exception as error:  # whatever unpickling raises
            raise unreadable(folder, INDEX, error) from error
        found = {name: e for name, e in entries if isinstance(e, TensorStorageMetadata)}
        self.shapes = {name: entry.size for name, entry in found.items()}
        self.dtypes = {name: entry.properties.dtype for name, entry in found.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors of the saved shapes. Collective, where there are ranks.

        Raises:
            DamagedCheckpointError: files have vanished, or cannot be read; on all ranks.
        """
        try:
            self._load(tensors)
        except OSError as error:
            raise DamagedCheckpointError(
                f"checkpoint {self._folder} cannot be read: {one_line(error)}"
            ) from error
        except CheckpointException as error:  # of any rank, raised on all
            rank, (cause, _) = next(iter(error.failures.items()))
            if not isinstance(cause, OSError):
                raise
            raise DamagedCheckpointError(
                f"checkpoint {self._folder} cannot be read by rank {rank}: {one_line(cause)}"
            ) from error

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        if dist.is_initialized():
            dcp.load(dict(tensors), storage_reader=self._reader)
            return
        # As dcp.load does, but for its round trips between ranks, which cost more than the read.
        planner, index = dcp.DefaultLoadPlanner(), self._reader.read_metadata()
        planner.set_up_planner(dict(tensors), index, is_coordinator=True)
        self._reader.set_up_storage_reader(index, is_coordinator=True)
        self._reader.read_data(planner.create_local_plan(), planner).wait()


class _OneIndex(dcp.FileSystemReader):
    """Reads the index once and not at every load."""

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._index is None:
            self._index = super().read_metadata(*args, **kwargs)
        return self._index


def load_each(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of a verified ``folder``, whole, one in memory at a time."""
    saved = SavedTensors(folder)
    for name in names:
        tensor = torch.empty(saved.shapes[name], dtype=saved.dtypes[name])
        saved.load({name: tensor})
        yield name, tensor


def read_state(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The state beside the tensors, once its own hash is right.

    Raises:
        DamagedCheckpointError: it is not.
    """
    check_file(folder, STATE, manifest["files"][STATE])
    try:
        state = json.loads((folder / STATE).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(folder, STATE, error) from error
    wrong = _wrong_state(state, manifest["step"])
    if wrong:
        raise DamagedCheckpointError(f"checkpoint {folder}: file {STATE}: {wrong}")
    return state


_DICTS = ("progress", "loader", "recovery", "trackers", "identity")


def _wrong_state(state: Any, step: int) -> str:
    """What is not as this code writes it; empty: nothing."""
    if not isinstance(state, dict):
        return f"it holds a {type(state).__name__}"
    if type(state.get("step")) is not int or state["step"] != step:
        return f"it is of step {reprlib.repr(state.get('step'))}"
    for key in _DICTS:
        if not isinstance(state.get(key, {}), dict):
            return f"{key} is a {type(state[key]).__name__}"
    loss = state.get("val_loss")
    if loss is not None and type(loss) not in (int, float):
        return f"val_loss is a {type(loss).__name__}"
    for key, value in state.get("progress", {}).items():
        if type(value) is not int or value < 0 or (key == "step" and value != step):
            return f"progress.{key} is {reprlib.repr(value)}"
    return ""


def saved_tensors(folder: Path) -> dict[str, torch.Size]:
    """Name -> shape of the tensors in a verified ``folder``."""
    return SavedTensors(folder).shapes


def _check_same_tensors(
    folder: Path, saved: Mapping[str, torch.Size], wanted: Mapping[str, Tensor], partial: bool
) -> None:
    missing = sorted(set(wanted) - set(saved))
    extra = [] if partial else sorted(set(saved) - _wanted_anywhere(wanted))
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


def _wanted_anywhere(wanted: Mapping[str, Tensor]) -> set[str]:
    """Names that any rank wants: a pipeline stage holds some of them."""
    return {name for some in gathered(sorted(wanted)) for name in some}
