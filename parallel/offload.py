"""fp32 masters in host memory, bf16 weights on the device (``parallel.offload=optimizer+master``).

A weight that computes in bf16 is cast before every use, so a device may hold the cast alone: the
products have the same bits. Its gradient still adds up in fp32, and the update moves the master.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.linear import GroupedLinear, Linear, reads_copies
from model.precision import precision_of
from optim.offload import Transfers


@torch.no_grad()
def take_masters(model: nn.Module, transfers: Transfers) -> dict[str, Tensor]:
    """Leave bf16 weights on the device; only weights that the model reads through a cast.

    Args:
        model: initialised, whole, on the device, with the ops it will compute with.
        transfers: of the device.

    Returns:
        Name -> fp32 master in host memory.
    """
    masters: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, Linear | GroupedLinear) or not reads_copies(module.op):
            continue
        key = f"{name}.weight"
        if precision_of(key, "bf16").compute != torch.bfloat16:
            continue
        parameter = module._parameters["weight"]
        assert parameter is not None
        masters[key] = transfers.rest(parameter)
        masters[key].copy_(parameter)
        parameter.data = parameter.to(torch.bfloat16)
        parameter.grad_dtype = torch.float32
    return masters
