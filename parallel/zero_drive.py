"""What DeepSpeed's NVMe offload lacks: a folder per process, and a look at what became of writes.

The release's reader and writer ask the kernel for results and look at none. A write that a full
drive cut short is noticed when the file is read again, by an abort of the process, and never where
the file had its size before: here room is taken before a file is first written, and what is read
back is compared with a sum over what was written. The kernel refuses addresses that are no multiple
of a block, as those of most gradients in a flat group are: they go by way of a buffer. Swap files
have fixed names, so two runs with one ``engine.nvme_path`` would write to the same ones; each
process gets a folder of its own, which goes with it, or, where it was killed, at the start of the
next run.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import socket
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from data.errors import DiskError

_PREFIX, _LOCK = f"v4_swap_{socket.gethostname()}_", "lock"  # locks may hold on one host alone
_BLOCK = 4096  # bytes; of some drives it is 512


class SwapFolder:
    """A folder of this process on the drive; it goes with the object, or with the process.

    Args:
        path: ``engine.nvme_path``.

    Raises:
        DiskError: the drive takes no folder.
    """

    def __init__(self, path: str) -> None:
        try:
            with _turn(path):  # nobody takes it for an abandoned one before it is locked
                self.path = tempfile.mkdtemp(prefix=_PREFIX, dir=path)
                lock = os.open(Path(self.path) / _LOCK, os.O_CREAT | os.O_RDWR)
                fcntl.flock(lock, fcntl.LOCK_EX)  # goes with its process
        except OSError as error:
            raise DiskError(f"engine.nvme_path={path} takes no folder: {error.strerror}") from error
        self.remove = weakref.finalize(self, _remove, self.path, lock)


def _remove(path: str, lock: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(lock)


def remove_abandoned(path: str) -> None:
    """Remove what killed processes of this host have left on the drive."""
    with _turn(path):
        for folder in Path(path).glob(f"{glob.escape(_PREFIX)}*"):
            with suppress(OSError), (folder / _LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held while its process lives
                shutil.rmtree(folder)


@contextmanager
def _turn(path: str) -> Iterator[None]:
    """One process of this machine at a time."""
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


class CheckedHandle:
    """DeepSpeed's handle of asynchronous reads and writes, whose results are looked at.

    Args:
        handle: its own.
        written: bytes and sum of what each file should hold; shared by the handles of a process.
        drive: ``engine.nvme_path``, for messages.
    """

    def __init__(self, handle: Any, written: dict[str, tuple[int, int]], drive: str) -> None:
        self._handle, self._written, self._drive = handle, written, drive
        self._reads: list[tuple[Tensor, Tensor, str]] = []  # where to, by way of, from
        self._borrowed: list[Tensor] = []
        self._pending = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def async_pwrite(self, buffer: Tensor, path: str, offset: int) -> int:
        """Begin to write a whole file.

        Raises:
            DiskError: the drive is full.
        """
        try:
            with open(path, "ab") as file:
                os.posix_fallocate(file.fileno(), 0, buffer.nbytes)
        except OSError as error:
            self._settle()
            raise DiskError(
                f"engine.nvme_path={self._drive} cannot hold {Path(path).name}"
                f" ({buffer.nbytes:,} bytes): {error.strerror}"
            ) from error
        self._written[path] = (buffer.nbytes, _sum(buffer))
        source = self._aligned(buffer)
        if source is not buffer:
            source.copy_(buffer)
        return self._begun(self._handle.async_pwrite(source, path, offset), path)

    def async_pread(self, buffer: Tensor, path: str, offset: int) -> int:
        """Begin to read a file.

        Raises:
            DiskError: it is not there in full.
        """
        with suppress(OSError):
            if os.path.getsize(path) >= buffer.nbytes:
                target = self._aligned(buffer)
                self._reads.append((buffer, target, path))
                return self._begun(self._handle.async_pread(target, path, offset), path)
        self._settle()
        raise DiskError(f"engine.nvme_path={self._drive} has lost {Path(path).name}")

    def wait(self) -> int:
        """Let all that was begun end; how many it were.

        Raises:
            DiskError: what was read is not what had been written.
        """
        done, reads = self._handle.wait(), self._reads
        self._pending, self._reads = 0, []
        for buffer, read, path in reads:
            if (read.nbytes, _sum(read)) != self._written[path]:
                raise DiskError(
                    f"engine.nvme_path={self._drive} gives back another {Path(path).name} than was"
                    " written: the drive fails, or somebody else wrote to it"
                )
            if read is not buffer:
                buffer.copy_(read)
        self._give_back()
        return done

    def _aligned(self, buffer: Tensor) -> Tensor:
        """The buffer, or one like it from which a drive reads."""
        if buffer.data_ptr() % _BLOCK == 0:
            return buffer
        self._borrowed.append(self._handle.new_cpu_locked_tensor(buffer.numel(), buffer))
        return self._borrowed[-1]

    def _begun(self, status: int, path: str) -> int:
        if status != 0:
            self._settle()
            raise DiskError(f"engine.nvme_path={self._drive}: {Path(path).name} cannot be opened")
        self._pending += 1
        return status

    def _settle(self) -> None:
        """A handle that goes with work pending aborts the process."""
        if self._pending:
            self._handle.wait()
        self._pending, self._reads = 0, []
        self._give_back()

    def _give_back(self) -> None:
        for buffer in self._borrowed:
            self._handle.free_cpu_locked_tensor(buffer)
        self._borrowed = []


def _sum(buffer: Tensor) -> int:
    return int(buffer.view(torch.int32).sum())


@contextmanager
def checked_io(drive: str) -> Iterator[None]:
    """Let what DeepSpeed builds meanwhile read and write by :class:`CheckedHandle`."""
    from deepspeed.ops.op_builder import (  # noqa: PLC0415  an extra
        AsyncIOBuilder,  # pyright: ignore[reportAttributeAccessIssue]  made by its import
    )

    load, written = AsyncIOBuilder.load, {}

    def checked(builder: Any, verbose: bool = False) -> Any:
        made = load(builder, verbose=verbose)
        return SimpleNamespace(
            aio_handle=lambda **options: CheckedHandle(made.aio_handle(**options), written, drive)
        )

    AsyncIOBuilder.load = checked
    try:
        yield
    finally:
        AsyncIOBuilder.load = load
