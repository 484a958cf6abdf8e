"""Plain multi-head attention: what a pre-norm transformer has, for comparison with V4's attention.

Queries, keys and values of every head from one matrix each, RoPE on ``qk_rope_head_dim`` channels
of a head (all of them where it equals ``head_dim``), softmax over the document's earlier tokens,
one output matrix. No latent, no shared key, no sink, no window. It trains and scores; it has no
cache, so it does not generate.
"""

# Legend: B rows, T tokens, D hidden, H heads, K head dim
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from model.config import LayerKind, ModelConfig
from model.context import ForwardContext
from model.errors import ConfigError
from model.kernels.select import select
from model.linear import Linear


class MultiHeadAttention(nn.Module):
    """Full causal attention within documents (Vaswani et al. 2017, with RoPE).

    Args:
        config: the model.
        kind: ``mha``.
        name: FQN.
        ratio: 0; it has no entries.
    """

    def __init__(self, config: ModelConfig, kind: LayerKind, name: str, ratio: int) -> None:
        super().__init__()
        self.name, self.kind = name, kind
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        D, width = config.hidden_size, self.heads * self.head_dim
        self.wq, self.wk, self.wv = Linear(D, width), Linear(D, width), Linear(D, width)
        self.wo = Linear(width, D)
        self._rope = select("rope", config.kernels)

    def forward(self, u_BTD: Tensor, context: ForwardContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Attend.

        Args:
            u_BTD: normalised input.
            context: plan and tables.

        Returns:
            Output [B, T, D]; no side results.

        Raises:
            ConfigError: it is asked to generate.
        """
        if context.past is not None:
            raise ConfigError(f"{self.name}: layer kind {self.kind.value} has no cache")
        B, T, _ = u_BTD.shape
        cos, sin = context.window_rope
        q_BTHK, k_BTHK, v_BTHK = (
            linear(u_BTD).view(B, T, self.heads, self.head_dim)
            for linear in (self.wq, self.wk, self.wv)
        )
        q_BTHK, k_BTHK = (self._rope(x, cos, sin) for x in (q_BTHK, k_BTHK))
        o_BHTK = scaled_dot_product_attention(
            q_BTHK.transpose(1, 2), k_BTHK.transpose(1, 2), v_BTHK.transpose(1, 2),
            attn_mask=visible(context.plan.start_BT)[:, None],
        )  # fmt: skip
        return self.wo(o_BHTK.transpose(1, 2).reshape(B, T, -1)), {}


def visible(start_BT: Tensor) -> Tensor:
    """[B, T, T] bool: the keys of each query, its document's tokens up to itself (padding: itself).

    Args:
        start_BT: first token of each token's document.
    """
    token_T = torch.arange(start_BT.shape[1], device=start_BT.device)
    start_BT = torch.minimum(start_BT, token_T)
    return (token_T <= token_T[:, None]) & (token_T >= start_BT[..., None])
