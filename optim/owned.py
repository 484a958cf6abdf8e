"""A parameter as the algorithm that owns it holds it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class OwnedParameter:
    """A parameter that an algorithm owns.

    Attributes:
        name: fully qualified.
        parameter: whole, or a DTensor.
        weight_decay: coefficient.
        master: fp32 values in host memory, where the parameter is not its own master.
    """

    name: str
    parameter: Tensor
    weight_decay: float
    master: Tensor | None = None
