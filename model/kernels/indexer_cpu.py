"""The indexer on CPU by the C++ of ``cpu/indexer.cpp``; the reference is ``indexer.py``.

The scores of a query are compared as they arrive and never stored, so the choice costs the products
alone. The loss covers the sparse phase with the teacher's mass that ``attention_cpu`` gave; other
phases, devices, and head dims that are no multiple of 16 go through ``attention_fast.py``.
"""

# Legend: B rows, T tokens, J indexer heads, L indexer head dim, E entries, N chosen
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.attention import EntrySet
from model.kernels.attention_fast import index_topk_chunked, indexer_loss_chunked
from model.kernels.cpu_build import KernelLibrary, kernel_library
from model.kernels.indexer import IndexerInputs
from model.sequence_plan import Bounds

_SIGNATURES = {
    "index_topk": "pppppp" + "lllllli",
    "indexer_loss": "ppppppppp" + "lllllli",
}


def _library(indexer: IndexerInputs) -> KernelLibrary | None:
    q_BTJL, k_BEL, _ = indexer
    supported = q_BTJL.dtype in (torch.float32, torch.bfloat16) and q_BTJL.shape[-1] % 16 == 0
    if q_BTJL.device.type != "cpu" or not supported or q_BTJL.dtype != k_BEL.dtype:
        return None
    return kernel_library("indexer.cpp", _SIGNATURES)


@torch.no_grad()
def index_topk_cpu(
    indexer: IndexerInputs,
    first_BT: Tensor,
    stop_BT: Tensor,
    topk: int,
    bounds: Bounds | None = None,
) -> Tensor:
    """Same as ``index_topk_reference``; equal scores go to the earlier entry."""
    library = _library(indexer)
    if library is None:
        return index_topk_chunked(indexer, first_BT, stop_BT, topk, bounds)
    q_BTJL, k_BEL, w_BTJ = (tensor.detach().contiguous() for tensor in indexer)
    E, count = k_BEL.shape[1], min(topk, k_BEL.shape[1])
    index_BTN = torch.empty(*q_BTJL.shape[:2], count, dtype=torch.int64)
    library.call(
        "index_topk", q_BTJL.dtype, q_BTJL, k_BEL, w_BTJ.float(),
        first_BT.long().contiguous(), stop_BT.long().contiguous(), index_BTN, *q_BTJL.shape, E,
        count,
    )  # fmt: skip
    return index_BTN


class _CpuIndexerLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTJL: Tensor,
        k_BEL: Tensor,
        w_BTJ: Tensor,
        index_BTN: Tensor,
        mass_BTN: Tensor,
        library: KernelLibrary,
    ) -> Tensor:
        q_BTJL, k_BEL, w_BTJ = q_BTJL.contiguous(), k_BEL.contiguous(), w_BTJ.float().contiguous()
        grad_q, grad_k, grad_w = (
            torch.empty_like(q_BTJL),
            torch.empty(k_BEL.shape),
            torch.empty_like(w_BTJ),
        )
        total = torch.empty((), dtype=torch.float64)
        library.call(
            "indexer_loss", q_BTJL.dtype, q_BTJL, k_BEL, w_BTJ, index_BTN.contiguous(), mass_BTN,
            total, grad_q, grad_k, grad_w, *q_BTJL.shape, k_BEL.shape[1], index_BTN.shape[-1],
        )  # fmt: skip
        ctx.save_for_backward(grad_q, grad_k.to(k_BEL.dtype), grad_w)
        return total.float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_q, grad_k, grad_w = ctx.saved_tensors
        return grad_q * grad, grad_k * grad, grad_w * grad, None, None, None


def indexer_loss_cpu(
    indexer: IndexerInputs,
    q_BTHK: Tensor,
    lse_BTH: Tensor,
    entries: EntrySet,
    mass_BTN: Tensor | None = None,
) -> Tensor:
    """Same as ``indexer_loss_reference``."""
    library = _library(indexer)
    if library is None or mass_BTN is None or entries.index_BTN is None:
        return indexer_loss_chunked(indexer, q_BTHK, lse_BTH, entries, mass_BTN)
    return _CpuIndexerLoss.apply(*indexer, entries.index_BTN, mass_BTN, library)
