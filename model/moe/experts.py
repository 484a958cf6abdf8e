"""Experts: clamped SwiGLU, routing weight applied before the down projection (reference B.9)."""

# Legend: R rows, D hidden, I expert intermediate, E experts
from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import Kernels, ModelConfig
from model.kernels.select import select
from model.linear import GroupedLinear, Linear


class Experts(nn.Module):
    """Routed experts, stacked.

    Args:
        config: the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, D, I = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size  # noqa: E741
        op = select("grouped_linear", Kernels(config.kernels))
        self.w1 = GroupedLinear(E, D, I, op)
        self.w2 = GroupedLinear(E, I, D, op)
        self.w3 = GroupedLinear(E, D, I, op)
        self.limit = config.swiglu_limit
        self._swiglu = select("swiglu", config.kernels)

    def forward(
        self, rows_RD: Tensor, weight_R: Tensor, offsets_E: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply each expert to its rows.

        Returns:
            Results [R, D], and gate and up [R, I] for the clamp monitor.
        """
        gate_RI, up_RI = self.w1(rows_RD, offsets_E), self.w3(rows_RD, offsets_E)
        a_RI = self._swiglu(gate_RI, up_RI, weight_R, self.limit)
        return self.w2(a_RI, offsets_E), gate_RI, up_RI


class SharedExpert(nn.Module):
    """The expert that every token visits, weight 1, clamped as well; several are one wider expert.

    Args:
        config: the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, width = config.hidden_size, config.moe_intermediate_size * config.n_shared_experts
        self.w1, self.w2, self.w3 = Linear(D, width), Linear(width, D), Linear(D, width)
        self.limit = config.swiglu_limit
        self._swiglu = select("swiglu", config.kernels)

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        return self.w2(self._swiglu(self.w1(x_ND), self.w3(x_ND), None, self.limit))


def clamped_share(gate_RI: Tensor, up_RI: Tensor, limit: float) -> dict[str, Tensor]:
    """Monitor: elements on which the clamp acts."""
    active = (gate_RI.detach() > limit).sum() + (up_RI.detach().abs() > limit).sum()
    count = torch.full((), 2.0 * gate_RI.numel(), device=gate_RI.device)
    return {"clamped.sum": active.float(), "clamped.count": count}
