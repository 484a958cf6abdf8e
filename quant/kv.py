"""KV entries as the cache holds them: blocks of 64 in FP8, rope dims in bf16 (reference C.6)."""

# Legend: K head dim
from __future__ import annotations

import torch
from torch import Tensor

from model.linear import ActivationCast
from quant.fake_quant import straight_through
from quant.formats import FP8_KV, fake_quant
from quant.probe import QuantProbe


class KVCast(ActivationCast):
    """Round all dims but the last ``rope_dim`` to FP8 and those to bf16.

    Args:
        rope_dim: number of rotated dims, which come last.
        name: of the module that it replaces.
        probe: told that it ran.
    """

    def __init__(self, rope_dim: int, name: str, probe: QuantProbe) -> None:
        super().__init__()
        self.rope_dim, self.name, self.probe = rope_dim, name, probe

    def forward(self, x: Tensor) -> Tensor:
        """Cast ``[..., K]``; gradients pass straight through."""
        return straight_through(x, self._cast)

    def _cast(self, x_K: Tensor) -> Tensor:
        plain = x_K.shape[-1] - self.rope_dim
        latent, rope = x_K[..., :plain], x_K[..., plain:]
        self.probe.saw(self.name)
        self.probe.measure("kv", latent, FP8_KV)
        rope = rope.to(torch.bfloat16).to(x_K.dtype)
        return torch.cat((fake_quant(latent, FP8_KV), rope), dim=-1)
