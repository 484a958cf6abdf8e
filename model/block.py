"""One block: attention under mHC, then MoE under mHC (reference B.1, B.2)."""

# Legend: B rows, T tokens, S streams, D hidden
from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention import ATTENTION
from model.attention.core import Aux
from model.config import LayerKind, ModelConfig, Residual, Router
from model.context import ForwardContext
from model.hyper_connections import HyperConnection, PlainResidual
from model.moe.layer import MoE
from model.norm import RMSNorm


class Block(nn.Module):
    """Attention and MoE, each reading one weighted sum of the streams and writing back to all.

    Args:
        config: the model.
        kind: attention kind.
        ratio: tokens per compressed entry (0: none).
        router: learned or hash.
        name: FQN of the block.
    """

    def __init__(
        self, config: ModelConfig, kind: LayerKind, ratio: int, router: Router, name: str
    ) -> None:
        super().__init__()
        self.name = name
        mhc = Residual(config.residual) is Residual.mhc
        self.hc_attn = HyperConnection(config) if mhc else PlainResidual()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.kernels)
        self.attn = ATTENTION[kind](config, kind, f"{name}.attn", ratio)
        self.hc_ffn = HyperConnection(config) if mhc else PlainResidual()
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.kernels)
        self.ffn = MoE(config, router, f"{name}.ffn")

    def forward(
        self, x_BTSD: Tensor, input_ids_BT: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Aux]:
        """Map streams to streams; side results of both sublayers beside them."""
        u_BTD, mix = self.hc_attn(x_BTSD)
        y_BTD, attention_aux = self.attn(self.attn_norm(u_BTD), context)
        u_BTD, mix = self.hc_ffn(self.hc_attn.write(y_BTD, mix))
        y_BTD, moe_aux = self.ffn(self.ffn_norm(u_BTD), input_ids_BT, context)
        out_BTSD = self.hc_ffn.merge(y_BTD, mix)
        aux = attention_aux | moe_aux
        if context.monitors:
            aux["stream_gain.sum"] = _norm(out_BTSD) / _norm(x_BTSD)
            aux["stream_gain.count"] = torch.ones((), device=x_BTSD.device)
        return out_BTSD, aux


def _norm(x: Tensor) -> Tensor:
    return x.detach().float().norm()
