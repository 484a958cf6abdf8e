"""Attention on CPU by the C++ of ``cpu/attention.cpp``; the reference is ``attention.py``.

Each query meets exactly its keys: no band of masked scores, no gathered copies in memory.
Everything inside is fp32, also for bf16 tensors. Falls back on ``attention_fast.py`` where it
cannot run: other devices, no compiler, or a head dim that is no multiple of 16.
"""

# Legend: B rows, T tokens, U window keys, H heads, K head dim, E entries, N chosen
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.attention import AttentionResult, EntrySet
from model.kernels.attention_fast import attention_chunked
from model.kernels.cpu_build import KernelLibrary, kernel_library

_SIGNATURES = {
    "attention_forward": "ppppppppppp" + "llllllll" + "fi",
    "attention_backward": "ppppppppppppppp" + "llllllll" + "fi",
}


def _library(q_BTHK: Tensor) -> KernelLibrary | None:
    """The compiled kernels, where they can serve these tensors."""
    supported = q_BTHK.dtype in (torch.float32, torch.bfloat16) and q_BTHK.shape[-1] % 16 == 0
    if q_BTHK.device.type != "cpu" or not supported:
        return None
    return kernel_library("attention.cpp", _SIGNATURES)


class _CpuAttention(torch.autograd.Function):
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
        library: KernelLibrary,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        q_BTHK, kv_BUK, sink_H = (
            q_BTHK.contiguous(),
            kv_BUK.contiguous(),
            sink_H.float().contiguous(),
        )
        sets = _indices(entries, entry_kv_BEK)
        o_BTHK = torch.empty_like(q_BTHK)
        lse_BTH = q_BTHK.new_empty(q_BTHK.shape[:-1], dtype=torch.float32)
        index_BTN = sets[-1]
        mass_BTN = None if index_BTN is None else torch.empty(index_BTN.shape)
        sizes = _sizes(q_BTHK, kv_BUK, sets, window)
        library.call(
            "attention_forward", q_BTHK.dtype, q_BTHK, kv_BUK, sink_H, sets[0], start_BT, *sets[1:],
            o_BTHK, lse_BTH, mass_BTN, *sizes,
        )  # fmt: skip
        ctx.save_for_backward(q_BTHK, kv_BUK, sink_H, start_BT, o_BTHK, lse_BTH, *sets)
        ctx.sizes, ctx.library = sizes, library
        ctx.mark_non_differentiable(*[x for x in (lse_BTH, mass_BTN) if x is not None])
        return o_BTHK, lse_BTH, mass_BTN

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o_BTHK: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, sink, start, o, lse, *sets = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        grad_kv, grad_sink = torch.empty(kv.shape), torch.empty_like(sink)
        grad_entries = None if sets[0] is None else torch.empty(sets[0].shape)
        ctx.library.call(
            "attention_backward", q.dtype, q, kv, sink, sets[0], start, *sets[1:], o, lse,
            grad_o_BTHK.to(q.dtype).contiguous(), grad_q, grad_kv, grad_entries, grad_sink,
            *ctx.sizes,
        )  # fmt: skip
        if grad_entries is not None:
            grad_entries = grad_entries.to(kv.dtype)
        return grad_q, grad_kv.to(kv.dtype), grad_sink, grad_entries, None, None, None, None


def _indices(entries: EntrySet | None, kv_BEK: Tensor | None) -> list[Tensor | None]:
    """Entry keys, first, stop and index, contiguous."""
    if entries is None or kv_BEK is None:
        return [None, None, None, None]
    ranges = entries.first_BT.long(), entries.stop_BT.long()
    given = (kv_BEK, *ranges, entries.index_BTN)
    return [None if tensor is None else tensor.contiguous() for tensor in given]


def _sizes(
    q_BTHK: Tensor, kv_BUK: Tensor, sets: list[Tensor | None], window: int
) -> tuple[float, ...]:
    table, index = sets[0], sets[-1]
    entries = 0 if table is None else table.shape[1]
    chosen = 0 if index is None else index.shape[-1]
    keys = kv_BUK.shape[1]
    return (*q_BTHK.shape, keys, entries, chosen, window, q_BTHK.shape[-1] ** -0.5)


def attention_cpu(
    q_BTHK: Tensor,
    kv_BUK: Tensor,
    sink_H: Tensor,
    start_BT: Tensor,
    window: int,
    entries: EntrySet | None,
) -> AttentionResult:
    """Same as ``attention_reference``: the C++ kernel where it can run, else in chunks."""
    library = _library(q_BTHK)
    if library is None:
        return attention_chunked(q_BTHK, kv_BUK, sink_H, start_BT, window, entries)
    entry_kv = None if entries is None else entries.kv_BEK
    detached = None
    if entries is not None:  # the Function owns the differentiable entries; the set only indices
        detached = replace(entries, kv_BEK=entries.kv_BEK.detach())
    o, lse, mass = _CpuAttention.apply(
        q_BTHK, kv_BUK, sink_H, entry_kv, start_BT.long().contiguous(), window, detached, library
    )
    return AttentionResult(o, lse, mass)
