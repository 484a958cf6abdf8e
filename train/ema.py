"""Exponential moving average of the weights, an option (``train.ema_decay``)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class WeightAverage:
    """``average <- decay * average + (1 - decay) * weight`` after every step that was applied.

    Args:
        named_parameters: name and weight; the average starts at the weight.
        decay: fraction kept each step.

    Attributes:
        averages: name -> fp32 average.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], decay: float) -> None:
        self._weights = {name: p.detach() for name, p in named_parameters}
        self.decay = decay
        self.averages = {name: w.clone().float() for name, w in self._weights.items()}

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again at the current weights."""
        for name, average in self.averages.items():
            average.copy_(self._weights[name])

    @torch.no_grad()
    def update(self) -> None:
        """Take in the current weights."""
        for name, average in self.averages.items():
            average.lerp_(self._weights[name].float(), 1.0 - self.decay)

    def state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint."""
        return {f"ema.{name}": average for name, average in self.averages.items()}
