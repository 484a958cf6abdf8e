"""The kernels of ``indexer.py``: ``I[t, e] = sum_j w[t, j] relu(q[t, j] . k[e])``.

Over all entries of a row a tile has queries for rows and walks over heads; over a list it belongs
to one query and has the heads for rows. One 64-bit base for each tensor, 32-bit offsets in tiles.
"""

# Legend: T tokens, E entries, N chosen entries, J indexer heads, L indexer head dim
from __future__ import annotations

import triton
import triton.language as tl

from model.kernels.triton.attention_kernels import reach
from model.kernels.triton.entries import dot

LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite fp32
HIDDEN = tl.constexpr(-(2**63))  # the key of what a query does not see


@triton.jit
def ranked(score, e):
    """int64 keys in the order of the choice: NaN, then by score, then the lower entry.

    A visible -inf counts as the lowest finite score, -0 as 0.
    """
    score = tl.maximum(score, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    order = tl.where(score != score, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - e).to(tl.int64)


@triton.jit
def index_scores(
    Q, KEYS, WEIGHT, FIRST, STOP, OUT, t_first, chunk, T, E,
    J: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, RANKED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Scores of ``chunk`` queries from t_first on, OUT [B, chunk, E].

    -inf where an entry is not seen; RANKED: keys of the choice. Grid (tiles of queries, tiles of E,
    B).
    """
    i0 = tl.program_id(0) * BT
    i = tl.arange(0, BT)
    t0 = t_first + i0
    b = tl.program_id(2).to(tl.int64)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    c = tl.arange(0, L)
    ok = (i0 + i < chunk) & (t0 + i < T)
    first = tl.load(FIRST + b * T + t0 + i, mask=ok, other=0)
    stop = tl.load(STOP + b * T + t0 + i, mask=ok, other=0)
    sees = (e[None, :] >= first[:, None]) & (e[None, :] < stop[:, None])
    score = tl.zeros([BT, BE], tl.float32)
    if tl.max(sees.to(tl.int32)) > 0:
        KEYS += b * E * L
        keys = tl.load(KEYS + e[:, None] * L + c[None, :], mask=(e < E)[:, None], other=0.0)
        row = (b * T + t0) * J
        for j in range(0, J):
            place = (i * J + j)[:, None] * L + c[None, :]
            q = tl.load(Q + row * L + place, mask=ok[:, None], other=0.0)
            w = tl.load(WEIGHT + row + i * J + j, mask=ok, other=0.0)
            s = dot(q, tl.trans(keys), None, UPCAST)
            s = tl.maximum(s, 0.0, propagate_nan=tl.PropagateNan.ALL)
            score += s * w[:, None]
    OUT += (b * chunk + i0) * E
    at = i[:, None] * E + e[None, :]
    inside = (i0 + i < chunk)[:, None] & (e < E)[None, :]
    if RANKED:
        tl.store(OUT + at, tl.where(sees, ranked(score, e[None, :]), HIDDEN), mask=inside)
    else:
        tl.store(OUT + at, tl.where(sees, score, float("-inf")), mask=inside)


@triton.jit
def unranked(BEST, INDEX, begin, chunk, T, N, BN: tl.constexpr):
    """Entries of the keys of a chunk's choice; -1: none. Grid (queries of the chunk, B)."""
    t, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        best = tl.load(BEST + (b * chunk + t) * N + n, mask=n < N, other=HIDDEN)
        entry = tl.where(best == HIDDEN, -1, 0x7FFFFFFF - (best & 0xFFFFFFFF))
        tl.store(INDEX + (b * T + begin + t) * N + n, entry.to(tl.int32), mask=n < N)


@triton.jit
def list_scores(
    Q, KEYS, WEIGHT, INDEX, OUT, T, E, N,
    J: tl.constexpr, HEADS: tl.constexpr, L: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Scores of the chosen entries of one query, OUT [rows, N]; -inf for none. Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, HEADS)
    c = tl.arange(0, L)
    KEYS += row // T * E * L
    at = row * J * L + j[:, None] * L + c[None, :]
    q = tl.load(Q + at, mask=(j < J)[:, None], other=0.0)
    w = tl.load(WEIGHT + row * J + j, mask=j < J, other=0.0)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        e = tl.load(INDEX + row * N + n, mask=n < N, other=-1)
        keys = tl.load(KEYS + e[:, None] * L + c[None, :], mask=(e >= 0)[:, None], other=0.0)
        s = dot(q, tl.trans(keys), None, UPCAST)
        s = tl.maximum(s, 0.0, propagate_nan=tl.PropagateNan.ALL)
        s = tl.where((j < J)[:, None], s * w[:, None], 0.0)  # 0 times an infinite key is NaN
        score = tl.where(e >= 0, tl.sum(s, 0), float("-inf"))
        tl.store(OUT + row * N + n, score, mask=n < N)


@triton.jit
def in_set(INDEX, FIRST, STOP, row, n, N, MODE: tl.constexpr):
    """Whether a row's n-th entry belongs to its query's set."""
    if MODE == "list":
        return tl.load(INDEX + row * N + n, mask=n < N, other=-1) >= 0
    else:
        return (n >= tl.load(FIRST + row)) & (n < tl.load(STOP + row))


@triton.jit
def divergence(
    SCORES, MASS, INDEX, FIRST, STOP, LOSS, first_row, N, BN: tl.constexpr, MODE: tl.constexpr
):
    """KL(teacher || softmax(scores)) of one row; its gradient replaces the scores. Grid (rows,).

    MASS begins with row first_row. What is outside the set counts as 0 in both.
    """
    row = (first_row + tl.program_id(0)).to(tl.int64)
    SCORES += row * N
    MASS += tl.program_id(0).to(tl.int64) * N
    top = -1e38
    total = 0.0
    mass = 0.0
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        used = in_set(INDEX, FIRST, STOP, row, n, N, MODE)
        s = tl.load(SCORES + n, mask=n < N, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(tl.where(used, s, float("-inf")), 0))
        here = tl.where(used, tl.exp(s - new_top), 0.0)
        total = total * tl.exp(top - new_top) + tl.sum(here, 0)
        mass += tl.sum(tl.where(used, tl.load(MASS + n, mask=n < N, other=0.0), 0.0), 0)
        top = new_top
    norm = tl.maximum(mass, 1e-30, propagate_nan=tl.PropagateNan.ALL)
    taught = mass / norm  # 1, or less where the mass underflows
    log_total = tl.log(total)
    loss = 0.0
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        used = in_set(INDEX, FIRST, STOP, row, n, N, MODE)
        teacher = tl.load(MASS + n, mask=n < N, other=0.0) / norm
        log_p = tl.load(SCORES + n, mask=n < N, other=float("-inf")) - top - log_total
        entropy = tl.where(teacher == 0.0, 0.0, teacher * tl.log(teacher))
        loss += tl.sum(tl.where(used, entropy - teacher * log_p, 0.0), 0)
        grad = tl.where(used, tl.exp(log_p) * taught - teacher, 0.0)
        tl.store(SCORES + n, grad, mask=n < N)
    tl.store(LOSS + row, loss)


@triton.jit
def list_grad_queries(
    Q, KEYS, WEIGHT, INDEX, DS, GRAD, DQ, DW, T, E, N,
    J: tl.constexpr, HEADS: tl.constexpr, L: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Both dq and dw of one query over its list. Grid (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, HEADS)
    c = tl.arange(0, L)
    KEYS += row // T * E * L
    at = row * J * L + j[:, None] * L + c[None, :]
    q = tl.load(Q + at, mask=(j < J)[:, None], other=0.0)
    w = tl.load(WEIGHT + row * J + j, mask=j < J, other=0.0)
    dq = tl.zeros([HEADS, L], tl.float32)
    dw = tl.zeros([HEADS], tl.float32)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        e = tl.load(INDEX + row * N + n, mask=n < N, other=-1)
        ds = tl.load(DS + row * N + n, mask=n < N, other=0.0)
        keys = tl.load(KEYS + e[:, None] * L + c[None, :], mask=(e >= 0)[:, None], other=0.0)
        s = dot(q, tl.trans(keys), None, UPCAST)
        dw += tl.sum(tl.maximum(s, 0.0, propagate_nan=tl.PropagateNan.ALL) * ds[None, :], 1)
        g = tl.where(s <= 0, 0.0, w[:, None] * ds[None, :])
        dq = dot(g.to(keys.dtype), keys, dq, UPCAST)
    grad = tl.load(GRAD)
    tl.store(DQ + at, (dq * grad).to(DQ.dtype.element_ty), mask=(j < J)[:, None])
    tl.store(DW + row * J + j, dw * grad, mask=j < J)


@triton.jit
def key_pairs(
    Q, KEYS, WEIGHT, DS, row, n, e, N,
    J: tl.constexpr, HEADS: tl.constexpr, L: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BN, L] fp32: what a query gives to the keys of entries e, the n-th of its list."""
    j = tl.arange(0, HEADS)
    c = tl.arange(0, L)
    at = row * J * L + j[:, None] * L + c[None, :]
    q = tl.load(Q + at, mask=(j < J)[:, None], other=0.0)
    w = tl.load(WEIGHT + row * J + j, mask=j < J, other=0.0)
    ds = tl.load(DS + row * N + n, mask=n < N, other=0.0)
    keys = tl.load(KEYS + e[:, None] * L + c[None, :], mask=(e >= 0)[:, None], other=0.0)
    s = dot(keys, tl.trans(q), None, UPCAST)
    g = tl.where(s <= 0, 0.0, w[None, :] * ds[:, None])
    return dot(g.to(q.dtype), q, None, UPCAST)


@triton.jit
def list_grad_pairs(
    Q, KEYS, WEIGHT, INDEX, DS, PAIRS, first_row, T, E, N,
    J: tl.constexpr, HEADS: tl.constexpr, L: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A row of PAIRS for the key of each entry that a query chose. Grid (rows, blocks of N)."""
    row = (first_row + tl.program_id(0)).to(tl.int64)
    c = tl.arange(0, L)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    e = tl.load(INDEX + row * N + n, mask=n < N, other=-1)
    if tl.max(e) >= 0:
        KEYS += row // T * E * L
        dk = key_pairs(Q, KEYS, WEIGHT, DS, row, n, e, N, J, HEADS, L, BN, UPCAST)
        PAIRS += tl.program_id(0).to(tl.int64) * N * L
        tl.store(PAIRS + n[:, None] * L + c[None, :], dk, mask=(e >= 0)[:, None])


@triton.jit
def list_grad_pairs_atomic(
    Q, KEYS, WEIGHT, INDEX, DS, SUM, T, E, N,
    J: tl.constexpr, HEADS: tl.constexpr, L: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The same for all rows, added to SUM [B, E, L], which begins as zeros, in no order."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, L)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    e = tl.load(INDEX + row * N + n, mask=n < N, other=-1)
    if tl.max(e) >= 0:
        of_row = row // T * E * L
        dk = key_pairs(Q, KEYS + of_row, WEIGHT, DS, row, n, e, N, J, HEADS, L, BN, UPCAST)
        at = e[:, None] * L + c[None, :]
        tl.atomic_add(SUM + of_row + at, dk, mask=(e >= 0)[:, None], sem="relaxed")


@triton.jit
def range_grad_queries(
    Q, KEYS, WEIGHT, FIRST, STOP, DS, GRAD, DQ, DW, T, E,
    J: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Both dq and dw of one head over all visible entries. Grid (tiles of T, J, B)."""
    i = tl.arange(0, BT)
    t0 = tl.program_id(0) * BT
    b = tl.program_id(2).to(tl.int64)
    c = tl.arange(0, L)
    ok = t0 + i < T
    row = (b * T + t0) * J + tl.program_id(1)
    at = row * L + (i * J)[:, None] * L + c[None, :]
    q = tl.load(Q + at, mask=ok[:, None], other=0.0)
    w = tl.load(WEIGHT + row + i * J, mask=ok, other=0.0)
    first = tl.load(FIRST + b * T + t0 + i, mask=ok, other=0)
    stop = tl.load(STOP + b * T + t0 + i, mask=ok, other=0)
    KEYS += b * E * L
    DS += (b * T + t0) * E
    dq = tl.zeros([BT, L], tl.float32)
    dw = tl.zeros([BT], tl.float32)
    low = tl.min(tl.where(stop > first, first, E)) // BE * BE
    for e0 in range(low, tl.max(stop), BE):
        e = e0 + tl.arange(0, BE)
        sees = (e[None, :] >= first[:, None]) & (e[None, :] < stop[:, None])
        keys = tl.load(KEYS + e[:, None] * L + c[None, :], mask=(e < E)[:, None], other=0.0)
        ds = tl.load(DS + i[:, None] * E + e[None, :], mask=sees, other=0.0)
        s = dot(q, tl.trans(keys), None, UPCAST)
        dw += tl.sum(tl.maximum(s, 0.0, propagate_nan=tl.PropagateNan.ALL) * ds, 1)
        g = tl.where(s <= 0, 0.0, w[:, None] * ds)
        dq = dot(g.to(keys.dtype), keys, dq, UPCAST)
    grad = tl.load(GRAD)
    tl.store(DQ + at, (dq * grad).to(DQ.dtype.element_ty), mask=ok[:, None])
    tl.store(DW + row + i * J, dw * grad, mask=ok)


@triton.jit
def range_grad_keys(
    Q, KEYS, WEIGHT, FIRST, STOP, DS, PARTS, T, E,
    J: tl.constexpr, L: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient of BE keys, which a program owns. Grid (blocks of E, splits, B).

    It walks over (query tile, head) in order; each split of the queries that see the keys writes
    its own PARTS [splits, B, E, L].
    """
    e0 = tl.program_id(0) * BE
    e = e0 + tl.arange(0, BE)
    b = tl.program_id(2).to(tl.int64)
    c = tl.arange(0, L)
    i = tl.arange(0, BT)
    at = e[:, None] * L + c[None, :]
    keys = tl.load(KEYS + b * E * L + at, mask=(e < E)[:, None], other=0.0)
    dk = tl.zeros([BE, L], tl.float32)
    low, high = reach(FIRST + b * T, STOP + b * T, e0, T, BE, 1024)
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), tl.num_programs(1)), BT) * BT
    low += tl.program_id(1) * share
    high = tl.minimum(low + share, high)
    for step in range(0, tl.cdiv(tl.maximum(high - low, 0), BT) * J):
        t0 = low + step // J * BT
        ok = t0 + i < high
        row = (b * T + t0) * J + step % J
        first = tl.load(FIRST + b * T + t0 + i, mask=ok, other=0)
        stop = tl.load(STOP + b * T + t0 + i, mask=ok, other=0)
        sees = (e[None, :] >= first[:, None]) & (e[None, :] < stop[:, None])
        q = tl.load(Q + row * L + (i * J)[:, None] * L + c[None, :], mask=ok[:, None], other=0.0)
        w = tl.load(WEIGHT + row + i * J, mask=ok, other=0.0)
        ds = tl.load(DS + (b * T + t0) * E + i[:, None] * E + e[None, :], mask=sees, other=0.0)
        s = dot(q, tl.trans(keys), None, UPCAST)
        g = tl.where(s <= 0, 0.0, w[:, None] * ds)
        dk = dot(tl.trans(g.to(q.dtype)), q, dk, UPCAST)
    PARTS += (tl.program_id(1) * tl.num_programs(2) + b) * E * L
    tl.store(PARTS + at, dk, mask=(e < E)[:, None])
