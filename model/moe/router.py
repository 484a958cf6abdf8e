"""Gate: sqrt(softplus) scores, biased top-k or a fixed table, scaled weights (reference B.9)."""

# Legend: N tokens, D hidden, E experts, K experts per token, V vocabulary
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import ModelConfig, Router


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        index_NK: experts of each token, distinct, int64.
        weight_NK: their weights in fp32, renormalised and scaled; gradient flows to the gate.
        score_NE: unbiased scores in fp32.
    """

    index_NK: Tensor
    weight_NK: Tensor
    score_NE: Tensor


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
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if router is Router.learned:
            self.register_buffer("bias", torch.empty(config.n_routed_experts, dtype=torch.float32))
        else:
            self.register_buffer(
                "tid2eid", torch.empty(config.vocab_size, self.topk, dtype=torch.int32)
            )

    def forward(self, u_ND: Tensor, ids_N: Tensor, index_NK: Tensor | None = None) -> Routing:
        """Route tokens.

        Args:
            u_ND: normalised input.
            ids_N: token ids, read by hash layers.
            index_NK: a choice to use instead of the gate's own.
        """
        score_NE = F.softplus(F.linear(u_ND.float(), self.weight.float())).sqrt()
        if index_NK is None:
            index_NK = self._choose(score_NE.detach(), ids_N)
        weight_NK = score_NE.gather(1, index_NK)
        weight_NK = weight_NK / (weight_NK.sum(dim=-1, keepdim=True) + 1e-20) * self.scale
        return Routing(index_NK, weight_NK, score_NE)

    def _choose(self, score_NE: Tensor, ids_N: Tensor) -> Tensor:
        if self.router is Router.hash:
            return self.tid2eid[ids_N].long()
        # stable: ties go to the lower expert
        ranked_NE = (score_NE + self.bias).sort(dim=-1, descending=True, stable=True).indices
        return ranked_NE[:, : self.topk].contiguous()  # a view would keep all E alive
