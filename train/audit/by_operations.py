"""A step's passes without the graphs of ``train.compile``, and how far theirs may be from them.

A graph runs its operations in another order and keeps what they would round. How far that moves a
gradient depends on the gradient: one whose terms cancel is moved by much, one that is a plain sum
by little. So it is measured: the passes run once more, operation by operation, with the streams in
front of every block moved by one unit of the compute dtype's last place, up or down at random. That
is as much as some twenty roundings at once. A graph may be ``_FACTOR`` times as far, and
:func:`allowed` in any case. Scaled by a tenth, turned around, or with another block's in it, a
gradient is farther.
"""

# Legend: S sums
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model.block import Block
from parallel.collectives import local
from parallel.engine import Shares
from parallel.pieces import total_of

# Fused graphs are 0.5 to 1.9 times as far (inductor in bf16); of a few elements one sample says
# little of their spread: up to 6 times.
_FACTOR, _FACTOR_OF_FEW, _FEW = 4.0, 16.0, 64
_UNITS = 4.0
_CHUNK = 1 << 20  # elements compared at once, in fp64


def allowed(unit: float) -> float:
    """Share of a plain sum, as a loss is, by which another order of operations may move it.

    Half the digits of fp32, in which sums are taken, and some units of the last place of what they
    are taken of.

    Args:
        unit: of the last place of the compute dtype.
    """
    return math.sqrt(torch.finfo(torch.float32).eps) + _UNITS * unit


@dataclass
class ByOperations:
    """What a step's passes gave, operation by operation.

    Attributes:
        shares: losses and loads.
        gradients: this rank's part of each, in host memory.
        moved: how far one unit of the last place moved each, as a norm.
        distances: how far the graphs' gradient is, as a norm.
        norms: of each.
        elements: of each, on all ranks.
    """

    shares: Shares = field(default_factory=Shares)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    distances: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)

    def keep(self, gradients: Iterable[tuple[str, Tensor]]) -> None:
        """Take them to the host: the device has no room for a second set."""
        self.gradients = {name: local(g).detach().to("cpu") for name, g in gradients}

    def compare(self, gradients: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
        """Distance of each to its own here, as a norm; infinite where one lacks. Collective."""
        found: dict[str, float] = {}
        for name, gradient in gradients:
            if name not in self.gradients:
                found[name] = math.inf
                continue
            squares_S = total_of(gradient, _squares(gradient, self.gradients[name]))
            found[name], self.norms[name] = squares_S.sqrt().tolist()
            self.elements[name] = gradient.numel()
        return found | {name: math.inf for name in self.gradients.keys() - found.keys()}

    def faults(self, unit: float) -> Iterator[str]:
        """Gradients of the graphs that are farther from their operations' than rounding takes them.

        Args:
            unit: of the last place of the compute dtype.
        """
        for name, distance in sorted(self.distances.items()):
            norm = self.norms.get(name, 0.0)
            factor = _FACTOR if self.elements.get(name, 0) >= _FEW else _FACTOR_OF_FEW
            bound = max(factor * self.moved.get(name, 0.0), allowed(unit) * norm)
            if not distance <= bound:
                yield (
                    f"train.compile=true: the graphs' gradient of {name} is {distance:.3g} off that"
                    f" of their operations, which has norm {norm:.3g}; {bound:.2g} may be rounding"
                )


def _squares(gradient: Tensor, kept: Tensor) -> Tensor:
    """Squares summed [2] of the difference, and of ``kept``; of this rank's part."""
    mine, sums_S = local(gradient).detach().reshape(-1), torch.zeros(2, dtype=torch.float64)
    sums_S = sums_S.to(mine.device)
    for ours, theirs in zip(mine.split(_CHUNK), kept.reshape(-1).split(_CHUNK), strict=True):
        theirs = theirs.to(ours.device, torch.float64)
        sums_S += torch.stack([(ours.double() - theirs).square().sum(), theirs.square().sum()])
    return sums_S


@contextmanager
def streams_moved(model: nn.Module, seed: int) -> Iterator[None]:
    """Every block gets its streams moved by one unit of their last place, up or down at random.

    Args:
        model: holds :class:`model.block.Block` modules.
        seed: of the directions.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def move(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, device = args[0], args[0].device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        up = torch.rand(x.shape, generator=generators[device], device=device) < 0.5
        unit = torch.finfo(x.dtype).eps
        return x * torch.where(up, 1 + unit, 1 - unit).to(x.dtype), *args[1:]

    hooks = [
        module.register_forward_pre_hook(move)
        for module in model.modules()
        if isinstance(module, Block)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
