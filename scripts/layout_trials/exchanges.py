"""What a rank exchanges in a step and what it holds at once, seen in a traced step.

:class:`ExchangeWatch` is told of every operation. An exchange belongs to the code that began it,
found on the stack, and to the block that computes then; under recomputation a block's backward pass
follows its second forward pass, which says which block it is. The closed forms of the same stand in
:mod:`scripts.layout_trials.exchange_forms`.

Bytes of an exchange: all-gather and all-to-all, the result; reduce-scatter, the operand; send,
receive and all-reduce, the tensor. Groups of one rank exchange nothing.
"""

from __future__ import annotations

import re
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optim.build import Optimizer
from parallel.pipeline_stage import ModelPart

_SMALL = 4096  # bytes of tensors that are not worth a look at the stack
_FSDP = _fsdp_param_group.FSDPParamGroup
ENDS = "ends"  # embedding, head and what else is in no block
GATHERED, GRADIENTS, ENTRIES = "gathered weights", "gradients", "gathered entries"
ACTIVATIONS, UPDATE = "activations and temporary", "update"
ROWS, COUNTS, DOCUMENTS = "experts' rows", "experts' counts", "counts of documents"
MUON, COPY, STREAMS, SUMS = "Muon's matrices", "embedding's copy", "streams", "sums"
GREETING = "neighbours' first word"  # pipelining's own, before a first step


class Key(NamedTuple):
    """Which exchange.

    Attributes:
        layer: ``layers.N``, ``mtp.N`` or ``ends``.
        what: travels.
    """

    layer: str
    what: str


@dataclass
class Seen:
    """How often, and bytes in all."""

    count: int = 0
    bytes: int = 0

    def add(self, count: int, size: int) -> None:
        """Some more of one size."""
        self.count += count
        self.bytes += count * size


# ---- seen ----------------------------------------------------------------------------------------
class ExchangeWatch(TorchDispatchMode):
    """Sees a step on fake tensors.

    What is read on the host is 1: there are no values.

    Args:
        model: of the rank.
        optimizer: of its parameters.

    Attributes:
        seen: the exchanges.
        peak: bytes at the peak by kind, without parameters and optimizer states.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__()
        self.seen: defaultdict[Key, Seen] = defaultdict(Seen)
        self.peak: dict[str, int] = {}
        parameters, states = _parameters_here(model), _states(optimizer)
        self._fixed = {
            "parameters": sum(map(_size, parameters)),
            "optimizer states": sum(map(_size, states)),
        }
        self._block = ENDS
        roots = model.stages if isinstance(model, ModelPart) else [model]
        self._names = {module: n for root in roots for n, module in root.named_modules()}
        self._trips: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self._live: Counter[str] = Counter()
        # place -> kind, bytes; what was there before the step is counted apart
        self._storages: dict[int, tuple[str, int]] = {
            tensor.untyped_storage()._cdata: (ACTIVATIONS, 0) for tensor in [*parameters, *states]
        }
        self._most = 0
        self._patches = [
            mock.patch.object(module, name, self._resizing(getattr(_fsdp_param, name)))
            for module in (_fsdp_param, _fsdp_param_group)
            for name in ("alloc_storage", "free_storage")
            if hasattr(module, name)
        ]
        self._patches.append(mock.patch.object(_FSDP, "post_backward", self._gradients_made()))

    def __enter__(self) -> Any:
        for patch in self._patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for patch in self._patches:
            patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.startswith(("c10d::", "_c10d_functional::")):
            size = _payload(name.partition("::")[2], args, out)
            if size is not None:
                short = name.partition("::")[2]
                self.seen[self._whose(short, size, sys._getframe(1))].add(1, size)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return out

    def memory(self) -> dict[str, int]:
        """Bytes at the peak by kind, and all together."""
        traced = (GATHERED, GRADIENTS, ENTRIES, ACTIVATIONS, UPDATE)
        kinds = self._fixed | {kind: self.peak.get(kind, 0) for kind in traced}
        return kinds | {"total": sum(kinds.values())}

    # -- whose exchange
    def _whose(self, name: str, size: int, frame: FrameType | None) -> Key:
        what = {"all_to_all_single": ROWS, "send": STREAMS, "recv_": STREAMS}.get(name, "")
        trip: Any = None
        for scope, owner in _scopes(frame):
            if scope == "Block.forward":
                self._block = owner.name
                break
            if scope.startswith("FSDPParamGroup."):
                found = re.match(r"(layers|mtp)\.\d+", self._names[owner.modules[0]])
                way = "gradients" if "post_backward" in scope else "parameters"
                return Key(found[0] if found else ENDS, way)
            if scope.startswith("EmbeddingCopy."):
                return Key(ENDS, COPY)
            if not what and scope.startswith(("_TokenTrip.", "_EntryTrip.")):
                what, trip = _trip(owner, scope.endswith("back")), owner
            what = what or _NAMES.get(scope.partition(".")[0], "")
        if trip is not None:  # one that comes back comes to the block that sent it
            return Key(self._trips.setdefault(trip, self._block), what)
        if what == STREAMS and size == 4:
            what = GREETING
        if what in (MUON, STREAMS, GREETING, ""):
            return Key(ENDS, what or SUMS)
        return Key(self._block, what)

    # -- what is alive
    def _note(self, tensor: Tensor) -> None:
        if isinstance(tensor, DTensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()
        kind = self._kind(sys._getframe(2)) if size >= _SMALL else ACTIVATIONS
        self._storages[key] = kind, size
        weakref.finalize(storage, self._gone, key)
        self._changed(kind, size)

    def _gone(self, key: int) -> None:
        kind, size = self._storages.pop(key)
        self._live[kind] -= size

    def _changed(self, kind: str, more: int) -> None:
        self._live[kind] += more
        total = sum(self._live.values())
        if total > self._most:
            self._most, self.peak = total, dict(self._live)

    def _kind(self, frame: FrameType | None) -> str:
        for scope, _ in _scopes(frame):
            if scope.startswith("FSDPParamGroup."):
                return GRADIENTS if "post_backward" in scope else GATHERED
            if scope.startswith(("_EntryTrip.", "_WholeRowEntries.")):
                return ENTRIES
            if scope.endswith("Engine.optimizer_step"):
                return UPDATE
            if scope in ("Block.forward", "Pipeline.step"):
                break
        return ACTIVATIONS

    def _resizing(self, resize: Any) -> Any:
        """FSDP's own way to give memory back, which is no operation."""

        def resized(tensor: Tensor) -> None:
            self._note(tensor)
            key = tensor.untyped_storage()._cdata
            resize(tensor)
            kind, before = self._storages[key]
            size = tensor.untyped_storage().nbytes()
            self._storages[key] = GATHERED, size
            self._live[kind] -= before
            self._changed(GATHERED, size)

        return resized

    def _gradients_made(self) -> Any:
        original, watch = _FSDP.post_backward, self

        def post_backward(self: Any, *unused: Any) -> Any:
            out = original(self, *unused)
            for parameter in self.fsdp_params:
                whole = getattr(parameter, "_unsharded_param", None)
                for grad in (parameter.unsharded_accumulated_grad, getattr(whole, "grad", None)):
                    if isinstance(grad, Tensor):
                        watch._is_gradient(grad)
            return out

        return post_backward

    def _is_gradient(self, grad: Tensor) -> None:
        local = grad.to_local() if isinstance(grad, DTensor) else grad
        key = local.untyped_storage()._cdata
        kind, size = self._storages.get(key, (GRADIENTS, 0))
        if kind != GRADIENTS:
            self._storages[key] = GRADIENTS, size
            self._live[kind] -= size
            self._live[GRADIENTS] += size


_NAMES = {
    "AllToAllDispatcher": COUNTS, "ShardedMuon": MUON, "_Round": MUON,
    "_SharedQueries": "queries to score", "ShardedRows": DOCUMENTS,
}  # fmt: skip


def _scopes(frame: FrameType | None) -> Iterator[tuple[str, Any]]:
    """Methods on the stack, innermost first, with their objects."""
    while frame is not None:
        name = frame.f_code.co_qualname
        if "." in name:
            yield name, frame.f_locals.get("self")
        frame = frame.f_back


def _trip(trip: Any, back: bool) -> str:
    way = "back" if back else "there"
    if hasattr(trip, "_channels"):
        return tokens_before(trip._count, sum(trip._channels), way)
    return entries(trip._sent.shape[-1], way)


def tokens_before(count: int, channels: int, way: str) -> str:
    """Name of the exchange of the tokens before a shard."""
    return f"tokens before, {count} x {channels}, {way}"


def entries(dim: int, way: str) -> str:
    """Name of the exchange of entries."""
    return f"entries of {dim}, {way}"


def _payload(name: str, args: Any, out: Any) -> int | None:
    """Bytes; None: no exchange."""
    if name == "all_to_all_single":
        return _size(out)
    if name == "alltoall_base_":
        return _size(args[0])
    if name in ("_allgather_base_", "_reduce_scatter_base_"):
        large, small = sorted((_size(args[0]), _size(args[1])), reverse=True)
        return None if large == small else large
    if name in ("allreduce_", "send", "recv_", "broadcast_"):
        return sum(_size(tensor) for tensor in args[0])
    if name in ("wait_tensor", "barrier"):
        return None
    raise ValueError(f"an exchange without a rule: {name}")


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _parameters_here(model: nn.Module) -> list[Tensor]:
    copies = [
        stage.embed.weight
        for stage in (model.stages if isinstance(model, ModelPart) else [])
        if stage.copies_embedding
    ]
    return [_local(p) for p in [*model.parameters(), *copies]]


def _states(optimizer: Optimizer) -> list[Tensor]:
    return [_local(t) for states in optimizer.state_dict().values() for t in states.values()]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
