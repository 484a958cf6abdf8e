"""Dispatcher seam: bring each token's copies to its experts, and the results back (reference B.9).

The local dispatcher sorts rows by expert; expert parallelism replaces it by an all-to-all behind
the same Protocol.
"""

# Legend: N tokens, D hidden, R rows (token copies), K experts per token, E experts
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from model.kernels.gather import collect, count, spread


@dataclass(frozen=True)
class Dispatched:
    """Rows at their experts.

    Attributes:
        rows_RD: token copies sorted by expert.
        weight_R: routing weight of each row.
        offsets_E: int32 cumulative row counts of the experts that live here.
        state: what :meth:`Dispatcher.combine` needs.
    """

    rows_RD: Tensor
    weight_R: Tensor
    offsets_E: Tensor
    state: Any


class Dispatcher(Protocol):
    """Moves rows to experts and back; no token is dropped."""

    def dispatch(
        self, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, num_experts: int
    ) -> Dispatched:
        """Send K copies of every token to its experts."""
        ...

    def combine(self, rows_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Sum each token's K results in fp32: [N, D]."""
        ...


class LocalDispatcher:
    """All experts live here: a stable sort by expert."""

    def dispatch(
        self, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, num_experts: int
    ) -> Dispatched:
        """Sort the copies by expert, tokens in order inside each."""
        N, K = index_NK.shape
        expert_R = index_NK.flatten()
        order_R = expert_R.argsort(stable=True)
        place_NK = torch.empty_like(order_R)
        place_NK[order_R] = torch.arange(N * K, device=order_R.device)
        place_NK = place_NK.view(N, K)
        token_R = order_R // K
        offsets_E = count(expert_R, num_experts).cumsum(0).to(torch.int32)
        weight_R = spread(weight_NK.reshape(N * K, 1), order_R, place_NK.view(-1, 1))[:, 0]
        return Dispatched(spread(x_ND, token_R, place_NK), weight_R, offsets_E, (token_R, place_NK))

    def combine(self, rows_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Sum each token's K results in fp32."""
        token_R, place_NK = dispatched.state
        return collect(rows_RD, token_R, place_NK)
