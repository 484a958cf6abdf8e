"""Attention and indexer in chunks of queries: memory linear in T, scores recomputed in backward.

The window is a band: a chunk of C queries meets C + window - 1 tokens. Entries are a slice (all
visible ones) with a mask while the slice is short, or gathered per query when the choice is much
smaller than the slice.
"""

# Legend: B rows, U window keys, C queries of a chunk, H heads, K head dim, E entries, N chosen, G
# keys of a group, J, L indexer heads and head dim
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.kernels.attention import AttentionResult, EntrySet
from model.kernels.gather import add_rows_
from model.kernels.indexer import IndexerInputs, ranked
from model.sequence_plan import Bounds

# Elements of one chunk's score tensor. On a CPU 2^18 fp32 = 1 MiB, about a core's L2 cache:
# 2^16 pays more for calls, 2^20 for memory traffic (docs/LOG.md). Elsewhere calls are what costs:
# 256 queries, unless their scores would take more than 1 GiB.
_CHUNK_ELEMENTS = {"cpu": 1 << 18}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 28
# Gathering keys per query moves N * K elements a query; masking computes the whole slice. Masking
# wins up to here.
_MASK_UP_TO = 6


class _Keys(NamedTuple):
    """Keys of a chunk: rows ``low:high`` of a table (shared), or one set per query (gathered)."""

    low: int
    high: int
    mask_BCG: Tensor
    index_BCG: Tensor | None  # gathered: the table's row of every key, clamped to >= 0


def _chunk_size(like: Tensor, rows_by_heads: int, keys: int, tokens: int) -> int:
    elements = _CHUNK_ELEMENTS.get(like.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    size = max(elements // max(rows_by_heads * keys, 1), 1)
    return max(16, min(256, 1 << (size.bit_length() - 1), tokens))


def _chunks(T: int, size: int) -> Iterator[slice]:
    for begin in range(0, T, size):
        yield slice(begin, min(begin + size, T))


def _window_keys(start_BT: Tensor, chunk: slice, window: int, num_keys: int) -> _Keys:
    before, device = num_keys - start_BT.shape[1], start_BT.device
    first, stop = chunk.start + before, chunk.stop + before
    low = max(0, first - window + 1)
    key_G = torch.arange(low, stop, device=device)
    query_C = torch.arange(first, stop, device=device)
    lowest_BC = torch.maximum(start_BT[:, chunk], query_C - (window - 1))
    mask = (key_G >= lowest_BC[..., None]) & (key_G <= query_C[:, None])
    return _Keys(low, stop, mask, None)


def _bounds(entries: EntrySet) -> Bounds:
    """The set's bounds; a set that has none is read, for which a device is waited for."""
    if entries.bounds is not None:
        return entries.bounds
    first_BT, stop_BT = entries.first_BT.cpu(), entries.stop_BT.cpu()
    sees_BT = stop_BT > first_BT
    return Bounds(
        torch.where(sees_BT, first_BT, entries.kv_BEK.shape[1]).amin(dim=0),
        torch.where(sees_BT, stop_BT, 0).amax(dim=0),
    )


def _entry_keys(entries: EntrySet, chunk: slice) -> _Keys | None:
    """The entries a chunk meets; None when no query of it sees any."""
    first_BC, stop_BC = entries.first_BT[:, chunk], entries.stop_BT[:, chunk]
    low, high = _bounds(entries).of(chunk)
    if low >= high:
        return None
    row_G = torch.arange(low, high, device=first_BC.device)
    if entries.index_BTN is None:
        mask = (row_G >= first_BC[..., None]) & (row_G < stop_BC[..., None])
        return _Keys(low, high, mask, None)
    index_BCN = entries.index_BTN[:, chunk]
    if high - low > _MASK_UP_TO * index_BCN.shape[-1]:
        return _Keys(low, high, index_BCN >= 0, index_BCN.clamp(min=0))
    used = torch.zeros(*first_BC.shape, high - low + 1, dtype=torch.bool, device=row_G.device)
    place = torch.where(index_BCN < 0, high - low, index_BCN - low)
    return _Keys(low, high, used.scatter_(2, place, True)[..., :-1], None)


def _take(table_BEK: Tensor, keys: _Keys) -> Tensor:
    """[B, G, K] (shared) or [B, C, G, K] (gathered)."""
    if keys.index_BCG is None:
        return table_BEK[:, keys.low : keys.high]
    B, E, K = table_BEK.shape
    flat = keys.index_BCG + torch.arange(B, device=table_BEK.device)[:, None, None] * E
    return table_BEK.reshape(B * E, K).index_select(0, flat.flatten()).view(*flat.shape, K)


def _dot(x_BCHK: Tensor, keys: Tensor) -> Tensor:
    """``x . key`` for all keys: [B, C, H, G]."""
    if keys.dim() == 4:
        return torch.matmul(x_BCHK, keys.transpose(-1, -2))
    B, C, H, K = x_BCHK.shape
    return torch.bmm(x_BCHK.reshape(B, C * H, K), keys.transpose(1, 2)).view(B, C, H, -1)


def _mix(p_BCHG: Tensor, keys: Tensor) -> Tensor:
    """``sum_g p key_g``: [B, C, H, K]."""
    if keys.dim() == 4:
        return torch.matmul(p_BCHG, keys)
    B, C, H, G = p_BCHG.shape
    return torch.bmm(p_BCHG.reshape(B, C * H, G), keys).view(B, C, H, -1)


def _accumulate(grad_BEK: Tensor, keys: _Keys, p_BCHG: Tensor, x_BCHK: Tensor) -> None:
    """Add ``p^T x`` to the rows of ``grad`` (fp32) that the keys came from."""
    B, C, H, G = p_BCHG.shape
    if keys.index_BCG is None:
        part = torch.bmm(p_BCHG.reshape(B, C * H, G).transpose(1, 2), x_BCHK.reshape(B, C * H, -1))
        grad_BEK[:, keys.low : keys.high] += part
        return
    part = torch.matmul(p_BCHG.transpose(-1, -2), x_BCHK).to(grad_BEK.dtype)
    E, K = grad_BEK.shape[1:]
    flat = keys.index_BCG + torch.arange(B, device=grad_BEK.device)[:, None, None] * E
    add_rows_(grad_BEK.view(B * E, K), flat.flatten(), part.view(-1, K))


def _score(q_BCHK: Tensor, keys: Tensor, mask_BCG: Tensor) -> Tensor:
    scores = _dot(q_BCHK, keys).float().mul_(q_BCHK.shape[-1] ** -0.5)
    return scores.masked_fill_(~mask_BCG[:, :, None], float("-inf"))


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
        B, T, H, _ = q_BTHK.shape
        o_BTHK = torch.empty_like(q_BTHK)
        lse_BTH = torch.empty(B, T, H, device=q_BTHK.device, dtype=torch.float32)
        ctx.size = _chunk_size(q_BTHK, B * H, 2 * window + _typical_entries(entries), T)
        for chunk in _chunks(T, ctx.size):
            q = q_BTHK[:, chunk]
            groups = _groups(kv_BUK, entry_kv_BEK, start_BT, window, entries, chunk)
            scores = [_score(q, keys, k.mask_BCG) for k, keys, _ in groups]
            sink = sink_H.float().expand(B, q.shape[1], H)
            top = sink
            for s in scores:
                top = torch.maximum(top, s.amax(dim=-1))
            top = torch.where(top.isinf(), 0.0, top)  # as logsumexp: inf - inf would be NaN
            weights = [s.sub_(top[..., None]).exp_() for s in scores]
            total = (sink - top).exp_()
            for p in weights:
                total += p.sum(dim=-1)
            out = sum(
                _mix(p.to(q.dtype), keys).float()
                for p, (_, keys, _) in zip(weights, groups, strict=True)
            )
            o_BTHK[:, chunk] = out / total[..., None]
            lse_BTH[:, chunk] = top + total.log()
        ctx.save_for_backward(q_BTHK, kv_BUK, sink_H, entry_kv_BEK, start_BT, o_BTHK, lse_BTH)
        ctx.window, ctx.entries = window, entries
        ctx.mark_non_differentiable(lse_BTH)
        return o_BTHK, lse_BTH

    @staticmethod
    def backward(ctx: Any, grad_o_BTHK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q_BTHK, kv_BUK, sink_H, entry_kv_BEK, start_BT, o_BTHK, lse_BTH = ctx.saved_tensors
        scale = q_BTHK.shape[-1] ** -0.5
        grad_q = torch.empty_like(q_BTHK)
        grad_kv = torch.zeros_like(kv_BUK, dtype=torch.float32)
        grad_entries = (
            None if entry_kv_BEK is None else torch.zeros_like(entry_kv_BEK, dtype=torch.float32)
        )
        grad_sink = torch.zeros_like(sink_H, dtype=torch.float32)
        for chunk in _chunks(q_BTHK.shape[1], ctx.size):
            q, lse = q_BTHK[:, chunk], lse_BTH[:, chunk]
            grad_o = grad_o_BTHK[:, chunk].to(q.dtype)
            delta = (grad_o.float() * o_BTHK[:, chunk].float()).sum(dim=-1)
            grad_sink -= ((sink_H.float() - lse).exp() * delta).sum(dim=(0, 1))
            grad_q_chunk = torch.zeros(q.shape, device=q.device, dtype=torch.float32)
            groups = _groups(kv_BUK, entry_kv_BEK, start_BT, ctx.window, ctx.entries, chunk)
            for k, keys, is_entry in groups:
                p = _score(q, keys, k.mask_BCG).sub_(lse[..., None]).exp_()
                grad_s = _dot(grad_o, keys).float().sub_(delta[..., None]).mul_(p).mul_(scale)
                # a NaN of the query (in delta) must not reach keys it does not see
                grad_s = grad_s.masked_fill_(~k.mask_BCG[:, :, None], 0.0).to(q.dtype)
                grad_q_chunk += _mix(grad_s, keys)
                target = grad_entries if is_entry else grad_kv
                assert target is not None
                both_p = torch.cat((grad_s, p.to(q.dtype)), dim=2)
                _accumulate(target, k, both_p, torch.cat((q, grad_o), dim=2))
            grad_q[:, chunk] = grad_q_chunk
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


def _typical_entries(entries: EntrySet | None) -> int:
    if entries is None:
        return 0
    E = entries.kv_BEK.shape[1]
    if entries.index_BTN is None:
        return E
    return min(E, _MASK_UP_TO * entries.index_BTN.shape[-1])


def _groups(
    kv_BUK: Tensor,
    entry_kv_BEK: Tensor | None,
    start_BT: Tensor,
    window: int,
    entries: EntrySet | None,
    chunk: slice,
) -> list[tuple[_Keys, Tensor, bool]]:
    """Key groups of a chunk: (keys, their vectors, is it entries?)."""
    near = _window_keys(start_BT, chunk, window, kv_BUK.shape[1])
    groups = [(near, _take(kv_BUK, near), False)]
    if entries is not None and entry_kv_BEK is not None:
        far = _entry_keys(entries, chunk)
        if far is not None:
            groups.append((far, _take(entry_kv_BEK, far), True))
    return groups


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
    count = min(topk, E)
    index_BTN = torch.full((B, T, count), -1, dtype=torch.int64, device=q_BTJL.device)
    everything = EntrySet(k_BEL, first_BT, stop_BT, bounds=bounds)
    for chunk in _chunks(T, _chunk_size(k_BEL, B * J, E, T)):
        keys = _entry_keys(everything, chunk)
        if keys is None:
            continue
        width = keys.high - keys.low
        if width <= count:  # all visible entries are taken
            row_G = torch.arange(keys.low, keys.high, device=q_BTJL.device)
            index_BTN[:, chunk, :width] = torch.where(keys.mask_BCG, row_G, -1)
            continue
        scores = _weighted_relu(_dot(q_BTJL[:, chunk], _take(k_BEL, keys)), w_BTJ[:, chunk])
        values, best = ranked(scores, keys.mask_BCG).topk(count, dim=-1, sorted=False)
        index_BTN[:, chunk] = torch.where(values == float("-inf"), -1, best + keys.low)
    return index_BTN


def _weighted_relu(dots_BCJG: Tensor, w_BCJ: Tensor) -> Tensor:
    """``sum_j w_j relu(dot_j)`` in fp32: [B, C, G]."""
    B, C, J, G = dots_BCJG.shape
    active = dots_BCJG.float().relu_().view(B * C, J, G)
    return torch.bmm(w_BCJ.float().reshape(B * C, 1, J), active).view(B, C, G)


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
        grad_q, grad_w = torch.zeros_like(q_BTJL), torch.zeros_like(w_BTJ)
        grad_k = torch.zeros_like(k_BEL, dtype=torch.float32)
        total = torch.zeros((), device=q_BTJL.device, dtype=torch.float32)
        size = _chunk_size(q_BTJL, B * max(J, q_BTHK.shape[2]), _typical_entries(entries), T)
        for chunk in _chunks(T, size):
            keys = _entry_keys(entries, chunk)
            if keys is None:
                continue
            teacher = _teacher(
                q_BTHK[:, chunk], lse_BTH[:, chunk], _take(entries.kv_BEK, keys), keys.mask_BCG
            )
            q, w, k = q_BTJL[:, chunk], w_BTJ[:, chunk], _take(k_BEL, keys)
            active = _dot(q, k).float().relu_()
            scores = torch.einsum("bcjg,bcj->bcg", active, w.float())
            scores = scores.masked_fill_(~keys.mask_BCG, float("-inf"))
            log_p = scores.log_softmax(dim=-1)
            sees = keys.mask_BCG.any(dim=-1, keepdim=True)
            log_p = torch.where(sees & keys.mask_BCG, log_p, 0.0)
            total += (torch.xlogy(teacher, teacher) - teacher * log_p).sum()
            taught = teacher.sum(dim=-1, keepdim=True)  # 1, or 0 where the mass underflows
            grad_s = torch.where(keys.mask_BCG, log_p.exp() * taught - teacher, 0.0)
            grad_w[:, chunk] = torch.einsum("bcg,bcjg->bcj", grad_s, active)
            grad_dot = (w.float()[..., None] * grad_s[:, :, None]).masked_fill_(active <= 0, 0.0)
            grad_dot = grad_dot.to(q.dtype)
            grad_q[:, chunk] = _mix(grad_dot, k)
            _accumulate(grad_k, keys, grad_dot, q)
        ctx.save_for_backward(grad_q, grad_k.to(k_BEL.dtype), grad_w)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_q, grad_k, grad_w = ctx.saved_tensors
        return grad_q * grad, grad_k * grad, grad_w * grad, None, None, None


def _teacher(q_BCHK: Tensor, lse_BCH: Tensor, keys: Tensor, mask_BCG: Tensor) -> Tensor:
    """Attention mass over heads, full denominator, normalised over the keys of each query."""
    p = _score(q_BCHK, keys, mask_BCG).sub_(lse_BCH[..., None]).exp_()
    mass = p.sum(dim=2).masked_fill_(~mask_BCG, 0.0)  # not 0 by itself if the denominator is NaN
    return mass / mass.sum(dim=-1, keepdim=True).clamp(min=1e-30)


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
