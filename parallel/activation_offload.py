"""What blocks keep for the backward pass rests in host memory (``parallel.offload_activations``).

When a block has run, what it keeps begins to travel to the host while the next block runs; then the
device lets go of it. When the backward pass comes to a block, what the block before it needs begins
to travel back. So the device holds what two blocks keep, whatever the depth. Bits travel: results
are the same. The last block stays on the device, where the backward pass begins.

It acts on storages, not on tensors: a storage that several views are kept of travels once, and what
the weights own (parameters, gathered ones too, and their copies in the compute dtype) stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from model.block import Block
from optim.offload import Arrival, Transfers
from parallel.activation_checkpoint import Frozen, checkpoint_blocks
from parallel.compiled_blocks import CompiledBlocks

LEAST_BYTES = 4096  # of a storage that travels; a smaller one is not worth a copy


def prepare_blocks(
    model: nn.Module,
    checkpoint: str,
    offload: ActivationOffload | None,
    compiled: CompiledBlocks | None = None,
) -> None:
    """Say of a model's blocks what they recompute, and where they keep the rest.

    Args:
        model: holds :class:`model.block.Block` modules.
        checkpoint: see :func:`parallel.activation_checkpoint.checkpoint_blocks`.
        offload: takes it to the host; None: it stays.
        compiled: blocks become graphs, which recompute by themselves; without ``offload``.
    """
    if compiled is not None:
        assert offload is None
        compiled.install(model, checkpoint == "block")
        return
    checkpoint_blocks(model, checkpoint, None if offload is None else offload.keep)
    if offload is not None:
        offload.install(model)


class ActivationOffload:
    """Takes what the blocks of a model keep to the host, and brings it back in time.

    Args:
        transfers: of the device that computes.
        least_bytes: of a storage that travels.
    """

    def __init__(self, transfers: Transfers, least_bytes: int = LEAST_BYTES) -> None:
        self._transfers, self._least = transfers, least_bytes
        self._parcels: WeakValueDictionary[int, _Parcel] = WeakValueDictionary()
        self._running: _Block | None = None
        self._leaving: tuple[Arrival, list[_Parcel]] | None = None
        self._watched: set[nn.Module] = set()

    def install(self, model: nn.Module) -> int:
        """Let every block of ``model`` but the last keep on the host what it keeps.

        Args:
            model: holds :class:`model.block.Block` modules, in the order in which they run.

        Returns:
            Number of blocks that do.
        """
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        for place, block in enumerate(blocks):
            block.forward = partial(
                self._run, block.forward, block, place == 0, place == len(blocks) - 1
            )
        return max(0, len(blocks) - 1)

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Take a tensor of the running block along; what comes back gives it again.

        For what a block keeps by itself, past autograd (``activation_checkpoint=selective``).
        """
        assert self._running is not None, "no block is running"
        kept = self._pack(self._running, tensor.detach())
        return Frozen(kept) if isinstance(kept, Tensor) else kept

    def _run(
        self, forward: Callable[..., Any], block: nn.Module, first: bool, last: bool, *args: Any,
        **named: Any,
    ) -> Any:  # fmt: skip
        if not torch.is_grad_enabled():
            return forward(*args, **named)
        if block not in self._watched:
            self._watched.add(block)
            for inner in block.modules():  # a part that FSDP gathers by itself, later than here
                if inner is not block and isinstance(inner, FSDPModule):
                    inner.register_forward_pre_hook(self._note_weights)
        before = None if first else self._running
        self._running = running = _Block(self._transfers, before, _owned_by_weights(block))
        with saved_tensors_hooks(partial(self._pack, running), _unpack):
            out = forward(*args, **named)
        self._let_go()
        if not last:
            self._send(running)
        return out

    def _note_weights(self, module: nn.Module, _: Any) -> None:
        if self._running is not None:
            self._running.weights |= _owned_by_weights(module)

    def _pack(self, running: _Block, tensor: Tensor) -> Tensor | _Kept:
        if type(tensor) is not Tensor or tensor.device != self._transfers.device:
            return tensor
        storage = tensor.untyped_storage()
        if storage.nbytes() < self._least or storage._cdata in running.weights:
            return tensor
        parcel = self._parcels.get(storage._cdata)
        if parcel is None or not parcel.holds(tensor):
            parcel = _Parcel(tensor)
            self._parcels[storage._cdata] = parcel
        running.parcels[id(parcel)] = parcel
        return _Kept(running, parcel, tensor)

    def _send(self, running: _Block) -> None:
        """Begin to copy what a block keeps, once each."""
        parcels = [parcel for parcel in running.parcels.values() if parcel.rest is None]
        if not parcels:
            return
        arrival = self._transfers.take_down([parcel.bytes() for parcel in parcels])
        for parcel, rest in zip(parcels, arrival.tensors, strict=True):
            parcel.rest = rest
        self._leaving = arrival, parcels

    def _let_go(self) -> None:
        """Let the device's work wait for the copies of the block before, and free their sources."""
        if self._leaving is not None:
            arrival, parcels = self._leaving
            arrival.on_device()
            for parcel in parcels:
                parcel.here = None
            self._leaving = None


class _Parcel:
    """A storage that a block keeps.

    Attributes:
        here: on the device; None while it rests on the host alone.
        rest: its bytes on the host; None before they travel.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.here: UntypedStorage | None = tensor.untyped_storage()
        self.rest: Tensor | None = None
        self._source, self._size = StorageWeakRef(self.here), self.here.nbytes()
        self._seen = tensor._version

    def holds(self, tensor: Tensor) -> bool:
        """Whether it is the storage of a tensor, unchanged since it was packed."""
        return not self._source.expired() and self._seen == tensor._version

    def bytes(self) -> Tensor:
        """The whole storage."""
        assert self.here is not None
        assert self.here.nbytes() == self._size, "it was freed before the block had ended"
        return torch.empty(0, dtype=torch.uint8, device=self.here.device).set_(self.here)


class _Block:
    """What one pass through a block keeps; nothing here holds it alive but autograd's graph.

    Args:
        transfers: of the device.
        before: the pass through the block before, whose backward pass comes next.
        weights: storages that stay.
    """

    def __init__(self, transfers: Transfers, before: _Block | None, weights: set[int]) -> None:
        self.weights = weights
        self.parcels: WeakValueDictionary[int, _Parcel] = WeakValueDictionary()
        self._transfers, self._before = transfers, before
        self._coming: tuple[Arrival, list[_Parcel]] | None = None
        self._came = False

    def come(self) -> None:
        """Bring everything back, and begin to bring what the block before needs."""
        if self._came:
            return
        self._came = True
        self._fetch()
        if self._coming is not None:
            arrival, parcels = self._coming
            for parcel, copy in zip(parcels, arrival.on_device(), strict=True):
                parcel.here = copy.untyped_storage()
            self._coming = None
        if self._before is not None:
            self._before._fetch()
            self._before = None

    def _fetch(self) -> None:
        if self._coming is not None:  # it is on its way
            return
        away: list[tuple[_Parcel, Tensor]] = []
        for parcel in self.parcels.values():
            if parcel.here is None:
                assert parcel.rest is not None
                away.append((parcel, parcel.rest))
        if away:
            arrival = self._transfers.fetch([rest for _, rest in away])
            self._coming = arrival, [parcel for parcel, _ in away]


class _Kept:
    """What is kept instead of a tensor; a call gives the tensor again."""

    def __init__(self, running: _Block, parcel: _Parcel, tensor: Tensor) -> None:
        self._running, self._parcel = running, parcel
        self._dtype = tensor.dtype
        self._view: tuple[int, Sequence[int], Sequence[int]] = (
            int(tensor.storage_offset()), tensor.size(), tensor.stride(),
        )  # fmt: skip

    def __call__(self) -> Tensor:
        self._running.come()
        storage = self._parcel.here
        assert storage is not None
        return torch.empty(0, dtype=self._dtype, device=storage.device).set_(storage, *self._view)


def _unpack(kept: Tensor | _Kept) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept()


def _owned_by_weights(block: nn.Module) -> set[int]:
    """Storages of a block's parameters, buffers, and their copies in the compute dtype."""
    owned: list[Tensor] = [*block.parameters(), *block.buffers()]
    copies = (getattr(module, "copy", None) for module in block.modules())
    owned += [copy for copy in copies if isinstance(copy, Tensor)]
    local = (t.to_local() if isinstance(t, DTensor) else t for t in owned)
    return {t.untyped_storage()._cdata for t in local}
