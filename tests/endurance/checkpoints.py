"""What is in a run folder, read without the code under test."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

_NAME = re.compile(r"step_(\d{8,})")


def step_of(name: str) -> int | None:
    """Step of a checkpoint's folder name; None: it is none."""
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def published(folder: Path) -> dict[int, Path]:
    """Step -> folder with a checkpoint's name, damaged or not."""
    found = {step_of(path.name): path for path in folder.iterdir()} if folder.is_dir() else {}
    return {step: path for step, path in sorted((s, p) for s, p in found.items() if s is not None)}


def is_good(folder: Path) -> bool:
    """Whether every file is what the manifest says, and the manifest what its own hash says."""
    try:
        text = (folder / "manifest.json").read_bytes().decode("utf-8")
        manifest = json.loads(text)
        digest = manifest.pop("sha256")
        body = json.dumps(manifest, indent=1, sort_keys=True)
        if digest != hashlib.sha256(body.encode()).hexdigest():
            return False
        if text != json.dumps({**manifest, "sha256": digest}, indent=1, sort_keys=True) + "\n":
            return False
        return manifest["step"] == step_of(folder.name) and all(
            sha256(folder / name) == entry["sha256"] for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def good(folder: Path) -> dict[int, Path]:
    """The whole ones of :func:`published`."""
    return {step: path for step, path in published(folder).items() if is_good(path)}


def newest_good(folder: Path) -> int:
    """Its step; 0: there is none."""
    steps = (s for s, path in reversed(published(folder).items()) if is_good(path))
    return next(steps, 0)


def digests(folder: Path) -> dict[str, str]:
    """Tensor name -> sha256 of its shape, dtype and bytes; and of the state beside the tensors."""
    reader = dcp.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in entries.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    state = strict_json((folder / "state.json").read_text())
    found = {name: digest(tensor) for name, tensor in tensors.items()}
    for key in ("progress", "loader", "recovery"):
        found[f"state {key}"] = json.dumps(state[key], sort_keys=True)
    return found


def digest(tensor: torch.Tensor) -> str:
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + content).hexdigest()


def finite(folder: Path) -> bool:
    """Whether a checkpoint holds no NaN and no infinity."""
    reader = dcp.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in entries.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")
        dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    return all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point())


def strict_json(text: str) -> Any:
    """Parse; NaN and Infinity are no JSON.

    Raises:
        ValueError: it is none.
    """

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def tree(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of the content, of all in a run folder."""
    return {
        str(path.relative_to(folder)): sha256(path) if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def is_remains(name: str) -> bool:
    """Whether a name of :func:`tree` is what a killed run left unpublished or half removed."""
    return name.startswith(("checkpoints/.writing_", "checkpoints/.removing_"))


def sha256(path: Path) -> str:
    """Of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
