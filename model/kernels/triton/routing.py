"""Routing in Triton: the gate's choice, order by expert, load and balance (``../routing.py``).

The choice takes the largest int64 keys of a token: a key holds the biased score and, below it, the
expert, so equal scores go to the lower expert. The order by expert counts in blocks, sums the
blocks' counts, and gives each copy its place. Documents' counts are added atomically: whole numbers
below 2^24, of which fp32 gives the exact sum in any order.
"""
# pyright: reportGeneralTypeIssues=false

# Legend: N tokens, E experts (EP: rounded up), K experts a token (KP: rounded up), R = N * K token
# copies, G documents
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.routing import Order, Routing
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
from model.kv_exchange import KVExchange
from model.sequence_plan import SequencePlan

_ELEMENTS = {INTERPRETER: 4096, "other": 1024}  # of a block of scores
_ROWS = {INTERPRETER: 16, "other": 256}  # copies that one program orders
_INSIDE = 16  # copies, or blocks, that are met at once
_LOWEST = tl.constexpr(-(2**63))


@triton.jit
def _score(x):
    """sqrt(softplus(x)); log1p by Kahan's quotient."""
    z = tl.exp(-tl.abs(x))
    u = 1.0 + z
    more = tl.where(u == 1.0, z, tl.log(u) * (z / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.sqrt(tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + more)


@triton.jit
def gate_choice(
    LOGITS, VALID, BIAS, GIVEN, SCORE, INDEX, WEIGHT, N, scale, E: tl.constexpr, EP: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Scores, the choice (unless GIVEN), and its weights. Grid (blocks of tokens,)."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    e, k = tl.arange(0, EP), tl.arange(0, KP)
    ok = (n < N)[:, None] & (e < E)[None, :]
    score = _score(tl.load(LOGITS + n[:, None] * E + e[None, :], mask=ok, other=0.0))
    tl.store(SCORE + n[:, None] * E + e[None, :], score, mask=ok)
    at = n[:, None] * K + k[None, :]
    at_ok = (n < N)[:, None] & (k < K)[None, :]
    picked = tl.zeros([BN, KP], tl.float32)
    if GIVEN is None:
        biased = score + tl.load(BIAS + e, mask=e < E, other=0.0)[None, :]
        biased = tl.where(biased != biased, float("inf"), biased) + 0.0  # no -0
        bits = biased.to(tl.int32, bitcast=True)
        ranked = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        key = tl.where(ok, ranked * 4294967296 + (EP - 1 - e)[None, :], _LOWEST)
        index = tl.zeros([BN, KP], tl.int64)
        for j in tl.static_range(K):
            best = tl.max(key, 1)
            chosen = EP - 1 - (best & 0xFFFFFFFF)
            here = chosen[:, None] == e[None, :]
            key = tl.where(here, _LOWEST, key)
            pick = tl.sum(tl.where(here, score, 0.0), 1)
            index = tl.where(k[None, :] == j, chosen[:, None], index)
            picked = tl.where(k[None, :] == j, pick[:, None], picked)
    else:
        index = tl.load(GIVEN + at, mask=at_ok, other=0).to(tl.int64)
        for j in tl.static_range(K):
            chosen = tl.sum(tl.where(k[None, :] == j, index, 0), 1)
            pick = tl.sum(tl.where(chosen[:, None] == e[None, :], score, 0.0), 1)
            picked = tl.where(k[None, :] == j, pick[:, None], picked)
    tl.store(INDEX + at, index, mask=at_ok)
    counted = tl.load(VALID + n, mask=n < N, other=0).to(tl.float32)
    weight = picked / (tl.sum(picked, 1) + 1e-20)[:, None] * scale * counted[:, None]
    tl.store(WEIGHT + at, weight, mask=at_ok)


@triton.jit
def gate_backward(
    LOGITS, VALID, INDEX, GWEIGHT, GSCORE, GLOGITS, N, scale, E: tl.constexpr, EP: tl.constexpr,
    K: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits from those of the weights and (or None) the scores. Grid (blocks,)."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    e = tl.arange(0, EP)
    ok = (n < N)[:, None] & (e < E)[None, :]
    x = tl.load(LOGITS + n[:, None] * E + e[None, :], mask=ok, other=0.0)
    score = _score(x)
    counted = tl.load(VALID + n, mask=n < N, other=0).to(tl.float32) * scale
    total = tl.zeros([BN], tl.float32)
    product = tl.zeros([BN], tl.float32)
    grad = tl.zeros([BN, EP], tl.float32)
    chosen_E = tl.zeros([BN, EP], tl.float32)
    for j in tl.static_range(K):
        chosen = tl.load(INDEX + n * K + j, mask=n < N, other=0)
        g = tl.load(GWEIGHT + n * K + j, mask=n < N, other=0.0) * counted
        here = chosen[:, None] == e[None, :]
        pick = tl.sum(tl.where(here, score, 0.0), 1)
        total += pick
        product += pick * g
        grad = tl.where(here, g[:, None], grad)
        chosen_E = tl.where(here, 1.0, chosen_E)
    total += 1e-20
    grad = (grad - (product / total)[:, None] * chosen_E) / total[:, None]
    if GSCORE is not None:
        grad += tl.load(GSCORE + n[:, None] * E + e[None, :], mask=ok, other=0.0)
    grad = grad * 0.5 / score / (1.0 + tl.exp(-x))
    tl.store(GLOGITS + n[:, None] * E + e[None, :], grad, mask=ok)


@triton.jit
def expert_counts(
    INDEX, COUNTS, R, E: tl.constexpr, EP: tl.constexpr, BR: tl.constexpr, INSIDE: tl.constexpr
):  # fmt: skip
    """Copies of a block at each expert. Grid (blocks,)."""
    e, i = tl.arange(0, EP), tl.arange(0, INSIDE)
    total = tl.zeros([EP], tl.int32)
    for first in tl.range(0, BR, INSIDE):
        r = tl.program_id(0) * BR + first + i
        expert = tl.load(INDEX + r, mask=r < R, other=-1)
        total += tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
    tl.store(COUNTS + tl.program_id(0) * E + e, total, mask=e < E)


@triton.jit
def expert_offsets(
    COUNTS, BEFORE, OFFSETS, count, E: tl.constexpr, EP: tl.constexpr, INSIDE: tl.constexpr
):
    """Copies in the blocks before each, and the ends of the experts. Grid (1,)."""
    e, i = tl.arange(0, EP), tl.arange(0, INSIDE)
    total = tl.zeros([EP], tl.int32)
    for first in tl.range(0, count, INSIDE):
        at = (first + i)[:, None] * E + e[None, :]
        ok = (first + i < count)[:, None] & (e < E)[None, :]
        counts = tl.load(COUNTS + at, mask=ok, other=0)
        tl.store(BEFORE + at, total[None, :] + tl.cumsum(counts, 0) - counts, mask=ok)
        total += tl.sum(counts, 0)
    tl.store(OFFSETS + e, tl.cumsum(total, 0), mask=e < E)


@triton.jit
def expert_places(
    INDEX, BEFORE, OFFSETS, TOKEN, COPY, PLACE, R, E: tl.constexpr, EP: tl.constexpr,
    K: tl.constexpr, BR: tl.constexpr, INSIDE: tl.constexpr,
):  # fmt: skip
    """The row of each copy, and the copy and the token of each row. Grid (blocks,)."""
    e, i = tl.arange(0, EP), tl.arange(0, INSIDE)
    start = tl.load(OFFSETS + e - 1, mask=(e > 0) & (e < E), other=0)
    start += tl.load(BEFORE + tl.program_id(0) * E + e, mask=e < E, other=0)
    for first in tl.range(0, BR, INSIDE):
        r = tl.program_id(0) * BR + first + i
        expert = tl.load(INDEX + r, mask=r < R, other=-1)
        here = (expert[:, None] == e[None, :]).to(tl.int32)
        place = tl.sum(here * (start[None, :] + tl.cumsum(here, 0) - 1), 1)
        tl.store(PLACE + r, place, mask=r < R)
        tl.store(COPY + place, r, mask=r < R)
        tl.store(TOKEN + place, r // K, mask=r < R)
        start += tl.sum(here, 0)


@triton.jit
def document_counts(
    INDEX, VALID, DOCUMENT, COUNTS, N, G, E: tl.constexpr, K: tl.constexpr, BN: tl.constexpr
):
    """Copies of each document at each expert; row G: of all that are no padding. Grid (blocks,)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    ok = n < N
    valid = tl.load(VALID + n, mask=ok, other=0) != 0
    if DOCUMENT is not None:
        document = tl.load(DOCUMENT + n, mask=ok, other=0)
    for j in tl.static_range(K):
        expert = tl.load(INDEX + n.to(tl.int64) * K + j, mask=ok, other=0)
        tl.atomic_add(COUNTS + G * E + expert, 1.0, mask=ok & valid, sem="relaxed")
        if DOCUMENT is not None:
            row = COUNTS + document * E  # pyright: ignore[reportPossiblyUnboundVariable]
            tl.atomic_add(row + expert, 1.0, mask=ok, sem="relaxed")


@triton.jit
def balance_rows(
    SCORE, VALID, DOCUMENT, LENGTH, COUNTS, LOSS, GRAD, GSCORE, N, share, E: tl.constexpr,
    EP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A token's part of the loss; with GRAD its gradient by the scores. Grid (blocks,)."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    e = tl.arange(0, EP)
    n_ok = n < N
    ok = n_ok[:, None] & (e < E)[None, :]
    at = n[:, None] * E + e[None, :]
    score = tl.load(SCORE + at, mask=ok, other=0.0)
    document = tl.load(DOCUMENT + n, mask=n_ok, other=0)
    length = tl.load(LENGTH + n, mask=n_ok, other=1).to(tl.float32)
    count = tl.load(COUNTS + document[:, None] * E + e[None, :], mask=ok, other=0.0)
    f = count * share / length[:, None]
    f = tl.where((tl.load(VALID + n, mask=n_ok, other=0) != 0)[:, None], f, 0.0)
    total = tl.sum(score, 1)
    mean = tl.sum(f * (score / total[:, None]), 1)
    if GRAD is None:
        tl.store(LOSS + n, mean, mask=n_ok)
    else:
        grad = (f - mean[:, None]) / total[:, None] * tl.load(GRAD)
        tl.store(GSCORE + at, grad, mask=ok)


def _rows(x: Tensor, width: int) -> int:
    elements = _ELEMENTS.get(architecture_of(x.device), _ELEMENTS["other"])
    return max(1, elements // power_of_two(width))


def _choose(
    logits: Tensor, valid: Tensor, bias: Tensor | None, given: Tensor | None, topk: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    N, E = logits.shape
    score = torch.empty_like(logits)
    index = logits.new_empty(N, topk, dtype=torch.int64)
    weight = logits.new_empty(N, topk)
    BN = _rows(logits, E)
    launch(
        gate_choice, (blocks(N, BN),), logits, valid, bias, given, score, index, weight, N, scale,
        E=E, EP=power_of_two(E), K=topk, KP=power_of_two(topk), BN=BN,
    )  # fmt: skip
    return score, index, weight


def _choose_backward(
    logits: Tensor, valid: Tensor, index: Tensor, grad_weight: Tensor, grad_score: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    N, E = logits.shape
    grad = torch.empty_like(logits)
    BN = _rows(logits, E)
    launch(
        gate_backward, (blocks(N, BN),), logits, valid, index, grad_weight, grad_score, grad, N,
        scale, E=E, EP=power_of_two(E), K=index.shape[1], BN=BN,
    )  # fmt: skip
    return grad


def _order(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, K = index.shape
    R, rows = N * K, _ROWS.get(architecture_of(index.device), _ROWS["other"])
    count = blocks(R, rows)
    counts, before = index.new_empty(2, count, experts, dtype=torch.int32).unbind()
    offsets = index.new_empty(experts, dtype=torch.int32)
    token, copy = index.new_empty(R, dtype=torch.int32), index.new_empty(R, dtype=torch.int32)
    place = index.new_empty(N, K, dtype=torch.int32)
    sizes = {"E": experts, "EP": power_of_two(experts), "INSIDE": _INSIDE}
    launch(expert_counts, (count,), index, counts, R, **sizes, BR=rows)
    launch(expert_offsets, (1,), counts, before, offsets, count, **sizes)
    launch(
        expert_places, (count,), index, before, offsets, token, copy, place, R, **sizes, K=K,
        BR=rows,
    )  # fmt: skip
    return token, copy, place, offsets


def _counts(
    index: Tensor, valid: Tensor, document: Tensor | None, documents: int, experts: int
) -> Tensor:
    N, K = index.shape
    counts = index.new_zeros(documents + 1, experts, dtype=torch.float32)
    BN = 128
    launch(
        document_counts, (blocks(N, BN),), index, valid, document, counts, N, documents, E=experts,
        K=K, BN=BN,
    )  # fmt: skip
    return counts


def _balance(
    score: Tensor, valid: Tensor, document: Tensor, length: Tensor, counts: Tensor, topk: int,
    grad: Tensor | None,
) -> Tensor:  # fmt: skip
    N, E = score.shape
    out = score.new_empty(N) if grad is None else torch.empty_like(score)
    BN = _rows(score, E)
    launch(
        balance_rows, (blocks(N, BN),), score, valid, document, length, counts, out, grad, out, N,
        E / topk, E=E, EP=power_of_two(E), BN=BN,
    )  # fmt: skip
    return out.sum() if grad is None else out


define(
    "triton_gate(Tensor logits, Tensor valid, Tensor? bias, Tensor? given, int topk, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    _choose,
)
define(
    "triton_gate_backward(Tensor logits, Tensor valid, Tensor index, Tensor grad_weight,"
    " Tensor? grad_score, float scale) -> Tensor",
    _choose_backward,
)
define("triton_expert_order(Tensor index, int experts) -> (Tensor, Tensor, Tensor, Tensor)", _order)
define(
    "triton_document_counts(Tensor index, Tensor valid, Tensor? document, int documents,"
    " int experts) -> Tensor",
    _counts,
)
define(
    "triton_balance(Tensor score, Tensor valid, Tensor document, Tensor length, Tensor counts,"
    " int topk, Tensor? grad) -> Tensor",
    _balance,
)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_NE: Tensor, valid_N: Tensor, bias_E: Tensor | None,
        given_NK: Tensor | None, topk: int, scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        score_NE, index_NK, weight_NK = OPS.triton_gate(
            logits_NE, valid_N, bias_E, given_NK, topk, scale
        )
        ctx.save_for_backward(logits_NE, valid_N, index_NK)
        ctx.scale = scale
        ctx.mark_non_differentiable(index_NK)
        ctx.set_materialize_grads(False)
        return score_NE, index_NK, weight_NK

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_score: Tensor | None, _: None, grad_weight: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits, valid, index = ctx.saved_tensors
        weight = logits.new_zeros(index.shape) if grad_weight is None else grad_weight.contiguous()
        score = None if grad_score is None else grad_score.contiguous()
        grad = OPS.triton_gate_backward(logits, valid, index, weight, score, ctx.scale)
        return grad, None, None, None, None, None


def route(
    logits_NE: Tensor,
    valid_N: Tensor,
    bias_E: Tensor | None,
    index_NK: Tensor | None,
    topk: int,
    scale: float,
) -> Routing:
    """:func:`model.kernels.routing.route` in Triton."""
    given = None if index_NK is None else index_NK.contiguous()
    score_NE, chosen_NK, weight_NK = _Route.apply(
        logits_NE.contiguous(), valid_N.contiguous(), bias_E, given, topk, scale
    )
    return Routing(chosen_NK, weight_NK, score_NE)


@torch.no_grad()
def expert_order(index_NK: Tensor, num_experts: int) -> Order:
    """:func:`model.kernels.routing.expert_order` in Triton; indices are int32."""
    return Order(*OPS.triton_expert_order(index_NK.contiguous(), num_experts))


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score_NE: Tensor, topk: int, *sets: Tensor) -> Tensor:
        ctx.save_for_backward(score_NE, *sets)
        ctx.topk = topk
        return OPS.triton_balance(score_NE, *sets, topk, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        score_NE, *sets = ctx.saved_tensors
        return OPS.triton_balance(score_NE, *sets, ctx.topk, grad), *[None] * (1 + len(sets))


def load_and_balance(
    index_NK: Tensor,
    score_NE: Tensor,
    plan: SequencePlan,
    exchange: KVExchange,
    *,
    balance: bool,
) -> tuple[Tensor, Tensor | None]:
    """:func:`model.kernels.routing.load_and_balance` in Triton."""
    valid_N, document_N = plan.valid_BT.flatten(), plan.document_BT.flatten()
    documents = plan.num_documents if balance else 0
    index_NK = index_NK.contiguous()
    counts = OPS.triton_document_counts(
        index_NK, valid_N, document_N if balance else None, documents, score_NE.shape[1]
    )
    load_E = counts[-1]
    if not balance:
        return load_E, None
    sets = valid_N, document_N, plan.length_BT.flatten(), exchange.add_up(counts[:-1])
    return load_E, _Balance.apply(score_NE.contiguous(), index_NK.shape[1], *sets)


def _shipped(experts: int, topk: int) -> tuple[Shipped, ...]:
    f32 = ("LOGITS", "BIAS", "SCORE", "WEIGHT", "GWEIGHT", "GSCORE", "GLOGITS", "LOSS", "GRAD")
    types = {
        **dict.fromkeys(f32, "*fp32"), **dict.fromkeys(("INDEX", "DOCUMENT", "LENGTH"), "*i64"),
        **dict.fromkeys(("COUNTS", "BEFORE", "OFFSETS", "TOKEN", "COPY", "PLACE"), "*i32"),
        "VALID": "*i1",
        **dict.fromkeys(("N", "R", "G", "count"), "i32"), "scale": "fp32", "share": "fp32",
    }  # fmt: skip
    EP = power_of_two(experts)
    sizes = {"E": experts, "EP": EP, "K": topk, "KP": power_of_two(topk), "INSIDE": _INSIDE,
             "BR": _ROWS["other"]}  # fmt: skip
    rows = {"other": Tile({"BN": max(1, _ELEMENTS["other"] // EP)})}
    nothing, given = {"other": Tile({})}, {"GIVEN": "*i64"}
    variants = (
        ("given ", gate_choice, rows, {}, given),
        ("alone ", gate_backward, rows, {"GSCORE": None}, {}),
        ("no ", document_counts, {"other": Tile({"BN": 128})}, {"DOCUMENT": None},
         {"COUNTS": "*fp32"}),
        ("gradient of ", balance_rows, rows, {}, {"COUNTS": "*fp32"}),
    )  # fmt: skip
    return tuple(
        Shipped(
            f"{name}{kernel.fn.__name__} E={experts}", kernel, types | more, sizes | fixed, tiles
        )
        for name, kernel, tiles, fixed, more in (
            ("", gate_choice, rows, {"GIVEN": None}, {}),
            ("", gate_backward, rows, {}, {}),
            ("", expert_counts, nothing, {}, {}),
            ("", expert_offsets, nothing, {}, {}),
            ("", expert_places, nothing, {}, {}),
            ("", document_counts, {"other": Tile({"BN": 128})}, {}, {"COUNTS": "*fp32"}),
            ("", balance_rows, rows, {"GRAD": None}, {"COUNTS": "*fp32"}),
            *(variants if experts == 256 else ()),
        )
    )


SHIPPED = (*_shipped(64, 6), *_shipped(256, 6), *_shipped(384, 6))
