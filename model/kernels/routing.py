"""Routing in plain PyTorch, the definitions: the gate's choice, order by expert, load and balance.

Triton's are in ``triton/routing.py`` (reference B.9, B.10).
"""

# Legend: N tokens, E experts, K experts a token, R = N * K token copies, G documents
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model.kernels.gather import count
from model.kv_exchange import KVExchange
from model.sequence_plan import SequencePlan


class Routing(NamedTuple):
    """Where tokens go.

    Attributes:
        index_NK: experts of each token, distinct, int64.
        weight_NK: their weights in fp32, renormalised and scaled, 0 in padding; gradient flows to
            the gate.
        score_NE: unbiased scores in fp32.
    """

    index_NK: Tensor
    weight_NK: Tensor
    score_NE: Tensor


class Order(NamedTuple):
    """Token copies sorted by expert, tokens in order inside each.

    Attributes:
        token_R: token of each row.
        copy_R: copy n * K + k of each row.
        place_NK: the row of each copy.
        offsets_E: int32 cumulative row counts.
    """

    token_R: Tensor
    copy_R: Tensor
    place_NK: Tensor
    offsets_E: Tensor


def route(
    logits_NE: Tensor,
    valid_N: Tensor,
    bias_E: Tensor | None,
    index_NK: Tensor | None,
    topk: int,
    scale: float,
) -> Routing:
    """Scores sqrt(softplus), the choice, and its weights.

    Args:
        logits_NE: fp32.
        valid_N: not padding.
        bias_E: added to the scores for the choice; ties go to the lower expert.
        index_NK: a choice to use instead.
        topk: K.
        scale: of the weights, which add up to it.
    """
    score_NE = F.softplus(logits_NE).sqrt()
    if index_NK is None:
        assert bias_E is not None
        ranked_NE = (score_NE.detach() + bias_E).sort(dim=-1, descending=True, stable=True).indices
        index_NK = ranked_NE[:, :topk].contiguous()  # a view would keep all E alive
    weight_NK = score_NE.gather(1, index_NK)
    weight_NK = weight_NK / (weight_NK.sum(dim=-1, keepdim=True) + 1e-20) * scale
    return Routing(index_NK, weight_NK * valid_N[:, None], score_NE)


def expert_order(index_NK: Tensor, num_experts: int) -> Order:
    """Sort the copies by expert.

    Args:
        index_NK: experts of each token.
        num_experts: E.
    """
    N, K = index_NK.shape
    expert_R = index_NK.flatten()
    copy_R = expert_R.argsort(stable=True)
    place_R = torch.empty_like(copy_R)
    place_R[copy_R] = torch.arange(N * K, device=copy_R.device)
    offsets_E = count(expert_R, num_experts).cumsum(0).to(torch.int32)
    return Order(copy_R // K, copy_R, place_R.view(N, K), offsets_E)


def expert_load(index_NK: Tensor, valid_N: Tensor, num_experts: int) -> Tensor:
    """Tokens routed to every expert [E], fp32, padding left out."""
    counted_NK = torch.where(valid_N[:, None], index_NK, num_experts)  # padding has its own place
    return count(counted_NK, num_experts + 1)[:-1].float()


def balance_loss(
    index_NK: Tensor, score_NE: Tensor, plan: SequencePlan, exchange: KVExchange
) -> Tensor:
    """Sum over documents of ``length * sum_e f_e P_e``; the mean after division by all tokens.

    Of rows that are not whole, the share of the tokens that are here: ``f`` is of whole documents.

    ``f_e = E / (K * length) * tokens of the document sent to e`` (biased choice, no gradient) and
    ``P_e = mean over the document of s_e / sum(s)`` (unbiased scores); 1 where a document is
    perfectly balanced.
    """
    K, E = index_NK.shape[1], score_NE.shape[1]
    document_N, valid_N = plan.document_BT.flatten(), plan.valid_BT.flatten()
    cell_NK = document_N[:, None] * E + index_NK
    count_GE = exchange.add_up(count(cell_NK, plan.num_documents * E)).view(-1, E)
    f_NE = count_GE[document_N].float() * (E / K) / plan.length_BT.flatten()[:, None]
    share_NE = score_NE / score_NE.sum(dim=-1, keepdim=True)
    return ((f_NE * share_NE).sum(dim=-1) * valid_N).sum()


def load_and_balance(
    index_NK: Tensor,
    score_NE: Tensor,
    plan: SequencePlan,
    exchange: KVExchange,
    *,
    balance: bool,
) -> tuple[Tensor, Tensor | None]:
    """:func:`expert_load`, and :func:`balance_loss` if it is asked for.

    Args:
        index_NK: experts of each token.
        score_NE: unbiased scores; gradient flows.
        plan: documents of the tokens.
        exchange: adds up what other shards count.
        balance: form the loss.
    """
    load_E = expert_load(index_NK, plan.valid_BT.flatten(), score_NE.shape[1])
    return load_E, balance_loss(index_NK, score_NE, plan, exchange) if balance else None
