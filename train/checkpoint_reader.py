"""Reading one checkpoint folder: nothing is unpickled, and nothing loaded, before it verifies."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from parallel.collectives import gathered
from train.checkpoint_files import (
    STATE,
    DamagedCheckpointError,
    check_file,
    open_manifest,
    step_of,
)
from train.errors import UserError


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
    if not dist.is_initialized():
        return verify(folder)
    state, problem = None, None
    try:
        state = verify(folder, dist.get_rank(), dist.get_world_size())
    except DamagedCheckpointError as error:
        problem = str(error)
    problems = [text for text in gathered(problem) if text is not None]
    if problems:
        raise DamagedCheckpointError(problems[0])
    assert state is not None
    return state


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
    _check_same_tensors(folder, saved_tensors(folder), tensors, partial)
    _load(folder, tensors)
    return state


def load_each(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of a verified ``folder``, whole, one in memory at a time."""
    index = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for name in names:
        entry = index[name]
        assert isinstance(entry, TensorStorageMetadata)
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        _load(folder, {name: tensor})
        yield name, tensor


def read_state(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The state beside the tensors, once its own hash is right.

    Raises:
        DamagedCheckpointError: it is not.
    """
    check_file(folder, STATE, manifest["files"][STATE])
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def _load(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    reader = dcp.FileSystemReader(folder)
    with _quiet_dcp():
        dcp.load(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())


def saved_tensors(folder: Path) -> dict[str, torch.Size]:
    """Name -> shape of the tensors in a verified ``folder`` (its index is a pickle)."""
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: e.size for name, e in entries.items() if isinstance(e, TensorStorageMetadata)}


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


@contextlib.contextmanager
def _quiet_dcp() -> Iterator[None]:
    """Distributed Checkpoint warns without a process group, even when told so by ``no_dist``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")
        yield
