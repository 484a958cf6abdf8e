"""Planted bugs of indexer, routing, MTP, losses and initialisation (see ``mutants_forward.py``)."""

# Legend: B rows, T tokens, N tokens of all rows, E experts or entries, K experts per token, L dim
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import model.init as init_module
import model.kernels.routing as routing_module
import model.moe.balance as balance_module
import model.transformer as transformer_module
from model.attention.csa import CompressedSparseAttention
from model.attention.indexer import LightningIndexer
from model.config import IndexerPhase, Router
from model.kernels.attention import entry_mask
from model.moe.experts import SharedExpert
from model.moe.router import Gate, Routing
from model.mtp import MTPBlock
from model.transformer import DeepSeekV4
from tests.parity.mutants_forward import Plant, after_init, attribute, op, rotate_half


# ---- indexer ------------------------------------------------------------------------------------
def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * size**-0.5


def _hadamard_on_q(indexer: LightningIndexer) -> None:
    indexer.q_cast.forward = lambda x: x @ _hadamard(x.shape[-1])


def _weights(change: Callable[[Tensor, LightningIndexer], Tensor]) -> Plant:
    """Change the per-head weights."""

    def make(real: Any) -> Any:
        def forward(self: LightningIndexer, *args: Any) -> Any:
            q, w = real(self, *args)
            return q, change(w, self)

        return forward

    return attribute(LightningIndexer, "forward", make)


class _Attached(torch.Tensor):
    """A tensor that does not let itself be detached."""

    def detach(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor)


def _inputs_attached(real: Any) -> Any:
    def forward(self: LightningIndexer, u: Tensor, q_latent: Tensor, *args: Any) -> Any:
        return real(self, u.as_subclass(_Attached), q_latent.as_subclass(_Attached), *args)

    return forward


def _sees_the_future(real: Any) -> Any:
    def topk(indexer: Any, first_BT: Tensor, stop_BT: Tensor, k: int, *_: Any) -> Tensor:
        return real(indexer, first_BT, torch.full_like(stop_BT, indexer[1].shape[1]), k)

    return topk


def _takes_the_newest(real: Any) -> Any:
    def topk(indexer: Any, first_BT: Tensor, stop_BT: Tensor, k: int, *_: Any) -> Tensor:
        index = stop_BT[..., None] - 1 - torch.arange(k)
        return torch.where(index >= first_BT[..., None], index, -1)

    return topk


def _entries_only(real: Any) -> Any:
    """The teacher of several stacks: each head renormalised over its compressed entries."""

    def loss(indexer: Any, q: Tensor, lse: Tensor, entries: Any, mass: Any = None) -> Tensor:
        z = torch.einsum("bthk,bek->bthe", q, entries.kv_BEK) * q.shape[-1] ** -0.5
        z = z.masked_fill(~entry_mask(entries)[:, :, None], float("-inf"))
        return real(indexer, q, z.logsumexp(dim=-1).clamp(min=-1e9), entries)

    return loss


def _over_all_visible(real: Any) -> Any:
    def loss(indexer: Any, q: Tensor, lse: Tensor, entries: Any, mass: Any = None) -> Tensor:
        return real(indexer, q, lse, replace(entries, index_BTN=None))

    return loss


def _topk_in_every_phase(real: Any) -> Any:
    def entries(self: CompressedSparseAttention, u: Tensor, context: Any) -> Any:
        return real(self, u, replace(context, phase=IndexerPhase.sparse))

    return entries


def _full_in_every_phase(real: Any) -> Any:
    def entries(self: CompressedSparseAttention, u: Tensor, context: Any) -> Any:
        return real(self, u, replace(context, phase=IndexerPhase.full, indexer_loss=True))

    return entries


def _rotate_half_here(indexer: LightningIndexer) -> None:
    norm = indexer.compressor.norm
    indexer._rope = rotate_half
    norm._norm_rope = lambda x, weight, eps, *rope: rotate_half(
        norm._rms_norm(x, weight, eps), *rope
    )


indexer_rope_rotate_half = after_init(LightningIndexer, _rotate_half_here)
hadamard_on_q_only = after_init(LightningIndexer, _hadamard_on_q)
indexer_temperature_lost = _weights(lambda w, m: w * (m.dim * m.heads) ** 0.5)
indexer_weights_positive = _weights(lambda w, m: w.relu())
indexer_inputs_attached = attribute(LightningIndexer, "forward", _inputs_attached)
indexer_sees_the_future = op("index_topk", _sees_the_future)
indexer_choice_unscored = op("index_topk", _takes_the_newest)
teacher_over_entries_only = op("indexer_loss", _entries_only)
indexer_never_trained = op("indexer_loss", lambda real: lambda *args: real(*args).detach())
sparse_loss_over_all_entries = op("indexer_loss", _over_all_visible)
topk_in_every_phase = attribute(CompressedSparseAttention, "begin_entries", _topk_in_every_phase)
sparse_phase_attends_all = attribute(
    CompressedSparseAttention, "begin_entries", _full_in_every_phase
)


# ---- routing ------------------------------------------------------------------------------------
def _routing(change: Callable[[Gate, Routing], Routing]) -> Plant:
    def make(real: Any) -> Any:
        def forward(self: Gate, *args: Any) -> Routing:
            return change(self, real(self, *args))

        return forward

    return attribute(Gate, "forward", make)


def _biased_weights(gate: Gate, routing: Routing) -> Routing:
    if gate.router is Router.hash:
        return routing
    weight = (routing.score_NE + gate.bias).gather(1, routing.index_NK)
    return routing._replace(weight_NK=weight / weight.sum(dim=-1, keepdim=True) * gate.scale)


def _not_renormalised(gate: Gate, routing: Routing) -> Routing:
    weight = routing.score_NE.gather(1, routing.index_NK) * gate.scale
    return routing._replace(weight_NK=weight)


def _hash_weights_equal(gate: Gate, routing: Routing) -> Routing:
    if gate.router is not Router.hash:
        return routing
    equal = torch.full_like(routing.weight_NK, gate.scale / gate.topk)
    return routing._replace(weight_NK=equal + 0 * routing.weight_NK)


def _sigmoid_scores(gate: Gate, routing: Routing) -> Routing:
    # s = sqrt(log(1 + e^x)), so e^-x = 1 / (e^(s^2) - 1) and sigmoid(x) = 1 - e^(-s^2)
    score = 1 - (-routing.score_NE.square()).exp()
    weight = score.gather(1, routing.index_NK)
    weight = weight / weight.sum(dim=-1, keepdim=True) * gate.scale
    return Routing(routing.index_NK, weight, score)


def _choose_unbiased(real: Any) -> Any:
    def route(logits: Tensor, valid: Tensor, bias: Any, index: Any, *numbers: Any) -> Routing:
        return real(logits, valid, None if bias is None else 0 * bias, index, *numbers)

    return route


def _table_ignored(real: Any) -> Any:
    def route(logits: Tensor, valid: Tensor, bias: Any, index: Any, *numbers: Any) -> Routing:
        if bias is None:  # a hash layer
            index = logits.topk(numbers[0], dim=-1).indices
        return real(logits, valid, bias, index, *numbers)

    return route


weights_from_biased_scores = _routing(_biased_weights)
weights_not_renormalised = _routing(_not_renormalised)
route_scale_missing = _routing(lambda g, r: r._replace(weight_NK=r.weight_NK / g.scale))
hash_weights_equal = _routing(_hash_weights_equal)
scores_are_sigmoids = _routing(_sigmoid_scores)
choice_without_bias = op("route", _choose_unbiased)
hash_table_ignored = op("route", _table_ignored)
shared_expert_scaled = attribute(
    SharedExpert, "forward", lambda real: lambda self, x: 1.5 * real(self, x)
)
load_counts_padding = attribute(
    routing_module,
    "expert_load",
    lambda real: lambda index, valid, n: real(index, torch.ones_like(valid), n),
)
bias_moves_the_wrong_way = attribute(
    balance_module, "update_bias", lambda real: lambda gate, load, speed: real(gate, load, -speed)
)


# ---- balance ------------------------------------------------------------------------------------
def _whole_batch(real: Any) -> Any:
    """One sequence of all tokens instead of one a document."""

    def loss(index: Tensor, score: Tensor, plan: Any, exchange: Any) -> Tensor:
        tokens = plan.valid_BT.sum()
        one = replace(
            plan,
            document_BT=torch.where(plan.valid_BT, 0, 1),
            num_documents=2,
            length_BT=torch.where(plan.valid_BT, tokens, 1),
        )
        return real(index, score, one, exchange)

    return loss


balance_silently_zero = attribute(
    routing_module, "balance_loss", lambda real: lambda *args: 0 * real(*args)
)
balance_over_the_batch = attribute(routing_module, "balance_loss", _whole_batch)


# ---- MTP, objective -----------------------------------------------------------------------------
def _mtp_input(change: Callable[[Tensor], Tensor]) -> Plant:
    def make(real: Any) -> Any:
        def predict(self: MTPBlock, x_BTSD: Tensor, *args: Any) -> Any:
            return real(self, change(x_BTSD), *args)

        return predict

    return attribute(MTPBlock, "predict", make)


mtp_loses_the_streams = _mtp_input(lambda x: x.mean(dim=2, keepdim=True).expand_as(x))
mtp_cut_from_the_trunk = _mtp_input(lambda x: x.detach())


def _own_token(real: Any) -> Any:
    def ahead(self: DeepSeekV4, x: Tensor, next_ids_BTK: Tensor, context: Any) -> Any:
        return real(self, x, next_ids_BTK.roll(1, dims=1), context)

    return ahead


mtp_reads_its_own_token = attribute(DeepSeekV4, "predict_ahead", _own_token)


def _objective(change: Callable[[Any, Tensor], Any]) -> Plant:
    """Change the objective that the losses are put together with, given the labels."""

    def make(real: Any) -> Any:
        def losses(self: Any, h: Any, labels: Tensor, results: Any, objective: Any) -> Any:
            return real(self, h, labels, results, change(objective, labels))

        return losses

    return attribute(DeepSeekV4, "losses", make)


def _own_counts(objective: Any, labels: Tensor) -> Any:
    counts = tuple((labels >= 0).sum(dim=(0, 1)).tolist())
    return replace(objective, targets_K=(objective.targets_K[0], *counts[1:]))


mtp_loss_per_microbatch = _objective(_own_counts)
mtp_depths_summed = _objective(lambda o, labels: replace(o, mtp_weight=2 * o.mtp_weight))
indexer_weight_dropped = _objective(lambda o, labels: replace(o, indexer_weight=0.0))
normaliser_off_by_one = _objective(
    lambda o, labels: replace(o, targets_K=tuple(n + 1 for n in o.targets_K))
)
ignored_labels_counted = attribute(
    transformer_module,
    "cross_entropy_sum",
    lambda real: lambda x, w, labels, *args: real(x, w, labels.clamp(min=0), *args),
)


def _labels_shifted(real: Any) -> Any:
    def losses(self: Any, h: Any, labels: Tensor, results: Any, objective: Any) -> Any:
        return real(self, h, labels.roll(1, dims=1), results, objective)

    return losses


labels_one_off = attribute(DeepSeekV4, "losses", _labels_shifted)


# ---- initialisation -----------------------------------------------------------------------------
def _table(change: Callable[[Tensor], Tensor]) -> Plant:
    return attribute(
        init_module, "build_table", lambda real: lambda *args, **kw: change(real(*args, **kw))
    )


hash_table_zero = _table(torch.zeros_like)
hash_table_constant_row = _table(lambda table: table[:1].expand_as(table).contiguous())


def embedding_noise(patch: pytest.MonkeyPatch) -> None:
    """Streams do not start as equal copies."""
    real = DeepSeekV4.streams

    def streams(self: DeepSeekV4, ids_BT: Tensor) -> Tensor:
        x = real(self, ids_BT)
        return x * torch.linspace(0.9, 1.1, x.shape[2])[:, None]

    patch.setattr(DeepSeekV4, "streams", streams)
