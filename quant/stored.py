"""Parameters read as their stored dtype: bf16 rounding of a master wherever the model reads it.

Most tensors that the released checkpoint keeps in bf16 (norms, embedding, head, gate) are not
weights of a replaceable op. So the seam is the attribute itself: the module's class is extended by
a property ``weight``, which rounds on reading. The parameter stays where it is, under its name, in
``_parameters``, for optimizers, checkpoints and sharding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from quant.fake_quant import straight_through
from quant.probe import QuantProbe


def to_bf16(x: Tensor) -> Tensor:
    """Values rounded to bf16, in the dtype of ``x``."""
    return x.to(torch.bfloat16).to(x.dtype)


class _StoredWeight(nn.Module):
    """Mixed into a module's class; reads ``weight`` rounded while a probe is set."""

    stored_name: str
    stored_probe: QuantProbe | None

    @property
    def weight(self) -> Tensor:
        master = self._parameters["weight"]
        assert master is not None
        # A sharded parameter is not what the model computes with: FSDP reads and keeps it.
        if self.stored_probe is None or isinstance(master, DTensor):
            return master
        self.stored_probe.saw(self.stored_name)
        return straight_through(master, to_bf16)

    @weight.setter
    def weight(self, value: Any) -> None:
        self._parameters["weight"] = value


def read_as_stored(module: nn.Module, name: str, probe: QuantProbe) -> None:
    """Let ``module.weight`` read as bf16 from now on.

    Args:
        module: has a parameter ``weight``.
        name: for the probe.
        probe: told of every read.
    """
    if not isinstance(module, _StoredWeight):
        kind = type(module)
        module.__class__ = type(f"Stored{kind.__name__}", (_StoredWeight, kind), {})
    module.stored_name, module.stored_probe = name, probe  # type: ignore[assignment]


def read_as_master(module: nn.Module) -> None:
    """Undo :func:`read_as_stored`; the class stays, since sharding may have extended it since."""
    assert isinstance(module, _StoredWeight)
    module.stored_probe = None
