"""What a launcher says of this process: torchrun, ``deepspeed``, or a scheduler, by variables.

``deepspeed`` and old launchers of torch also add ``--local_rank=N`` to the command line.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from parallel.errors import ConfigError

_BY_LAUNCHER = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")  # set by torchrun, and by deepspeed
_NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched_rank() -> int:
    """Number of this process; 0 where nothing launched it."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """Number of processes; 1 where nothing launched them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def forget_absent_backend() -> None:
    """Take a notebook's ``MPLBACKEND`` away where this environment has no such module.

    matplotlib could not be imported otherwise, and figures are written to files by none.
    """
    module = os.environ.get("MPLBACKEND", "").removeprefix("module://").partition(".")[0]
    if os.environ.get("MPLBACKEND", "").startswith("module://") and not _is_here(module):
        del os.environ["MPLBACKEND"]


def _is_here(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ValueError:  # no name at all, or a module that nothing on disk describes
        return module in sys.modules


def launched_here() -> int:
    """Number of processes on this machine; 1 where nothing launched them."""
    found = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")  # deepspeed's
    return int(found or "1")


def is_launched() -> bool:
    """Whether our parent is torchrun, or deepspeed's launcher, which says something at its end."""
    return any(name in os.environ for name in _BY_LAUNCHER)


def check_launch() -> None:
    """Refuse variables that are left over from elsewhere, or set by half.

    One process needs none of them; of several, each needs all.

    Raises:
        ConfigError: names the variables.
    """
    numbers = {name: os.environ.get(name) for name in _NEEDED[:3]}
    for name, value in numbers.items():
        if value is not None and not value.isdecimal():
            raise ConfigError(f"environment variable {name}={value!r} is no number")
    rank, world_size = launched_rank(), launched_world_size()
    if rank == 0 and world_size == 1:
        return
    given = " ".join(f"{name}={value}" for name, value in numbers.items() if value is not None)
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"environment: {given} says that this is one of several processes, but"
            f" {', '.join(missing)} is not set: start with torchrun, or unset these variables"
        )
    if rank >= world_size:
        raise ConfigError(f"environment: RANK={rank} must be below WORLD_SIZE={world_size}")


def without_local_rank(words: Sequence[str]) -> list[str]:
    """A command line without the ``--local_rank=N`` that a launcher has added.

    Raises:
        ConfigError: it says something else than the environment.
    """
    kept, local = [], os.environ.get("LOCAL_RANK")
    for word in words:
        added = re.fullmatch(r"--local[_-]rank=(.*)", word)
        if added is None:
            kept.append(word)
        elif added[1] != local:
            raise ConfigError(
                f"{word}, but environment variable LOCAL_RANK={local}: start with torchrun or"
                " deepspeed, which set both"
            )
    return kept
