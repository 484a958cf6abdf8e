"""A double of DeepSpeed's reader and writer of swap files, where libaio is not installed.

It takes the place of the compiled op alone: DeepSpeed's own swappers call it, and the files that it
writes are real. What it shows of NVMe is the path of the bytes, not its speed.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Handle:
    """As ``aio_handle`` of the op, but each request is done at once.

    Args:
        tuning: block size, queue depth and the like; without effect.

    Attributes:
        written: bytes, over all handles of this process.
    """

    written = 0

    def __init__(self, **tuning: Any) -> None:
        self._pending, self._locked = 0, set()

    def async_pread(self, buffer: Tensor, path: str, offset: int) -> int:
        with Path(path).open("rb") as file:
            file.seek(offset)
            data = file.read(buffer.nbytes)
        assert len(data) == buffer.nbytes, (path, len(data), buffer.nbytes)
        buffer.view(torch.uint8).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        return self._begun()

    def async_pwrite(self, buffer: Tensor, path: str, offset: int) -> int:
        try:
            with Path(path).open("r+b" if Path(path).exists() else "wb") as file:
                file.seek(offset)
                file.write(buffer.contiguous().view(torch.uint8).numpy().tobytes())
        except OSError:
            return -1  # as the op
        Handle.written += buffer.nbytes
        return self._begun()

    def wait(self) -> int:
        """Number of requests since the last call."""
        done, self._pending = self._pending, 0
        return done

    def new_cpu_locked_tensor(self, numel: int, example: Tensor) -> Tensor:
        tensor = torch.empty(numel, dtype=example.dtype)
        self._locked.add(tensor.untyped_storage().data_ptr())
        return tensor

    def free_cpu_locked_tensor(self, tensor: Tensor) -> bool:
        self._locked.discard(tensor.untyped_storage().data_ptr())
        return True

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._locked

    def _begun(self) -> int:
        self._pending += 1
        return 0


def install(least_bytes: int = 1024) -> None:
    """Let DeepSpeed find the double where it would load the op, for this process.

    Args:
        least_bytes: of a piece that is swapped, in place of DeepSpeed's 1 MiB.
    """
    import deepspeed.ops.op_builder as builders  # noqa: PLC0415  an extra
    from deepspeed.runtime.swap_tensor import (  # noqa: PLC0415  an extra
        optimizer_utils,
        partitioned_param_swapper,
    )

    builder: Any = builders.AsyncIOBuilder
    builder.is_compatible = lambda self, verbose=False: True
    builder.load = lambda self, verbose=True: SimpleNamespace(aio_handle=Handle)
    for module in (optimizer_utils, partitioned_param_swapper):
        module.MIN_AIO_BYTES = least_bytes
