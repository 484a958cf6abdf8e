"""The MoE sublayer: route, dispatch, experts, combine, shared expert (reference B.9, paper 2.1)."""

# Legend: B rows, T tokens, N tokens of all rows, D hidden, K experts per token
from __future__ import annotations

from torch import Tensor, nn

from model.config import ModelConfig, Router
from model.context import ForwardContext
from model.kernels.select import select
from model.moe.dispatch import Dispatcher, LocalDispatcher
from model.moe.experts import Experts, SharedExpert, clamped_share
from model.moe.router import Gate


class MoE(nn.Module):
    """Mixture of experts.

    Args:
        config: the model.
        router: learned or hash.
        name: FQN, for loads and replay.
    """

    def __init__(self, config: ModelConfig, router: Router, name: str) -> None:
        super().__init__()
        self.gate_name, self.num_experts, self.limit = (
            f"{name}.gate",
            config.n_routed_experts,
            config.swiglu_limit,
        )
        self.gate = Gate(config, router)
        self.experts = Experts(config)
        self.shared_experts = SharedExpert(config) if config.n_shared_experts else None
        self.dispatcher: Dispatcher = LocalDispatcher(config.kernels)
        self._load_and_balance = select("load_and_balance", config.kernels)

    def forward(
        self, u_BTD: Tensor, input_ids_BT: Tensor, context: ForwardContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Apply the layer.

        Returns:
            Output [B, T, D] and side results: ``load:<gate FQN>``, ``balance`` (sum over
                documents), monitors.
        """
        B, T, D = u_BTD.shape
        u_ND, valid_N = u_BTD.reshape(B * T, D), context.plan.valid_BT.flatten()
        routing = self.gate(
            u_ND, input_ids_BT.flatten(), valid_N, context.replay.get(self.gate_name)
        )
        if context.record is not None:
            context.record[self.gate_name] = routing.index_NK
        sent = self.dispatcher.dispatch(u_ND, routing.index_NK, routing.weight_NK, self.num_experts)
        rows_RD, gate_RI, up_RI = self.experts(sent.rows_RD, sent.weight_R, sent.offsets_E)
        shared_ND = None if self.shared_experts is None else self.shared_experts(u_ND)
        y_ND = self.dispatcher.combine(rows_RD, sent, shared_ND, u_BTD.dtype)
        load_E, balance = self._load_and_balance(
            routing.index_NK, routing.score_NE, context.plan, context.kv_exchange,
            balance=context.balance_loss and self.gate.router is Router.learned,
        )  # fmt: skip
        aux = {f"load:{self.gate_name}": load_E}
        if balance is not None:
            aux["balance"] = balance
        if context.monitors:
            aux |= clamped_share(gate_RI, up_RI, self.limit)
        return y_ND.view(B, T, D), aux
