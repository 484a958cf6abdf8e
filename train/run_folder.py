"""Whether a run may use its folder: it is new, or holds an earlier part of the same run.

Looks and refuses; it makes the folder, but the trainer fills it, once everything is known to be
buildable.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from train.config import RunConfig, dump, load
from train.errors import UserError, one_line

log = logging.getLogger(__name__)

CONFIG, METRICS, CHECKPOINTS = "config.yaml", "metrics.jsonl", "checkpoints"
SAMPLES, ABANDONED = "samples.jsonl", "samples_abandoned.jsonl"
# What may change between the parts of a run: the machine, the layout, how often one looks, how far
# it goes.
_FREE = (
    "run_dir", "engine", "parallel.", "wandb.", "sample.", "tensorboard", "model.kernels",
    "model.loss_chunk_tokens", "train.steps", "train.micro_batch_size", "train.device",
    "train.eval_every", "train.eval_only", "train.eval_tokens",
    "train.final_eval_tokens", "train.checkpoint_every", "train.async_checkpoint", "train.keep_",
    "train.time_limit_seconds", "train.log_every", "train.log_samples", "train.monitor_every",
    "train.activation_checkpoint", "train.profile_", "train.recovery.",
)  # fmt: skip


def check_run_folder(run: RunConfig) -> None:
    """Refuse a folder that cannot be written or belongs to another run.

    Raises:
        UserError: names ``run_dir`` and, where a config differs, the key and both values.
    """
    folder = Path(run.run_dir)
    _check_writable(folder)
    if not any(folder.iterdir()):
        return
    if not (folder / CONFIG).is_file():
        if _has_run(folder):
            raise UserError(f"run_dir={folder} holds a run but its {CONFIG} is missing")
        found = sorted(path.name for path in folder.iterdir())[0]
        raise UserError(f"run_dir={folder} is no run folder: it holds {found} but no {CONFIG}")
    if not _has_run(folder):
        return
    before, now = _flat_file(folder / CONFIG), dict(_flatten(yaml.safe_load(dump(run))))
    for key in sorted(before.keys() & now.keys(), key=list(now).index):
        if before[key] == now[key]:
            continue
        if not key.startswith(_FREE):
            raise UserError(
                f"run_dir={folder} holds a run with {key}={before[key]}, but now {key}={now[key]}:"
                " give another run_dir"
            )
        if key == "train.steps":
            log.info("train.steps was %s and is %s: schedules now end there", before[key], now[key])


def read_run(folder: Path) -> RunConfig:
    """The config of a run.

    Raises:
        UserError: the folder holds none, or one that this code does not take.
    """
    path = folder / CONFIG
    try:
        content = OmegaConf.load(path)
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(content, DictConfig):
        raise UserError(f"{path} is no config: it holds a {type(content).__name__}")
    return load(content)


def _has_run(folder: Path) -> bool:
    """Whether there is anything to lose: a metrics line or a checkpoint."""
    metrics, checkpoints = folder / METRICS, folder / CHECKPOINTS
    if metrics.is_file() and metrics.stat().st_size > 0:
        return True
    return checkpoints.is_dir() and any(checkpoints.iterdir())


def _check_writable(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"run_dir={folder} cannot be: {existing} is a file, not a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"run_dir={folder} cannot be written: {one_line(error)}") from error


def _flat_file(path: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no config: it holds a {type(content).__name__}")
    return dict(_flatten({str(key): value for key, value in content.items()}))


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
