"""What a command line may say of Hydra's own section, where Hydra would go on with a warning."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from train.config.values import shown
from train.errors import UserError

_HYDRA_GROUPS = ("launcher", "sweeper", "job_logging", "hydra_logging", "help", "hydra_help", "env")


def check_hydra_key(arg: str, key: str, value: Any) -> None:
    """Refuse what Hydra would pass over.

    Args:
        arg: as it was typed.
        key: that it names, of the section ``hydra``.
        value: that it gives.

    Raises:
        UserError: says what to give.
    """
    if key == "hydra":
        raise UserError(f"{arg}: hydra is a section; give hydra.KEY=VALUE")
    name = key.removeprefix("hydra.")
    if name in _HYDRA_GROUPS and not isinstance(value, dict):
        raise UserError(f"{arg}: {key} is a section; give hydra/{name}=NAME, or keys of it")
    if name == "searchpath":
        _check_searchpath(arg, value)


def _check_searchpath(arg: str, found: Any) -> None:
    """Places of further configs are there."""
    if not isinstance(found, list):
        raise UserError(f"{arg}: hydra.searchpath is a list: give [file:///FOLDER, pkg://PACKAGE]")
    for place in map(str, found):
        kind, _, rest = place.rpartition("://")
        if "${" in place:  # known only when it is composed
            continue
        if kind == "pkg" and not _is_package(rest.replace("/", ".")):
            raise UserError(f"{arg}: there is no installed package {shown(rest)}")
        if kind != "pkg" and not Path(rest).is_dir():
            raise UserError(f"{arg}: there is no folder {shown(rest)}")


def _is_package(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False
