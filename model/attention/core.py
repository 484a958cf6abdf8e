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
        self._attention = select("attention", config.kernels, config.deterministic)
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
        q_latent_BTQ = self.q_norm(self.wq_a(u_BTD))
        kv_BTK = self.kv_cast(self.kv_norm(self.wkv(u_BTD), rope))
        if context.past is not None:
            q_BTHK = self.turned(self.queries(q_latent_BTQ), rope)
            return self.output(
                context.past.attend(self, u_BTD, q_latent_BTQ, q_BTHK, kv_BTK), rope
            ), {}
        # What other ranks hold is asked for before the work that needs none of it.
        window, start_BT = self.reach(context)
        window_keys = context.kv_exchange.tokens_before(window - 1, kv_BTK)
        coming = self.begin_entries(u_BTD, context)
        q_BTHK = self.queries(q_latent_BTQ)
        coming.pool(q_latent_BTQ)
        q_BTHK = self.turned(q_BTHK, rope)
        entries, finish = coming.take()
        (kv_BUK,) = window_keys.wait()
        result = self._attention(q_BTHK, kv_BUK, self.attn_sink, start_BT, window, entries)
        aux = finish(q_BTHK, result) if finish is not None else {}
        return self.output(result.o_BTHK, rope), aux

    def reach(self, context: ForwardContext) -> tuple[int, Tensor]:
        """Tokens of the window, and where documents begin among its keys; dense: of whole rows."""
        if self.kind is LayerKind.dense:
            return context.plan.row_tokens, context.plan.row_start_BT
        return self.window, context.plan.start_BT

    def queries(self, q_latent_BTQ: Tensor) -> Tensor:
        """Queries [B, T, H, K], neither normalised nor rotated."""
        B, T, _ = q_latent_BTQ.shape
        return self.wq_b(q_latent_BTQ).view(B, T, self.heads, self.head_dim)

    def turned(self, q_BTHK: Tensor, rope: RopeTable) -> Tensor:
        """Queries normalised and rotated."""
        return self._norm_rope(q_BTHK, None, self.eps, *rope)

    def output(self, o_BTHK: Tensor, rope: RopeTable) -> Tensor:
        """Turn values back to each query's own position and project them: [B, T, D]."""
        B, T = o_BTHK.shape[:2]
        o_BTHK = self._rope_back(o_BTHK, *rope)
        return self.wo_b(self.wo_a(o_BTHK.reshape(B, T, self.groups, -1)))

    def rope(self, context: ForwardContext) -> RopeTable:
        """The layer's one table."""
        return context.window_rope

    def begin_entries(self, u_BTD: Tensor, context: ForwardContext) -> EntryWork:
        """Begin with the compressed entries; here there are none."""
        return EntryWork()


class Finish:
    """Computes an attention's side results from its queries and denominators."""

    def __call__(self, q_BTHK: Tensor, result: AttentionResult) -> Aux:
        """Return losses and monitors by name."""
        raise NotImplementedError


class EntryWork:
    """A layer's compressed entries in steps; between them attention computes its queries.

    What other ranks hold travels meanwhile (``model/kv_exchange.py``).
    """

    def pool(self, q_latent_BTQ: Tensor) -> None:
        """Compress the tokens here; the entries of other ranks set out."""

    def take(self) -> tuple[EntrySet | None, Finish | None]:
        """Entries to attend to, and what to compute once attention is known."""
        return None, None
