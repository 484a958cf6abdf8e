"""Bytes of the tensors that are alive: what a step needs, whatever its process keeps besides.

Resident memory also holds what an allocator has and does not use. Buffers that an operator makes
and drops inside are not seen here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts tensors that are made while it is active, each storage once.

    Attributes:
        now: bytes alive.
        most: of them at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        before = {_place(tensor) for tensor in _plain((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _plain(out):
            if _place(tensor) not in before:
                self._made(tensor)
        return out

    def _made(self, tensor: Tensor) -> None:
        place, storage = _place(tensor), tensor.untyped_storage()
        if place in self._alive:
            return
        self._alive[place] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, place)

    def _gone(self, place: int) -> None:
        self.now -= self._alive.pop(place)


def _plain(tree: Any) -> list[Tensor]:
    """Its tensors; of a DTensor the shard is seen by itself."""
    return [
        leaf
        for leaf in tree_leaves(tree)
        if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor)
    ]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
