"""Multi-token prediction: one more block on the streams (reference B.11)."""

# Legend: B rows, T tokens, S streams, D hidden
from __future__ import annotations

from torch import Tensor

from model.block import Aux, Block
from model.config import LayerKind, ModelConfig, Residual, Router
from model.context import ForwardContext
from model.hyper_connections import HyperHead, PlainHead
from model.linear import Linear
from model.norm import RMSNorm


class MTPBlock(Block):
    """Reads the streams of the depth before and the token that many places ahead.

    Depth 1 reads the main model's streams before its hc_head. A whole block of its own:
    window-only attention, learned gate, own mHC, hc_head and norm; embedding and head are shared.

    Args:
        config: the model.
        name: FQN of the block.
    """

    def __init__(self, config: ModelConfig, name: str) -> None:
        super().__init__(config, LayerKind.swa, 0, Router.learned, name)
        D = config.hidden_size
        self.e_proj, self.h_proj = Linear(D, D), Linear(D, D)
        self.enorm = RMSNorm(D, config.rms_norm_eps, config.kernels)
        self.hnorm = RMSNorm(D, config.rms_norm_eps, config.kernels)
        self.norm = RMSNorm(D, config.rms_norm_eps, config.kernels)
        self.hc_head = (
            HyperHead(config) if Residual(config.residual) is Residual.mhc else PlainHead()
        )

    def predict(
        self, x_BTSD: Tensor, next_BTD: Tensor, next_ids_BT: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor, Aux]:
        """Streams one depth further.

        Args:
            x_BTSD: streams of the depth before.
            next_BTD: embedding of the next token of each position.
            next_ids_BT: its id.
            context: shared by all layers.

        Returns:
            Streams [B, T, S, D], collapsed and normalised output [B, T, D] for the head, side
            results.
        """
        mixed_BTSD = self.e_proj(self.enorm(next_BTD)).unsqueeze(2) + self.h_proj(
            self.hnorm(x_BTSD)
        )
        out_BTSD, aux = self(mixed_BTSD, next_ids_BT, context)
        return out_BTSD, self.norm(self.hc_head(out_BTSD)), aux
