"""Looks at the model's seams while a step runs: what the replaceable ops and casts really do.

For one step every op and activation cast is wrapped. The first call of each is compared with the
plain op in fp32; the wrapped op's own result goes on unchanged, so the step keeps its bits.
"""

# Legend: N rows, I in, O out
from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model.linear import ActivationCast, GroupedLinear, Linear, grouped_linear_op, linear_op
from quant.apply import SEAMS
from quant.indexer import hadamard
from quant.stored import to_bf16

_STORED = next(seam.modules for seam in SEAMS if seam.part == "stored")


@dataclass
class SeamReading:
    """What was seen, by module name.

    Attributes:
        input_dtypes: of each linear's first input.
        op_errors: each linear's first product, relative to the plain op's in fp32.
        cast_errors: what each cast changed, relative; a Hadamard transform alone counts as nothing.
        rounded_weights: whether a weight is read as bf16; absent where it cannot be told.
    """

    input_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    op_errors: dict[str, float] = field(default_factory=dict)
    cast_errors: dict[str, float] = field(default_factory=dict)
    rounded_weights: dict[str, bool] = field(default_factory=dict)


@contextmanager
def watch_seams(model: nn.Module) -> Iterator[SeamReading]:
    """Watch until the context ends."""
    reading = SeamReading()
    undo: list[Callable[[], Any]] = []
    for name, module in model.named_modules():
        if isinstance(module, Linear | GroupedLinear):
            undo.append(_watch_op(name, module, reading))
        elif isinstance(module, ActivationCast):
            undo.append(module.register_forward_hook(_cast_hook(name, reading)).remove)
        if re.fullmatch(_STORED, name):
            _read_weight(name, module, reading)
    try:
        yield reading
    finally:
        for restore in undo:
            restore()


def _watch_op(
    name: str, module: Linear | GroupedLinear, reading: SeamReading
) -> Callable[[], None]:
    op: Callable[..., Tensor] = module.op
    plain = linear_op if isinstance(module, Linear) else grouped_linear_op

    def watched(x: Tensor, w: Tensor, *offsets: Tensor) -> Tensor:
        y = op(x, w, *offsets)
        if name not in reading.op_errors and x.numel():
            reading.input_dtypes[name] = x.dtype
            with torch.no_grad():
                expected = plain(x.detach().float(), w.detach().float(), *offsets)
                reading.op_errors[name] = _relative(y, expected)
        return y

    module.op = watched
    return lambda: setattr(module, "op", op)


def _cast_hook(name: str, reading: SeamReading) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if name in reading.cast_errors or not output.numel():
            return
        with torch.no_grad():
            error = _relative(output, inputs[0])
            if ".indexer." in name:
                error = min(error, _relative(hadamard(output), inputs[0]))
        reading.cast_errors[name] = error

    return hook


def _read_weight(name: str, module: nn.Module, reading: SeamReading) -> None:
    master, read = module._parameters.get("weight"), module.weight
    if master is None or not isinstance(read, Tensor) or torch.equal(to_bf16(master), master):
        return
    reading.rounded_weights[name] = not torch.equal(read, master)


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
