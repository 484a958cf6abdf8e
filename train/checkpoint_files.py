"""What makes files trustworthy: hashes, the sealed manifest, and making them durable."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from train.errors import UserError

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
_NAME = re.compile(r"step_(\d{8,})")


class DamagedCheckpointError(UserError):
    """A checkpoint folder whose content is not what was written; the text names the file."""


def step_of(path: Path) -> int | None:
    """Step of a checkpoint folder by its name; None if the name is no checkpoint's."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else None


def describe_file(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def check_file(folder: Path, name: str, entry: dict[str, Any]) -> None:
    """Compare a file with its entry.

    Raises:
        DamagedCheckpointError: names the folder, the file and what is wrong with it.
    """
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


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(manifest: dict[str, Any]) -> str:
    """Text of a manifest: its canonical JSON with the sha256 of itself without that key."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(body, indent=1, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def open_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, if it is the one that was written.

    Raises:
        DamagedCheckpointError: it is not, or not of this format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DamagedCheckpointError(f"checkpoint {folder}: file {MANIFEST} is missing")
    try:
        text = path.read_bytes().decode("utf-8")
        manifest = json.loads(text)
        intact = isinstance(manifest, dict) and seal(manifest) == text
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


def write_durably(path: Path, text: str) -> None:
    """Write a small file and wait until the disk has it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def fsync(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
