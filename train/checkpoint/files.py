"""What makes files trustworthy: hashes, the sealed manifest, and making them durable."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import reprlib
from pathlib import Path
from typing import Any

from train.errors import UserError, one_line

FORMAT = 1
MANIFEST, STATE, INDEX = "manifest.json", "state.json", ".metadata"
_NAME = re.compile(r"step_(\d{8,})")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class DamagedCheckpointError(UserError):
    """A checkpoint folder whose content is not what was written; the text names the file."""


def step_of(path: Path) -> int | None:
    """Step of a checkpoint folder by its name; None if the name is no checkpoint's."""
    match = _NAME.fullmatch(path.name)
    step = int(match.group(1)) if match else -1
    return step if path.name == f"step_{step:08d}" else None


def describe_file(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def check_file(folder: Path, name: str, entry: dict[str, Any]) -> None:
    """Compare a file with its entry.

    Raises:
        DamagedCheckpointError: names the folder, the file and what is wrong with it.
    """
    path = folder / name
    try:
        if not path.is_file():
            raise DamagedCheckpointError(f"checkpoint {folder}: file {name} is missing")
        size = path.stat().st_size
        found = sha256_of(path) if size == entry["bytes"] else ""
    except OSError as error:
        raise unreadable(folder, name, error) from error
    if size != entry["bytes"]:
        raise DamagedCheckpointError(
            f"checkpoint {folder}: file {name} has {size} bytes, {entry['bytes']} were written"
        )
    if found != entry["sha256"]:
        raise DamagedCheckpointError(
            f"checkpoint {folder}: file {name} has sha256 {found[:12]}, not the"
            f" {entry['sha256'][:12]} that was written"
        )


def unreadable(folder: Path, name: str, error: BaseException) -> DamagedCheckpointError:
    """What to raise where a file cannot be read."""
    return DamagedCheckpointError(
        f"checkpoint {folder}: file {name} cannot be read: {one_line(error)}"
    )


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(manifest: dict[str, Any]) -> str:
    """Text of a manifest: its canonical JSON with the sha256 of itself without that key."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(_canonical(body).encode()).hexdigest()
    return _canonical({**body, "sha256": digest}) + "\n"


def _canonical(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False)


def open_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, if it is the one that was written.

    Raises:
        DamagedCheckpointError: it is not, or not of this format.
    """
    path = folder / MANIFEST
    try:
        if not path.is_file():
            raise DamagedCheckpointError(f"checkpoint {folder}: file {MANIFEST} is missing")
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(folder, MANIFEST, error) from error
    try:
        text = content.decode("utf-8")
        manifest = json.loads(text)
        intact = isinstance(manifest, dict) and seal(manifest) == text
    except (ValueError, RecursionError):
        intact, manifest = False, {}
    if not intact:
        raise DamagedCheckpointError(
            f"checkpoint {folder}: file {MANIFEST} ({len(content)} bytes) is not what was written"
        )
    found = manifest.get("format")
    if type(found) is not int or found != FORMAT:
        raise DamagedCheckpointError(
            f"checkpoint {folder}: format {reprlib.repr(found)}, this code reads format {FORMAT}"
        )
    if not _is_complete(manifest):
        raise DamagedCheckpointError(
            f"checkpoint {folder}: file {MANIFEST} does not list what a checkpoint holds"
        )
    return manifest


def _is_complete(manifest: dict[str, Any]) -> bool:
    """Whether a manifest has a step and the entries of files inside its folder."""
    files = manifest.get("files")
    return (
        type(manifest.get("step")) is int
        and isinstance(files, dict)
        and {STATE, INDEX} <= set(files)
        and all(Path(name).name == name and name.isprintable() for name in files)
        and all(
            isinstance(entry, dict)
            and type(entry.get("bytes")) is int
            and isinstance(entry.get("sha256"), str)
            and _SHA256.fullmatch(entry["sha256"])
            for entry in files.values()
        )
    )


def write_durably(path: Path, text: str) -> None:
    """Write a small file and wait until the disk has it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, text: str) -> None:
    """Write a small file beside its place, then put it there.

    A reader, or a start after a crash, sees the file as it was or as it is to be. Whatever ends
    this but a kill takes away what was written beside; a kill's is written over by the next call.
    """
    aside = path.with_name(f".{path.name}.writing")
    try:
        write_durably(aside, text)
        os.replace(aside, path)
    except BaseException:  # a full disk, or a signal that ends this start
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
