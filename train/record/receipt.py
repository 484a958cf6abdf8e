"""``receipt.json``: what ran, on what, and what came of it: a result can be traced and repeated."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from train.checkpoint.files import replace_durably
from train.errors import ROOT, UserError, one_line

RECEIPT = "receipt.json"
HARNESS = "harness"  # results of lm-evaluation-harness, added by ``scripts/eval.py``
_PACKAGES = ("train", "model", "optim", "parallel", "quant", "data", "conf")
_SOURCES = {".py", ".cpp", ".h"}
_LIBRARIES = ("torch", "numpy", "hydra-core", "datasets", "tokenizers", "triton", "deepspeed")


def code_version(root: Path = ROOT) -> dict[str, Any]:
    """Commit, files that differ from it (null outside git), a hash of the sources as they are."""
    commit = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain", "--", *_PACKAGES)
    return {
        "commit": commit,
        "changed_files": None if changed is None else len(changed.splitlines()),
        "source_sha256": source_hash(root),
    }


def source_hash(root: Path = ROOT) -> str:
    """Sha256 over the names and bytes of every Python and C++ file of the packages."""
    digest = hashlib.sha256()
    files = (p for name in _PACKAGES for p in (root / name).rglob("*") if p.suffix in _SOURCES)
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """JSON values: dataclasses become dicts, enums their values, what is not finite null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def config_hash(config: Any) -> str:
    """Sha256 of a config's canonical JSON."""
    return hashlib.sha256(
        json.dumps(plain(config), sort_keys=True, allow_nan=False).encode()
    ).hexdigest()


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, interpreter and libraries."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "libraries": {name: found for name in _LIBRARIES if (found := _library(name))},
    }


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write beside, then replace: a reader never sees half a file."""
    text = json.dumps(plain(content), indent=1, sort_keys=True, allow_nan=False)
    replace_durably(path, text + "\n")


def read_receipt(folder: Path) -> dict[str, Any]:
    """The receipt of a run's folder; empty where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = folder / RECEIPT
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no record")
    return content


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or not a checkout: the source hash still identifies the code
    return done.stdout.strip()


def _library(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
