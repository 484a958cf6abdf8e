"""Pooling of tokens to entries in Triton, one pass each way (reference B.5, ``../pool.py``).

A program forms an entry's channels by a running softmax over its tokens; the backward pass has the
saved log denominators. A token's values serve at most one entry a half of the channels, so
gradients are written, never added; those of ``ape`` are summed over runs of entries, then over the
runs.
"""
# pyright: reportGeneralTypeIssues=false

# Legend: B rows, T tokens here and before (U), E entries (L), M tokens of a block, C channels of
# the projections, K entry dim
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.triton.launch import (
    INTERPRETER,
    OPS,
    Shipped,
    Tile,
    architecture_of,
    blocks,
    define,
    launch,
    power_of_two,
)
from model.sequence_plan import Blocks

_WIDTH = 256  # channels of a program
_RUNS = {INTERPRETER: 2, "other": 16}  # of entries, each with its own part of the gradient of ape


@triton.jit
def pool_forward(
    X, Z, APE, TOKENS, PREVIOUS, OUT, MEAN, LSE, T, E, K, lead, M: tl.constexpr, BM: tl.constexpr,
    HALVES: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``sum softmax(z + ape) x``, rounded, and MEAN not. Grid (entries, blocks of K, rows)."""
    e, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    c = tl.program_id(1) * BK + tl.arange(0, BK)
    m = tl.arange(0, BM)
    C = HALVES * K
    X += b * T * C
    Z += b * T * C
    top = tl.full([BK], float("-inf"), tl.float32)
    total = tl.zeros([BK], tl.float32)
    acc = tl.zeros([BK], tl.float32)
    previous = tl.load(PREVIOUS + b * E + e) != 0
    for half in tl.static_range(HALVES):
        reads = previous if half + 1 < HALVES else True
        block = e + lead - (HALVES - 1 - half)
        at_c = half * K + c
        for first in tl.range(0, M, BM):
            ok_m = (first + m < M) & reads
            t = tl.load(TOKENS + (b * (E + lead) + block) * M + first + m, mask=ok_m, other=T)
            ok = (ok_m & (t < T))[:, None] & (c < K)[None, :]
            at = t[:, None] * C + at_c[None, :]
            x = tl.load(X + at, mask=ok, other=0.0)
            z = tl.load(Z + at, mask=ok, other=0.0)
            ape_at = (first + m)[:, None] * C + at_c[None, :]
            z += tl.load(APE + ape_at, mask=ok_m[:, None] & (c < K)[None, :], other=0.0)
            z = tl.where(ok_m[:, None], z, float("-inf"))
            higher = tl.maximum(top, tl.max(z, 0))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp(z - base[None, :])
            keep = tl.exp(top - base)
            total = total * keep + tl.sum(p, 0)
            acc = acc * keep + tl.sum(p * x, 0)
            top = higher
    at = (b * E + e) * K + c
    mean = acc / total
    tl.store(OUT + at, mean.to(OUT.dtype.element_ty), mask=c < K)
    tl.store(MEAN + at, mean, mask=c < K)
    tl.store(LSE + at, top + tl.log(total), mask=c < K)


@triton.jit
def pool_backward(
    X, Z, APE, TOKENS, PREVIOUS, MEAN, LSE, G, GX, GZ, PAPE, T, E, K, lead, run, M: tl.constexpr,
    BM: tl.constexpr, HALVES: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Gradients of a run of entries. Grid (runs, blocks of channels, rows * blocks of M)."""
    b = (tl.program_id(2) // (M // BM)).to(tl.int64)
    part = b * tl.num_programs(0) + tl.program_id(0)
    c = tl.program_id(1) * BK + tl.arange(0, BK)
    m = (tl.program_id(2) % (M // BM)) * BM + tl.arange(0, BM)
    C = HALVES * K
    X += b * T * C
    Z += b * T * C
    GX += b * T * C
    GZ += b * T * C
    begin = tl.program_id(0) * run
    stop = tl.minimum(begin + run, E)
    for half in tl.static_range(HALVES):
        at_c = half * K + c
        ape_at = m[:, None] * C + at_c[None, :]
        ape = tl.load(APE + ape_at, mask=(c < K)[None, :], other=0.0)
        total = tl.zeros([BM, BK], tl.float32)
        for e in tl.range(begin, stop):
            reads = True
            if half + 1 < HALVES:
                reads = tl.load(PREVIOUS + b * E + e) != 0
            if reads:
                block = e + lead - (HALVES - 1 - half)
                t = tl.load(TOKENS + (b * (E + lead) + block) * M + m)
                ok = (t < T)[:, None] & (c < K)[None, :]
                at = t[:, None] * C + at_c[None, :]
                x = tl.load(X + at, mask=ok, other=0.0)
                z = tl.load(Z + at, mask=ok, other=0.0) + ape
                out_at = (b * E + e) * K + c
                lse = tl.load(LSE + out_at, mask=c < K, other=0.0)[None, :]
                g = tl.load(G + out_at, mask=c < K, other=0.0).to(tl.float32)[None, :]
                mean = tl.load(MEAN + out_at, mask=c < K, other=0.0)[None, :]
                gx = tl.exp(z - lse) * g
                gz = gx * (x - mean)
                tl.store(GX + at, gx, mask=ok)
                tl.store(GZ + at, gz, mask=ok)
                total += tl.where(ok, gz, 0.0)
        tl.store(PAPE + part * M * C + ape_at, total, mask=(c < K)[None, :])


def _sizes(ratio: int, channels: int, overlap: bool) -> tuple[int, int, dict[str, int]]:
    """Channels of an entry, programs that share them, and constexprs."""
    halves = 1 + overlap
    K, BM = channels // halves, min(16, ratio & -ratio)
    sizes = {"M": ratio, "BM": BM, "HALVES": halves, "BK": min(_WIDTH, power_of_two(K))}
    return K, blocks(K, sizes["BK"]), sizes


def _pool(
    x: Tensor, z: Tensor, ape: Tensor, tokens: Tensor, previous: Tensor, overlap: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, T, C = x.shape
    E, M = previous.shape[1], tokens.shape[2]
    lead = tokens.shape[1] - E
    K, parts, sizes = _sizes(M, C, overlap)
    mean, lse = x.new_empty(B, E, K), x.new_empty(B, E, K)
    out = torch.empty_like(mean, dtype=dtype)
    launch(
        pool_forward, (E, parts, B), x, z, ape, tokens, previous, out, mean, lse, T, E, K, lead,
        **sizes,
    )  # fmt: skip
    return out, mean, lse


def _pool_backward(
    x: Tensor, z: Tensor, ape: Tensor, tokens: Tensor, previous: Tensor, mean: Tensor, lse: Tensor,
    grad: Tensor, overlap: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, T, C = x.shape
    E, M = previous.shape[1], tokens.shape[2]
    lead = tokens.shape[1] - E
    K, parts, sizes = _sizes(M, C, overlap)
    grad_x, grad_z = x.new_zeros(2, B, T, C).unbind()  # tokens that serve no entry stay at zero
    run = blocks(E, _RUNS.get(architecture_of(x.device), _RUNS["other"]))
    runs = blocks(E, run)
    grad_ape = x.new_empty(B, runs, M, C)
    launch(
        pool_backward, (runs, parts, B * (M // sizes["BM"])), x, z, ape, tokens, previous, mean,
        lse, grad, grad_x, grad_z, grad_ape, T, E, K, lead, run, **sizes,
    )  # fmt: skip
    return grad_x, grad_z, grad_ape.sum((0, 1))


_INPUTS = "Tensor x, Tensor z, Tensor ape, Tensor tokens, Tensor previous"
define(f"triton_pool({_INPUTS}, bool overlap, ScalarType dtype) -> (Tensor, Tensor, Tensor)", _pool)
define(
    f"triton_pool_backward({_INPUTS}, Tensor mean, Tensor lse, Tensor grad, bool overlap)"
    " -> (Tensor, Tensor, Tensor)",
    _pool_backward,
)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, k_BTC: Tensor, z_BTC: Tensor, ape_MC: Tensor, tokens_BEM: Tensor,
        previous_BE: Tensor, overlap: bool, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        inputs = (k_BTC, z_BTC, ape_MC, tokens_BEM, previous_BE)
        out_BEK, mean_BEK, lse_BEK = OPS.triton_pool(*inputs, overlap, dtype)
        ctx.save_for_backward(*inputs, mean_BEK, lse_BEK)
        ctx.overlap = overlap
        return out_BEK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BEK: Tensor) -> tuple[Tensor | None, ...]:
        grads = OPS.triton_pool_backward(*ctx.saved_tensors, grad_BEK.contiguous(), ctx.overlap)
        return *grads, None, None, None, None


def pool_entries(
    k_BUC: Tensor,
    z_BUC: Tensor,
    ape_MC: Tensor,
    blocks: Blocks,
    has_previous_BL: Tensor,
    overlap: bool,
    dtype: torch.dtype,
) -> Tensor:
    """:func:`model.kernels.pool.pool_entries` in Triton."""
    tensors = (k_BUC, z_BUC, ape_MC, blocks.tokens_BLM, has_previous_BL)
    return _Pool.apply(*(tensor.contiguous() for tensor in tensors), overlap, dtype)


def _shipped(ratio: int, channels: int, overlap: bool) -> tuple[Shipped, ...]:
    _, _, sizes = _sizes(ratio, channels, overlap)
    names = ("X", "Z", "APE", "MEAN", "LSE", "GX", "GZ", "PAPE")
    types = {
        **dict.fromkeys(names, "*fp32"), "OUT": "*bf16", "G": "*bf16", "TOKENS": "*i64",
        "PREVIOUS": "*i1", **dict.fromkeys(("T", "E", "lead", "run"), "i32"), "K": "i32:16",
    }  # fmt: skip
    tiles = {"other": Tile({})}
    return tuple(
        Shipped(f"{kernel.fn.__name__} M={ratio} C={channels}", kernel, types, sizes, tiles)
        for kernel in (pool_forward, pool_backward)
    )


SHIPPED = (*_shipped(4, 1024, True), *_shipped(4, 256, True), *_shipped(128, 512, False))
