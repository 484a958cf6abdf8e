"""Attention and indexer in chunks of queries: memory linear in T, scores recomputed in backward.

What a chunk meets, and how it is multiplied, is in ``chunks.py``.
"""

# Legend: B rows, U window keys, C queries of a chunk, H heads, K head dim, E entries, N chosen, G
# keys of a query, J, L indexer heads and head dim
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.kernels import chunks
from model.kernels.attention import AttentionResult, EntrySet
from model.kernels.chunks import (
    ChunkEntries,
    ChunkWindow,
    accumulate,
    chunks_of,
    dots_of,
    join,
    masked_scores,
    mix,
    mix_into,
    positive,
    take,
    typical_entries,
)
from model.kernels.indexer import IndexerInputs
from model.sequence_plan import Bounds


class _ChunkedAttention(torch.autograd.Function):
    """Chunked forward; backward recomputes the probabilities from the saved log denominators."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTHK: Tensor,
        kv_BUK: Tensor,
        sink_H: Tensor,
        entry_kv_BEK: Tensor | None,
        start_BT: Tensor,
        window: int,
        entries: EntrySet | None,
    ) -> tuple[Tensor, Tensor]:
        B, T, H, K = q_BTHK.shape
        o_BTHK = torch.empty_like(q_BTHK)
        lse_BTH = torch.empty(B, T, H, device=q_BTHK.device, dtype=torch.float32)
        ctx.size = chunks.chunk_size(q_BTHK, B * H, 2 * window + typical_entries(entries), T)
        near = ChunkWindow(start_BT, window, kv_BUK.shape[1], ctx.size)
        far = None if entries is None else ChunkEntries(entries)
        sink, scale_1 = sink_H.float(), lse_BTH.new_full((1,), K**-0.5)
        for chunk in chunks_of(T, ctx.size):
            met = None if far is None else far.of(chunk)
            keys = join(kv_BUK, near.of(chunk), entry_kv_BEK, met)
            s = masked_scores(dots_of(q_BTHK[:, None, chunk], keys)[:, 0], scale_1, keys)
            top = torch.maximum(s.amax(dim=-1), sink)
            top.masked_fill_(top.isinf(), 0.0)  # as logsumexp: inf - inf would be NaN
            p = s.sub_(top[..., None]).exp_()
            total = (sink - top).exp_().add_(p.sum(dim=-1))
            torch.div(mix(p.to(q_BTHK.dtype), keys), total[..., None], out=o_BTHK[:, chunk])
            torch.add(top, total.log(), out=lse_BTH[:, chunk])
        ctx.save_for_backward(q_BTHK, kv_BUK, sink_H, entry_kv_BEK, start_BT, o_BTHK, lse_BTH)
        ctx.window, ctx.entries = window, entries
        ctx.mark_non_differentiable(lse_BTH)
        return o_BTHK, lse_BTH

    @staticmethod
    def backward(ctx: Any, grad_o_BTHK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHK, kv_BUK, sink_H, entry_kv_BEK, start_BT, o_BTHK, lse_BTH = ctx.saved_tensors
        scale = q_BTHK.shape[-1] ** -0.5
        near = ChunkWindow(start_BT, ctx.window, kv_BUK.shape[1], ctx.size)
        far = None if ctx.entries is None else ChunkEntries(ctx.entries)
        grad_q, delta_BTH = torch.empty_like(q_BTHK), torch.empty_like(lse_BTH)
        grad_kv = torch.zeros_like(kv_BUK, dtype=torch.float32)
        grad_entries = (
            None if entry_kv_BEK is None else torch.zeros_like(entry_kv_BEK, dtype=torch.float32)
        )
        scale_1 = lse_BTH.new_full((1,), scale)
        for chunk in chunks_of(q_BTHK.shape[1], ctx.size):
            q, delta = q_BTHK[:, chunk], delta_BTH[:, chunk]
            grad_o = grad_o_BTHK[:, chunk].to(q.dtype)
            torch.sum(grad_o.float() * o_BTHK[:, chunk], dim=-1, out=delta)
            met = None if far is None else far.of(chunk)
            keys = join(kv_BUK, near.of(chunk), entry_kv_BEK, met)
            both = torch.stack((q, grad_o), dim=1)
            dots = dots_of(both, keys)
            p = masked_scores(dots[:, 0], scale_1, keys).sub_(lse_BTH[:, chunk, :, None]).exp_()
            grad_s = torch.sub(dots[:, 1], delta[..., None]).mul_(p)
            # a NaN of the query (in delta) must not reach keys it does not see
            grad_s.masked_fill_(keys.hidden_BCG[:, :, None], 0.0)
            mixed = torch.empty_like(dots, dtype=q.dtype)
            torch.mul(grad_s, scale, out=mixed[:, 0])
            mixed[:, 1].copy_(p)
            mix_into(grad_q[:, chunk], mixed[:, 0], keys)
            accumulate(grad_kv, grad_entries, keys, mixed, both)
        grad_sink = ((sink_H.float() - lse_BTH).exp_() * delta_BTH).sum(dim=(0, 1)).neg_()
        if grad_entries is not None and entry_kv_BEK is not None:
            grad_entries = grad_entries.to(entry_kv_BEK.dtype)
        return (
            grad_q,
            grad_kv.to(kv_BUK.dtype),
            grad_sink.to(sink_H.dtype),
            grad_entries,
            None,
            None,
            None,
        )


def attention_chunked(
    q_BTHK: Tensor,
    kv_BUK: Tensor,
    sink_H: Tensor,
    start_BT: Tensor,
    window: int,
    entries: EntrySet | None,
) -> AttentionResult:
    """Same as ``attention_reference``, in memory linear in T."""
    entry_kv = None if entries is None else entries.kv_BEK
    detached = entries
    if (
        entries is not None
    ):  # the Function owns the differentiable entries; the set carries indices only
        detached = replace(entries, kv_BEK=entries.kv_BEK.detach())
    o, lse = _ChunkedAttention.apply(q_BTHK, kv_BUK, sink_H, entry_kv, start_BT, window, detached)
    return AttentionResult(o, lse)


@torch.no_grad()
def index_topk_chunked(
    indexer: IndexerInputs,
    first_BT: Tensor,
    stop_BT: Tensor,
    topk: int,
    bounds: Bounds | None = None,
) -> Tensor:
    """Same as ``index_topk_reference``, in chunks of queries."""
    q_BTJL, k_BEL, w_BTJ = indexer
    if q_BTJL.device.type == "cpu":  # bf16 dots would be cast to fp32 afterwards: costs more
        q_BTJL, k_BEL = q_BTJL.float(), k_BEL.float()
    B, T, J, _ = q_BTJL.shape
    E = k_BEL.shape[1]
    count, w_BTJ = min(topk, E), w_BTJ.float()
    index_BTN = torch.full((B, T, count), -1, dtype=torch.int64, device=q_BTJL.device)
    lowest, zero_1 = torch.finfo(torch.float32).min, w_BTJ.new_zeros(1)
    visible = ChunkEntries(EntrySet(k_BEL, first_BT, stop_BT, bounds=bounds))
    for chunk in chunks_of(T, chunks.chunk_size(k_BEL, B * J, E, T)):
        met = visible.of(chunk)
        if met is None:
            continue
        width = met.rows.stop - met.rows.start
        if width <= count:  # all visible entries are taken
            row_G = visible.row_E[met.rows].expand(met.hidden_BCG.shape)
            index_BTN[:, chunk, :width] = row_G.masked_fill(met.hidden_BCG, -1)
            continue
        dots_BCJG = dots_of(q_BTJL[:, None, chunk], take(k_BEL, met))[:, 0]
        scores = _weighted(positive(dots_BCJG, zero_1), w_BTJ[:, chunk])
        scores.clamp_(min=lowest).masked_fill_(met.hidden_BCG, float("-inf"))  # as ``ranked``
        values, best = scores.topk(count, dim=-1, sorted=False)
        best.add_(met.rows.start).masked_fill_(values == float("-inf"), -1)
        index_BTN[:, chunk] = best
    return index_BTN


def _weighted(active_BCJG: Tensor, w_BCJ: Tensor) -> Tensor:
    """``sum_j w_j active_j``: [B, C, G]."""
    return torch.matmul(w_BCJ[:, :, None], active_BCJG)[:, :, 0]


class _ChunkedIndexerLoss(torch.autograd.Function):
    """Forms the KL and its gradients together, chunk by chunk; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BTJL: Tensor,
        k_BEL: Tensor,
        w_BTJ: Tensor,
        q_BTHK: Tensor,
        lse_BTH: Tensor,
        entries: EntrySet,
    ) -> Tensor:
        B, T, J, _ = q_BTJL.shape
        grad_q, grad_w = torch.zeros_like(q_BTJL), []
        grad_k = torch.zeros_like(k_BEL, dtype=torch.float32)
        kl_BT = lse_BTH.new_zeros(B, T)
        wide_BTJ, zero_1 = w_BTJ.float(), lse_BTH.new_zeros(1)
        minus_w, minus_lse = -wide_BTJ, -lse_BTH
        size = chunks.chunk_size(q_BTJL, B * max(J, q_BTHK.shape[2]), typical_entries(entries), T)
        used = ChunkEntries(entries)
        for chunk in chunks_of(T, size):
            met = used.of(chunk)
            if met is None:
                grad_w.append(torch.zeros_like(wide_BTJ[:, chunk]))
                continue
            hidden = met.hidden_BCG
            dots = dots_of(q_BTHK[:, None, chunk], take(entries.kv_BEK, met))[:, 0]
            teacher = _teacher(dots, q_BTHK.shape[-1] ** -0.5, minus_lse[:, chunk], hidden)
            keys, q = take(k_BEL, met), q_BTJL[:, None, chunk]
            dots = dots_of(q, keys)[:, 0]
            active = positive(dots, zero_1)
            scores = _weighted(active, wide_BTJ[:, chunk]).masked_fill_(hidden, float("-inf"))
            log_p = scores.log_softmax(dim=-1).masked_fill_(hidden, 0.0)  # NaN where none is seen
            kl = torch.xlogy(teacher, teacher).addcmul_(teacher, log_p, value=-1)
            torch.sum(kl, dim=-1, out=kl_BT[:, chunk])
            # teacher - p * sum(teacher), which is 1, or 0 where the mass underflows
            fall = torch.ops.aten._log_softmax_backward_data(teacher, log_p, -1, torch.float32)
            fall.masked_fill_(hidden, 0.0)  # a NaN of the query must not reach keys unseen
            grad_w.append(torch.matmul(active, fall[..., None])[..., 0])
            grad_dot = torch.empty_like(dots, dtype=q.dtype)
            torch.mul(minus_w[:, chunk, :, None], fall[:, :, None], out=grad_dot)
            grad_dot = torch.ops.aten.threshold_backward(grad_dot, dots, 0)
            mix_into(grad_q[:, chunk], grad_dot, keys)
            accumulate(None, grad_k, keys, grad_dot[:, None], q)
        total, grad_w = kl_BT.sum(), torch.cat(grad_w, dim=1).neg_().to(w_BTJ.dtype)
        ctx.save_for_backward(grad_q, grad_k.to(k_BEL.dtype), grad_w)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_q, grad_k, grad_w = ctx.saved_tensors
        return grad_q * grad, grad_k * grad, grad_w * grad, None, None, None


def _teacher(dots_BCHG: Tensor, scale: float, minus_lse_BCH: Tensor, hidden: Tensor) -> Tensor:
    """Attention mass over heads, full denominator, normalised over the keys of each query."""
    mass = torch.add(minus_lse_BCH[..., None], dots_BCHG, alpha=scale).exp_().sum(dim=2)
    mass.masked_fill_(hidden, 0.0)  # not 0 by itself where it overflows or the denominator is NaN
    return mass.div_(mass.sum(dim=-1, keepdim=True).clamp_(min=1e-30))


def indexer_loss_chunked(
    indexer: IndexerInputs,
    q_BTHK: Tensor,
    lse_BTH: Tensor,
    entries: EntrySet,
    mass_BTN: Tensor | None = None,
) -> Tensor:
    """Same as ``indexer_loss_reference``, in memory linear in T."""
    q, k, w = indexer
    detached = replace(entries, kv_BEK=entries.kv_BEK.detach())
    return _ChunkedIndexerLoss.apply(q, k, w, q_BTHK.detach(), lse_BTH, detached)
