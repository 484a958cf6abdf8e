"""Gate: sqrt(softplus) scores, biased top-k or a fixed table, scaled weights (reference B.9)."""

# Legend: N tokens, D hidden, E experts, K experts per token, V vocabulary
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig, Router
from model.kernels.routing import Routing
from model.kernels.select import select


class Gate(nn.Module):
    """Scores experts and chooses; all in fp32.

    The choice may come from the biased scores (learned), from the token's id (hash; the gate's
    weight is trained all the same), or from the caller (replay, anticipatory routing). The weights
    always come from the current unbiased scores.

    Args:
        config: the model.
        router: learned or hash.
    """

    bias: Tensor
    tid2eid: Tensor

    def __init__(self, config: ModelConfig, router: Router) -> None:
        super().__init__()
        self.router = router
        self.topk, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        self._route = select("route", config.kernels)
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if router is Router.learned:
            self.register_buffer("bias", torch.empty(config.n_routed_experts, dtype=torch.float32))
        else:
            self.register_buffer(
                "tid2eid", torch.empty(config.vocab_size, self.topk, dtype=torch.int32)
            )

    def forward(
        self, u_ND: Tensor, ids_N: Tensor, valid_N: Tensor, index_NK: Tensor | None = None
    ) -> Routing:
        """Route tokens.

        Args:
            u_ND: normalised input.
            ids_N: token ids, read by hash layers.
            valid_N: not padding, which weighs nothing.
            index_NK: a choice to use instead of the gate's own.
        """
        logits_NE = F.linear(u_ND.float(), self.weight.float())
        bias_E = None
        if self.router is Router.learned:
            bias_E = self.bias
        elif index_NK is None:
            index_NK = self.tid2eid[ids_N].long()
        return self._route(logits_NE, valid_N, bias_E, index_NK, self.topk, self.scale)
