"""Exponential moving average of the weights, an option (``train.ema_decay``)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from train.config.schema import Weights
from train.errors import UserError

_MODEL, _AVERAGE = "model.", "ema."  # of names in checkpoints


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

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model computes with the average meanwhile; afterwards every bit is as before."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> dict[str, Tensor]:
        """Tensors of a checkpoint."""
        return {f"{_AVERAGE}{name}": average for name, average in self.averages.items()}

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.averages.items():
            weight = self._weights[name].clone()
            self._weights[name].copy_(average)
            average.copy_(weight)


def saved_name(name: str, weights: Weights, parameters: Collection[str]) -> str:
    """Where a checkpoint holds one of the model's tensors; buffers are not averaged.

    Args:
        name: of the parameter or buffer.
        weights: which are meant.
        parameters: names of the parameters.
    """
    averaged = weights is Weights.average and name in parameters
    return f"{_AVERAGE if averaged else _MODEL}{name}"


def saved_model(
    state: Mapping[str, Tensor], model: nn.Module, weights: Weights
) -> dict[str, Tensor]:
    """Name in a checkpoint -> tensor of the model to fill from it.

    Args:
        state: what a checkpoint of this model holds.
        model: it, or this process's part of it.
        weights: which are meant.
    """
    parameters = {name for name, _ in model.named_parameters()}
    own = {n.removeprefix(_MODEL): t for n, t in state.items() if n.startswith(_MODEL)}
    return {saved_name(name, weights, parameters): tensor for name, tensor in own.items()}


def require(weights: Weights, folder: Path, saved: Iterable[str], asked_by: str) -> None:
    """Refuse a checkpoint without the weights that are asked for.

    Args:
        weights: which are meant.
        folder: the checkpoint.
        saved: names of its tensors.
        asked_by: the key or option, for the message.

    Raises:
        UserError: names it and the checkpoint.
    """
    if weights is Weights.average and not any(name.startswith(_AVERAGE) for name in saved):
        raise UserError(
            f"{asked_by}={weights.value}: checkpoint {folder} holds {Weights.model.value} weights"
            " only; runs with train.ema_decay above 0 save averages"
        )
