"""Which code served each op: counted where the table calls it, with what that call started.

A selection says what should run; this says what did. :mod:`model.kernels.select` enters
:func:`serving` around every call of an op, and whoever starts a kernel says so by :func:`started`:
``launch`` of Triton's, ``KernelLibrary.call`` of the C++ ones. An implementation that starts
nothing of its own kind ran plain torch, whatever its name is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field

from model.config import Kernels

KERNELS_OF_OWN = (Kernels.triton, Kernels.compiled)


@dataclass
class Ran:
    """What ran while it was recorded.

    Attributes:
        calls: (op, kind that served it) -> calls by the table.
        started: (op, kind) -> kernels started inside them, on the calling thread.
        without: (op, kind) -> calls that started no kernel.
        kernels: kernel -> times it was started by anyone, backward passes included.
        heads: precision (``fp32``, ``tf32`` or ``bf16``) -> chunks of logits the head formed in it.
    """

    calls: Counter[tuple[str, Kernels]] = field(default_factory=Counter)
    started: Counter[tuple[str, Kernels]] = field(default_factory=Counter)
    without: Counter[tuple[str, Kernels]] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    heads: Counter[str] = field(default_factory=Counter)

    def by_op(self) -> dict[str, str]:
        """Op -> the code that served it, as a receipt tells it; several kinds are joined by ``+``.

        A call that was to start kernels of its own and started none counts as plain torch.
        """
        kinds: dict[str, set[str]] = {}
        for (op, kind), calls in self.calls.items():
            plain = self.without[op, kind] if kind in KERNELS_OF_OWN else 0
            found = kinds.setdefault(op, set())
            found |= {kind.value} if plain < calls else set()
            found |= {Kernels.torch.value} if plain else set()
        return {op: "+".join(sorted(found)) for op, found in sorted(kinds.items())}


# Of the process, not of a context: backward passes of CUDA run on threads of their own.
_open: list[Ran] = []
_inside: ContextVar[tuple[str, Kernels] | None] = ContextVar("inside", default=None)


@contextmanager
def recorded() -> Iterator[Ran]:
    """Records what runs while it is open."""
    ran = Ran()
    _open.append(ran)
    try:
        yield ran
    finally:
        _open.remove(ran)


def serving(op: str, kind: Kernels) -> AbstractContextManager[None]:
    """Around one call of an op by the table.

    Args:
        op: its name.
        kind: of the implementation that is called.
    """
    return _served(op, kind) if _open else nullcontext()


@contextmanager
def _served(op: str, kind: Kernels) -> Iterator[None]:
    before = [ran.started[op, kind] for ran in _open]
    token = _inside.set((op, kind))
    try:
        yield
    finally:
        _inside.reset(token)
        for ran, count in zip(_open, before, strict=True):
            ran.calls[op, kind] += 1
            ran.without[op, kind] += ran.started[op, kind] == count


def head_multiplied(precision: str) -> None:
    """The head forms the logits and gradients of a chunk.

    Args:
        precision: of its products.
    """
    for ran in _open:
        ran.heads[precision] += 1


def started(kernel: str) -> None:
    """A kernel is started.

    Args:
        kernel: its name.
    """
    for ran in _open:
        ran.kernels[kernel] += 1
        if (inside := _inside.get()) is not None:
            ran.started[inside] += 1
