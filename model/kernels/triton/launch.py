"""How every Triton kernel here is started, registered as an operator, and given its tiles.

One Python function is an operator's implementation AND its shape function: it allocates outputs,
computes grids, calls torch, and starts kernels through :func:`launch` alone, which does nothing for
fake and meta tensors. So a step traces without a device, and whatever would read a value on the
host raises in the trace.

On CPU tensors kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` before this is imported):
slow, for tests. Its casts to bf16 and its products of bf16 are wrong, hence ``UPCAST``.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton.runtime.interpreter import InterpretedFunction

from model.kernels.ran import started

LIBRARY = torch.library.Library("v4", "FRAGMENT")
OPS = torch.ops.v4
ARCHITECTURES: tuple[str, ...] = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
INTERPRETER = "interpreter"
T = TypeVar("T")
# Operator -> its one function, for what looks inside operators (scripts/benchmarks/launches.py).
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}
_counter: ContextVar[Counter[str] | None] = ContextVar("launches", default=None)


@dataclass(frozen=True)
class Tile:
    """Sizes of a kernel's blocks, and how it is compiled.

    Attributes:
        sizes: constexpr -> value.
        warps: of a program.
        stages: of the loads' pipeline.
        options: of the compiler beyond these, such as ``matrix_instr_nonkdim``.
    """

    sizes: Mapping[str, Any]
    warps: int = 4
    stages: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)

    def constants(self) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        return {
            **self.sizes, "num_warps": self.warps, "num_stages": self.stages, **self.options,
        }  # fmt: skip


Tiles = Mapping[str, Tile]  # by architecture, or ``other``


@dataclass(frozen=True)
class Shipped:
    """A kernel as it is compiled for one shape class: for ahead-of-time compilation and its table.

    Attributes:
        name: of the line in the table.
        kernel: the jitted function.
        types: argument -> Triton's type (``*bf16``, ``i32``, ``i32:16`` where it is a multiple of
            16, ``fp32``); the others are constant.
        constants: constexprs beside the tile's; what a kernel does not take is passed over, here
            and in ``types``.
        tiles: architecture, or ``other``, -> tile.
        spills: architecture -> why registers are spilled there, and it is shipped still.
        replicates: architecture -> why warps compute a product several times there.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    tiles: Mapping[str, Tile]
    spills: Mapping[str, str] = field(default_factory=dict)
    replicates: Mapping[str, str] = field(default_factory=dict)


def tile_of(tiles: Mapping[str, T], architecture: str) -> T:
    """The tile (or number) of an architecture; ``other`` stands for those not named.

    Args:
        tiles: by architecture.
        architecture: as :func:`architecture_of` names it.
    """
    return tiles[architecture] if architecture in tiles else tiles["other"]


def architecture_of(device: torch.device) -> str:
    """``sm_90``, ``gfx942``, ...; ``interpreter`` for tensors that are on no such device.

    Args:
        device: of the tensors.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return INTERPRETER
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def upcast(x: Tensor) -> bool:
    """Whether products of ``x`` must be formed in fp32: the interpreter's bf16 is wrong."""
    return x.dtype == torch.bfloat16 and architecture_of(x.device) == INTERPRETER


def launch(kernel: Any, grid: Sequence[int], *args: Any, **constants: Any) -> None:
    """Start a kernel; the only place that does.

    Args:
        kernel: a ``triton.jit`` function.
        grid: programs along up to three axes; ints, so that nothing is read on the host.
        args: its run-time arguments, at least one tensor.
        constants: its constexprs and compile options.

    Raises:
        RuntimeError: CPU tensors, and the kernels were imported without the interpreter.
    """
    counter = _counter.get()
    if counter is not None:
        counter[kernel.fn.__name__] += 1
    started(kernel.fn.__name__)
    tensor = next(a for a in args if isinstance(a, Tensor))
    if isinstance(tensor, FakeTensor) or tensor.is_meta or 0 in grid:
        return
    if tensor.device.type == "cpu":
        if not isinstance(kernel, InterpretedFunction):
            raise RuntimeError(
                f"{kernel.fn.__name__}: Triton runs CPU tensors in its interpreter only, which"
                " TRITON_INTERPRET=1 switches on before the start"
            )
        with warnings.catch_warnings():  # masked lanes compute what they like
            warnings.simplefilter("ignore", RuntimeWarning)
            kernel[tuple(grid)](*args, **constants)
        return
    with torch.cuda.device(tensor.device):
        kernel[tuple(grid)](*args, **constants)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Counts launches by kernel while it is open, traced ones too."""
    counter: Counter[str] = Counter()
    token = _counter.set(counter)
    try:
        yield counter
    finally:
        _counter.reset(token)


def define(schema: str, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Register an operator ``torch.ops.v4.NAME``.

    Args:
        schema: ``NAME(Tensor x, ...) -> Tensor``.
        implementation: allocates and launches; serves as the shape function too.

    Returns:
        The operator.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    IMPLEMENTATIONS[f"v4::{name}"] = implementation
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, device)
    torch.library.register_fake(f"v4::{name}", implementation, lib=LIBRARY)
    return getattr(OPS, name)


def blocks(size: int, block: int) -> int:
    """How many blocks cover ``size``."""
    return -(-size // block)


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size``; what ``tl.arange`` takes."""
    return 1 << (size - 1).bit_length()
