"""What a launcher (torchrun, or a scheduler that sets the same variables) says of this process."""

from __future__ import annotations

import os

from parallel.errors import ConfigError

_NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched_rank() -> int:
    """Number of this process; 0 where nothing launched it."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """Number of processes; 1 where nothing launched them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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
