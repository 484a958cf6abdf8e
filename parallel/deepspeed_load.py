"""DeepSpeed brought into the process: the pinned release, for this device, its extension built.

At its start DeepSpeed compiles a small C++ extension for CPUs, once a machine. A compiler that is
killed leaves torch's lock file in the cache, for which every later start would wait without end.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.cpp_extension import _get_build_directory

from parallel.errors import ConfigError
from parallel.zero_drive import remove_abandoned

log = logging.getLogger(__name__)
RELEASE = "0.19.8"
_EXTENSION = "deepspeed_shm_comm"


def load_deepspeed(device: torch.device) -> ModuleType:
    """Import DeepSpeed for this device.

    Raises:
        ConfigError: it is not installed, or another release, or set to another device.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "engine=deepspeed needs the extra: pip install 'v4-pretrain[deepspeed]'"
            f" (deepspeed=={RELEASE}), or say engine=torch"
        )
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else it guesses, at its import
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # it wants one without a launcher
    import deepspeed  # noqa: PLC0415  an extra that takes seconds to import

    found = deepspeed.__version__.partition("+")[0]
    if found != RELEASE:
        raise ConfigError(
            f"engine=deepspeed was proven with deepspeed=={RELEASE}, found {found}: pip install"
            f" deepspeed=={RELEASE}"
        )
    active: Any = deepspeed.get_accelerator()
    accelerator = active.device_name()
    if accelerator != device.type:
        raise ConfigError(
            f"environment variable DS_ACCELERATOR={accelerator}, but train.device is {device.type}"
        )
    for old in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # what the release calls
        warnings.filterwarnings("ignore", f"`torch.distributed.{old}` is deprecated")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


def need_nvme(path: str) -> None:
    """Refuse NVMe where it cannot work; what killed runs left on the drive goes.

    Raises:
        ConfigError: the folder cannot be written, or DeepSpeed cannot build its reader.
    """
    from deepspeed.ops.op_builder import (  # noqa: PLC0415  an extra
        AsyncIOBuilder,  # pyright: ignore[reportAttributeAccessIssue]  made by its import
    )

    if not os.access(path, os.W_OK):
        raise ConfigError(f"engine.nvme_path={path} is no folder that can be written")
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise ConfigError(
            f"engine.nvme_path={path}: DeepSpeed reads NVMe by libaio, which is not installed"
            " (Debian: libaio-dev); or say engine.offload_optimizer=cpu"
        )
    remove_abandoned(path)


def build_extensions(device: torch.device, nvme: bool) -> None:
    """Build what DeepSpeed compiles, one process at a time; later starts find it built.

    Args:
        device: a CPU needs an extension for its collectives.
        nvme: those that read and write a drive, too.

    Raises:
        ConfigError: somebody else's lock is in the way.
    """
    if device.type == "cpu":
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder  # noqa: PLC0415  an extra

        _build(_EXTENSION, ShareMemCommBuilder())
    if nvme:
        from deepspeed.ops import op_builder  # noqa: PLC0415  an extra

        builders: Any = op_builder  # its import makes their names
        for builder in (builders.PinMemoryBuilder(), builders.AsyncIOBuilder()):
            _build(builder.name, builder)


def _build(name: str, builder: Any) -> None:
    folder = Path(_get_build_directory(name, verbose=False))
    build_under_lock(folder, lambda: builder.load(verbose=False))


def build_under_lock(folder: Path, build: Callable[[], object]) -> None:
    """Build in ``folder``; what a build of ours that was killed has left there goes first.

    Raises:
        ConfigError: the lock there is not ours.
    """
    lock, ours = folder / "lock", folder / "v4_builds"
    with (folder / "v4_lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)  # goes with its process, as torch's lock does not
        if lock.exists():
            if not ours.exists():
                raise ConfigError(
                    f"{lock} belongs to a build outside of this run, or to one that was killed:"
                    " wait for it, or remove the file"
                )
            log.warning("removed %s, which a build of DeepSpeed that was killed had left", lock)
            lock.unlink()
        ours.touch()
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that it did
            build()
        ours.unlink()
