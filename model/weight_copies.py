"""One copy of each weight in the compute dtype a step, instead of a cast at every use.

A plain op casts the fp32 master to the dtype of its input (``model/linear.py``). Over microbatches
and recomputations the same cast runs many times; here it runs once. Values and gradients are those
of the cast, to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model.linear import GroupedLinear, Linear, reads_copies
from model.precision import precision_of


class WeightCopies:
    """The copies of a model's weights.

    Args:
        model: whose ops are plain or replaced; a replaced one (quantisation) reads the master.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @torch.no_grad()
    def refresh(self, dtype: torch.dtype) -> None:
        """Copy every weight anew; call it when weights have moved, before a pass.

        Args:
            dtype: the compute dtype; fp32 needs no copies.
        """
        copies: list[Tensor] = []
        masters: list[Tensor] = []
        for name, module in self._model.named_modules():
            if not isinstance(module, Linear | GroupedLinear):
                continue
            master = module._parameters["weight"]
            if master is None or not self._wanted(name, module, master, dtype):
                module.copy = None
                continue
            if module.copy is None or module.copy.dtype != dtype:
                module.copy = torch.empty_like(master, dtype=dtype, requires_grad=False)
            copies.append(module.copy)
            masters.append(master)
        if copies:
            torch._foreach_copy_(copies, masters)

    @staticmethod
    def _wanted(
        name: str, module: Linear | GroupedLinear, master: Tensor, dtype: torch.dtype
    ) -> bool:
        if master.dtype == dtype or isinstance(master, DTensor) or module.weight is not master:
            return False
        return reads_copies(module.op) and precision_of(f"{name}.weight", "bf16").compute == dtype
