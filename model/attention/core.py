"""Shared front and back of every attention: queries, window KV, sink, output (reference B.3)."""

# Legend: B rows, T tokens, U tokens here and of the window before, D hidden, Q query latent, H
# heads, K head dim, G output groups
from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import LayerKind, ModelConfig
from model.context import ForwardContext, RopeTable
from model.kernels.attention import AttentionResult, EntrySet
from model.kernels.select import select
from model.linear import ActivationCast, BlockLinear, Linear
from model.norm import RMSNorm

Aux = dict[str, Tensor]


class WindowAttention(nn.Module):
    """Sliding-window attention with sink; CSA and HCA add entries by overriding :meth:`entries`.

    Args:
        config: the model.
        kind: what the layer attends to besides its window.
        name: FQN, for replay and monitors.
    """

    def __init__(self, config: ModelConfig, kind: LayerKind, name: str) -> None:
        super().__init__()
        self.name, self.kind = name, kind
        self.heads, self.head_dim, self.groups = (
            config.num_attention_heads,
            config.head_dim,
            config.o_groups,
        )
        self.window, self.eps = config.sliding_window, config.rms_norm_eps
        D, Q, width = config.hidden_size, config.q_lora_rank, self.heads * self.head_dim
        self.wq_a = Linear(D, Q)
        self.q_norm = RMSNorm(Q, self.eps, config.kernels)
        self.wq_b = Linear(Q, width)
        self.wkv = Linear(D, self.head_dim)
        self.kv_norm = RMSNorm(self.head_dim, self.eps, config.kernels)
        self.kv_cast = ActivationCast()
        self.attn_sink = nn.Parameter(torch.empty(self.heads))
        self.wo_a = BlockLinear(
            width // self.groups,
            self.groups * config.o_lora_rank,
            self.groups,
            select("block_linear", config.kernels),
        )
        self.wo_b = Linear(self.groups * config.o_lora_rank, D)
        self._attention = select("attention", config.kernels)
        self._norm_rope = select("norm_rope", config.kernels)
        self._rope_back = select("rope_back", config.kernels)

    def forward(self, u_BTD: Tensor, context: ForwardContext) -> tuple[Tensor, Aux]:
        """Attend.

        Args:
            u_BTD: normalised input.
            context: plan, tables and phase.

        Returns:
            Output [B, T, D] and side results (indexer loss, monitors).
        """
        rope = self.rope(context)
        q_latent_BTQ, q_BTHK, kv_BTK = self.project(u_BTD, rope)
        if context.past is not None:
            return self.output(
                context.past.attend(self, u_BTD, q_latent_BTQ, q_BTHK, kv_BTK), rope
            ), {}
        entries, finish = self.entries(u_BTD, q_latent_BTQ, context)
        window = u_BTD.shape[1] if self.kind is LayerKind.dense else self.window
        (kv_BUK,) = context.kv_exchange.tokens_before(self.window - 1, kv_BTK)
        result = self._attention(
            q_BTHK, kv_BUK, self.attn_sink, context.plan.start_BT, window, entries
        )
        aux = finish(q_BTHK, result) if finish is not None else {}
        return self.output(result.o_BTHK, rope), aux

    def project(self, u_BTD: Tensor, rope: RopeTable) -> tuple[Tensor, Tensor, Tensor]:
        """Query latents [B, T, Q], rotated queries [B, T, H, K], rotated and cast KV [B, T, K]."""
        B, T, _ = u_BTD.shape
        q_latent_BTQ = self.q_norm(self.wq_a(u_BTD))
        q_BTHK = self.wq_b(q_latent_BTQ).view(B, T, self.heads, self.head_dim)
        q_BTHK = self._norm_rope(q_BTHK, None, self.eps, *rope)
        kv_BTK = self.kv_cast(self.kv_norm(self.wkv(u_BTD), rope))
        return q_latent_BTQ, q_BTHK, kv_BTK

    def output(self, o_BTHK: Tensor, rope: RopeTable) -> Tensor:
        """Turn values back to each query's own position and project them: [B, T, D]."""
        B, T = o_BTHK.shape[:2]
        o_BTHK = self._rope_back(o_BTHK, *rope)
        return self.wo_b(self.wo_a(o_BTHK.reshape(B, T, self.groups, -1)))

    def rope(self, context: ForwardContext) -> RopeTable:
        """The layer's one table."""
        return context.window_rope

    def entries(self, u_BTD: Tensor, q_latent_BTQ: Tensor, context: ForwardContext) -> Entries:
        """Compressed entries to attend to, and what to compute once attention is known."""
        return None, None


class Finish:
    """Computes an attention's side results from its queries and denominators."""

    def __call__(self, q_BTHK: Tensor, result: AttentionResult) -> Aux:
        """Return losses and monitors by name."""
        raise NotImplementedError


Entries = tuple[EntrySet | None, Finish | None]
