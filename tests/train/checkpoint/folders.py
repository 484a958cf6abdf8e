"""What tests of checkpoints ask of a folder that they have to themselves."""

from pathlib import Path

from train.checkpoint.manager import Checkpoints, hold


def newest_good(saves: Checkpoints, upto: int | None = None) -> Path | None:
    """The folder of the newest checkpoint that verifies, let go. Collective."""
    found = saves.hold_newest(upto)
    if found is None:
        return None
    with found:
        return found.folder


def locate(source: str) -> Path:
    """The checkpoint that ``init_from`` would take, let go."""
    with hold(source) as found:
        return found.folder
