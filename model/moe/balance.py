"""Balance: the selection bias, and the sequence-wise loss per document (reference B.10)."""

# Legend: N tokens, E experts, K experts per token, G documents
from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.gather import count
from model.kv_exchange import KVExchange
from model.moe.router import Gate, Routing
from model.sequence_plan import SequencePlan


def expert_load(index_NK: Tensor, valid_N: Tensor, num_experts: int) -> Tensor:
    """Tokens routed to every expert [E], fp32, padding left out."""
    counted_NK = torch.where(valid_N[:, None], index_NK, num_experts)  # padding has its own place
    return count(counted_NK, num_experts + 1)[:-1].float()


def balance_loss(routing: Routing, plan: SequencePlan, exchange: KVExchange) -> Tensor:
    """Sum over documents of ``length * sum_e f_e P_e``; the mean after division by all tokens.

    Of rows that are not whole, the share of the tokens that are here: ``f`` is of whole documents.

    ``f_e = E / (K * length) * tokens of the document sent to e`` (biased choice, no gradient) and
    ``P_e = mean over the document of s_e / sum(s)`` (unbiased scores); 1 where a document is
    perfectly balanced.
    """
    index_NK, _, score_NE = routing
    K, E = index_NK.shape[1], score_NE.shape[1]
    document_N, valid_N = plan.document_BT.flatten(), plan.valid_BT.flatten()
    cell_NK = document_N[:, None] * E + index_NK
    count_GE = exchange.add_up(count(cell_NK, plan.num_documents * E)).view(-1, E)
    f_NE = count_GE[document_N].float() * (E / K) / plan.length_BT.flatten()[:, None]
    share_NE = score_NE / score_NE.sum(dim=-1, keepdim=True)
    return ((f_NE * share_NE).sum(dim=-1) * valid_N).sum()


@torch.no_grad()
def update_bias(gate: Gate, load_E: Tensor, speed: float) -> None:
    """Move the selection bias after a step: ``b_e += speed * sign(mean load - load_e)``.

    Args:
        gate: a learned gate.
        load_E: tokens per expert over the whole global batch.
        speed: step of the bias, 0 to leave it.
    """
    gate.bias += speed * torch.sign(load_E.mean() - load_E)
