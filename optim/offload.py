"""Optimizer state in host memory, streamed through the device in chunks (``parallel.offload``).

Momentum and moments rest in host memory, pinned where the device is CUDA. Muon's arithmetic stays
on the device, so its bits do: a chunk of momentum travels there while the chunk before is
orthogonalised, and back while the next one is. What AdamW owns is moved on the host by torch's own
vector kernel: its gradient travels down and the new weight up.

On a CPU "device" and host are the same memory; the copies are made all the same, so that tests can
count them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec

HOST = torch.device("cpu")


class Arrival:
    """Copies on their way.

    Args:
        tensors: the copies.
        event: recorded behind them; None: they are there.

    Attributes:
        tensors: the same; they may not have come yet.
    """

    def __init__(self, tensors: list[Tensor], event: torch.Event | None) -> None:
        self.tensors, self._event = tensors, event

    def on_device(self) -> list[Tensor]:
        """Let the device's own work wait for them."""
        if self._event is not None:
            self._event.wait()
            for tensor in self.tensors:
                if tensor.is_cuda:
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return self.tensors

    def on_host(self) -> list[Tensor]:
        """Wait here until they have come."""
        if self._event is not None:
            self._event.synchronize()
        return self.tensors


class Transfers:
    """Copies between a device and the host, beside the device's work.

    Args:
        device: of the parameters.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pinned = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self.pinned else None

    def rest(self, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros in host memory, shaped like a tensor."""
        return torch.zeros(like.shape, dtype=dtype, pin_memory=self.pinned)

    def fetch(self, tensors: Sequence[Tensor]) -> Arrival:
        """Begin to copy from the host to the device."""
        with torch.cuda.stream(self._stream):
            copies = [t.to(self.device, non_blocking=True, copy=True) for t in tensors]
            return Arrival(copies, self._mark())

    def take_down(self, tensors: Sequence[Tensor]) -> Arrival:
        """Begin to copy from the device to the host, behind the device's work so far."""
        self._behind_work()
        with torch.cuda.stream(self._stream):
            copies = [torch.empty_like(t, device=HOST, pin_memory=self.pinned) for t in tensors]
            for copy, tensor in zip(copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            return Arrival(copies, self._mark())

    def send(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        """Begin to copy each source to its target, in either direction, behind the work so far."""
        self._behind_work()
        with torch.cuda.stream(self._stream):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
                if self._stream is not None and source.is_cuda:
                    source.record_stream(self._stream)

    def finish(self) -> None:
        """Wait for every copy: the host's memory is that of the step's end."""
        if self._stream is not None:
            self._stream.synchronize()

    def _behind_work(self) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def _mark(self) -> torch.Event | None:
        return self._stream.record_event() if self._stream is not None else None


def resting_zeros(like: Tensor, dtype: torch.dtype, transfers: Transfers | None) -> Tensor:
    """Zeros shaped like a parameter, on its device or, with ``transfers``, in host memory.

    Of a DTensor the part that lies here; the result is one of the same layout.
    """
    like = like.detach()
    if transfers is None:
        return torch.zeros_like(like, dtype=dtype)
    if isinstance(like, DTensor):
        spec = like._spec
        meta = None if spec.tensor_meta is None else spec.tensor_meta._replace(dtype=dtype)
        spec = DTensorSpec(spec.mesh, spec.placements, tensor_meta=meta)
        return DTensor(transfers.rest(like.to_local(), dtype), spec, requires_grad=False)
    return transfers.rest(like, dtype)


@dataclass(frozen=True)
class Offload:
    """What rests on the host.

    Attributes:
        transfers: of the device.
        masters: name -> fp32 master in host memory of a parameter that is bf16 on the device;
            other parameters are their own masters.
    """

    transfers: Transfers
    masters: Mapping[str, Tensor] = field(default_factory=dict)


def streamed(transfers: Transfers, chunks: Sequence[Sequence[Tensor]]) -> Iterator[list[Tensor]]:
    """Each chunk of host tensors on the device; what is written to it goes back to the host.

    The chunk behind is on its way while one is worked on, so two are on the device.

    Args:
        transfers: of the device.
        chunks: tensors in host memory.
    """
    arriving = transfers.fetch(chunks[0]) if chunks else None
    for number, chunk in enumerate(chunks):
        assert arriving is not None
        here = arriving.on_device()
        arriving = transfers.fetch(chunks[number + 1]) if number + 1 < len(chunks) else None
        yield here
        transfers.send(here, chunk)
