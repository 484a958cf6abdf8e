"""Looks at the model's seams while a step runs: what the replaceable ops and casts really do.

For one step every op and activation cast is wrapped. Some rows of the first call of each are kept;
once the backward pass is done they are compared with the plain op in fp32. Not earlier: selective
activation checkpointing counts the matmuls of a block, and the audit's must not be among them. The
wrapped op's own result goes on unchanged, so the step keeps its bits.
"""

# Legend: E experts, O out, I in
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model.block import Block
from model.linear import (
    ActivationCast,
    BlockLinear,
    GroupedLinear,
    Linear,
    linear_op,
    reads_copies,
)
from quant.apply import SEAMS
from quant.indexer import hadamard
from quant.stored import to_bf16

_STORED = next(seam.modules for seam in SEAMS if seam.part == "stored")
_ROWS = 64  # of a call, that are compared
_OUTPUTS = 256  # of a weight, whose products are compared


@dataclass
class SeamReading:
    """What was seen, by module name.

    Attributes:
        input_dtypes: of each linear's first input.
        op_errors: rows of each linear's first product, relative to the plain op's in fp32.
        cast_errors: what each cast changed, relative; a Hadamard transform alone counts as nothing.
        rounded_weights: whether a weight is read as bf16; absent where it cannot be told.
        passes: how often each block ran, recomputation included.
        kept: comparisons still to make.
    """

    input_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    op_errors: dict[str, float] = field(default_factory=dict)
    cast_errors: dict[str, float] = field(default_factory=dict)
    rounded_weights: dict[str, bool] = field(default_factory=dict)
    passes: Counter[str] = field(default_factory=Counter)
    kept: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @torch.no_grad()
    def settle(self) -> None:
        """Make the comparisons, before any weight moves."""
        for compare in self.kept:
            compare()
        self.kept.clear()


@contextmanager
def watch_seams(model: nn.Module, gathered: bool) -> Iterator[SeamReading]:
    """Watch until the context ends.

    Args:
        model: whose seams are watched.
        gathered: whether weights are whole only while they are used.
    """
    reading = SeamReading()
    undo: list[Callable[[], Any]] = []
    for name, module in model.named_modules():
        if isinstance(module, Linear | GroupedLinear):
            undo.append(_watch_op(name, module, reading, gathered))
        elif isinstance(module, ActivationCast):
            undo.append(module.register_forward_hook(_cast_hook(name, reading)).remove)
        elif isinstance(module, Block):
            undo.append(module.attn_norm.register_forward_hook(_pass_hook(name, reading)).remove)
        if re.fullmatch(_STORED, name):
            _read_weight(name, module, reading)
    try:
        yield reading
    finally:
        for restore in undo:
            restore()


def _watch_op(
    name: str, module: Linear | GroupedLinear, reading: SeamReading, gathered: bool
) -> Callable[[], None]:
    op: Callable[..., Tensor] = module.op

    def look(x: Tensor, y: Tensor, w: Tensor, *offsets: Tensor) -> None:
        if name in reading.input_dtypes or not x.numel():
            return
        reading.input_dtypes[name] = x.dtype
        rows, w_OI = _busiest(w, *offsets) if offsets else (slice(0, _ROWS), w)
        x_NI, y_NO = (t.detach().flatten(0, -2)[rows] for t in (x, y))
        x_NI, y_NO, w_OI = x_NI.clone(), y_NO[:, :_OUTPUTS].clone(), w_OI.detach()[:_OUTPUTS]
        if gathered:  # it is freed after use
            w_OI = w_OI.clone()

        def compare() -> None:
            reading.op_errors[name] = _relative(y_NO, linear_op(x_NI.float(), w_OI.float()))

        reading.kept.append(compare)

    def watched(x: Tensor, w: Tensor, *more: Tensor) -> Tensor:
        y = op(x, w, *more)
        look(x, y, w, *(more[:1] if isinstance(module, GroupedLinear) else ()))
        return y

    def first_block(_: nn.Module, inputs: tuple[Tensor], y: Tensor) -> None:
        assert isinstance(module, BlockLinear)
        outs = module.out_features // module.groups
        look(inputs[0][..., 0, :], y[..., :outs], module.weight[:outs])

    if isinstance(module, BlockLinear) and reads_copies(op):  # one product may serve all blocks
        return module.register_forward_hook(first_block).remove
    module.op = watched
    return lambda: setattr(module, "op", op)


def _busiest(w_EOI: Tensor, offsets_E: Tensor) -> tuple[slice, Tensor]:
    """Some rows of the expert that has most, and its matrix."""
    counts_E = offsets_E.diff(prepend=offsets_E.new_zeros(1))
    expert = int(counts_E.argmax())
    stop = int(offsets_E[expert])
    start = stop - min(int(counts_E[expert]), _ROWS)
    return slice(start, stop), w_EOI.detach()[expert]


def _cast_hook(name: str, reading: SeamReading) -> Callable[..., None]:
    seen: set[str] = set()

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if name in seen or not output.numel():
            return
        x, y = (t.detach().flatten(0, -2)[:_ROWS].clone() for t in (inputs[0], output))
        if not bool(x.any()):
            return  # entries of documents too short to have one: every format holds a zero
        seen.add(name)

        def compare() -> None:
            error = _relative(y, x)
            if ".indexer." in name:
                error = min(error, _relative(hadamard(y), x))
            reading.cast_errors[name] = error

        reading.kept.append(compare)

    return hook


def _pass_hook(name: str, reading: SeamReading) -> Callable[..., None]:
    """Counts inside the block: a recomputation does not come in through its own call."""

    def hook(*_: Any) -> None:
        reading.passes[name] += 1

    return hook


def _read_weight(name: str, module: nn.Module, reading: SeamReading) -> None:
    master, read = module._parameters.get("weight"), module.weight
    if isinstance(master, DTensor):
        return  # read only when gathered
    if master is None or not isinstance(read, Tensor) or not master.numel():
        return  # ZeRO 3 leaves nothing here
    master, read = (t.detach().reshape(-1, t.shape[-1])[:_ROWS] for t in (master, read))
    if not torch.equal(to_bf16(master), master):
        reading.rounded_weights[name] = not torch.equal(read, master)


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
