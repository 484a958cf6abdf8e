"""The record of a checkpoint that weights are taken from, compared with what they are taken for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train import checkpoint_reader
from train.checkpoint_files import open_manifest
from train.errors import UserError
from train.identity import RunIdentity, Use, check, recorded_in
from train.run_folder import CONFIG, read_flat_config


def check_origin(use: Use, folder: Path, now: RunIdentity, where: str) -> RunIdentity:
    """Refuse a checkpoint that the table of train/identity.py refuses for a use.

    Args:
        use: resume, init_from, evaluate or export.
        folder: a checkpoint whose files verify.
        now: what it is wanted for.
        where: how the user named it, for messages.

    Returns:
        Its record.

    Raises:
        UserError: names the key and both values.
    """
    state = checkpoint_reader.read_state(folder, open_manifest(folder))
    recorded = recorded_by(folder, state, now)
    check(use, recorded, now, where, state.get("progress", {}).get("tokens", 0))
    return recorded


def recorded_by(folder: Path, state: dict[str, Any], now: RunIdentity) -> RunIdentity:
    """The record in a checkpoint's state; of an older one what its run folder tells besides."""
    config = folder.absolute().parents[1] / CONFIG
    around = read_flat_config(config) if "identity" not in state and config.is_file() else None
    return recorded_in(state, around, now, f"checkpoint {folder}")


def check_steps(asked: int, done: int, run_dir: str) -> None:
    """Refuse a run that is to end before the step that it has reached.

    Raises:
        UserError: names both.
    """
    if asked < done:
        raise UserError(
            f"train.steps={asked} ends the run before step {done}, which run_dir={run_dir} has"
            " done: give more steps, or another run_dir"
        )
