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

from model.config import Kernels
from model.kernels.select import select


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

    def combine(
        self, rows_RD: Tensor, dispatched: Dispatched, plus_ND: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Sum each token's K results, and ``plus``, in fp32; rounded once to dtype: [N, D]."""
        ...


class LocalDispatcher:
    """All experts live here: a stable sort by expert.

    Args:
        kernels: which implementations order and move rows.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._order = select("expert_order", kernels)
        self._send, self._collect = select("send", kernels), select("collect", kernels)

    def dispatch(
        self, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor, num_experts: int
    ) -> Dispatched:
        """Sort the copies by expert, tokens in order inside each."""
        token_R, copy_R, place_NK, offsets_E = self._order(index_NK, num_experts)
        rows_RD, weight_R = self._send(x_ND, weight_NK, token_R, copy_R, place_NK)
        return Dispatched(rows_RD, weight_R, offsets_E, (token_R, place_NK))

    def combine(
        self, rows_RD: Tensor, dispatched: Dispatched, plus_ND: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Sum each token's K results, and ``plus``, in fp32."""
        token_R, place_NK = dispatched.state
        return self._collect(rows_RD, token_R, place_NK, plus_ND, dtype)
