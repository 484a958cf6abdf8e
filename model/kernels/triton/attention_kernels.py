"""The kernels of ``attention.py``: rows are queries times heads, keys are values.

MODE says which entries a query uses: ``none``, all of a ``range``, those of a ``list`` (one query a
program), or those of a range that ``bits`` names. A tile has ROWS rows, ROWS / HEADS queries of
HEADS heads each, and meets BN keys a step. CHANNELS of the K output channels are a program's, so
that the accumulator fits. One 64-bit base for each tensor, 32-bit offsets inside tiles.

The backward pass reads q and do as one tile of 2 * ROWS rows, q in the even and do in the odd ones:
one product gives the scores and dp, and one gives ``ds^T q + p^T do``, so the accumulator keeps its
layout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.kernels.triton.entries import bits_at, dot, scores

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def visible(first, stop, BITS, base, t, words, e0, BN: tl.constexpr, MODE: tl.constexpr):
    """[queries, BN] bool: the entries from e0 on that each query uses; bits begin at base."""
    e = e0 + tl.arange(0, BN)
    ok = (e[None, :] >= first[:, None]) & (e[None, :] < stop[:, None])
    if MODE == "bits":
        word = bits_at(BITS + base, t, words, e0, stop > 0)
        ok = ok & (((word[:, None] >> tl.arange(0, BN).to(tl.int64)[None, :]) & 1) != 0)
    return ok


@triton.jit
def forward_step(
    q, KEYS, at, loaded, ok, top, total, acc, scale2, k, c,
    K: tl.constexpr, CHANNELS: tl.constexpr, TURNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in base 2."""
    keys = tl.load(KEYS + at[:, None] * K + k[None, :], mask=loaded[:, None], other=0.0)
    s = tl.where(ok, scores(q, keys, TURNED, UPCAST) * scale2, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    if CHANNELS != K:
        keys = tl.load(KEYS + at[:, None] * K + c[None, :], mask=loaded[:, None], other=0.0)
    acc = dot(p.to(keys.dtype), keys, acc * shrink[:, None], UPCAST)
    return new_top, total, acc


@triton.jit
def attention_forward(
    Q, KV, ENTRIES, SINK, START, FIRST, STOP, CHOSEN, O, LSE, T, E, N, scale2, window,
    H: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr,
    CHANNELS: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr, TURNED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Weighted values and log denominators. Grid (tiles of T, tiles of H * parts of K, B).

    CHOSEN is the list [B, T, N] or the bits [B, T, N words].
    """
    QUERIES: tl.constexpr = ROWS // HEADS
    PARTS: tl.constexpr = K // CHANNELS
    t0 = tl.program_id(0) * QUERIES
    b = tl.program_id(2).to(tl.int64)
    part = tl.program_id(1) % PARTS
    r = tl.arange(0, ROWS)
    t = t0 + r // HEADS
    h = tl.program_id(1) // PARTS * HEADS + r % HEADS
    k = tl.arange(0, K)
    c = part * CHANNELS + tl.arange(0, CHANNELS)
    in_T = t < T
    row_ok = in_T & (h < H)
    row0 = (b * T + t0) * H
    row = r // HEADS * H + h
    q = tl.load(Q + row0 * K + row[:, None] * K + k[None, :], mask=row_ok[:, None], other=0.0)
    start = tl.load(START + b * T + t, mask=in_T, other=T)
    lowest = tl.maximum(start, t - (window - 1))
    # The sum begins with the sink, so no row is empty. An infinite sink is left out of the running
    # maximum: inf - inf would be NaN.
    sink2 = tl.load(SINK + h, mask=h < H, other=0.0) * LOG2E
    top = tl.where(sink2 == float("-inf"), -1e30, tl.where(sink2 == float("inf"), 0.0, sink2))
    total = tl.exp2(sink2 - top)
    acc = tl.zeros([ROWS, CHANNELS], tl.float32)
    KV += b * T * K
    high = tl.minimum(t0 + QUERIES, T)
    for n0 in range(tl.min(tl.where(in_T, lowest, T)), high, BN):
        n = n0 + tl.arange(0, BN)
        ok = (n[None, :] >= lowest[:, None]) & (n[None, :] <= t[:, None])
        top, total, acc = forward_step(
            q, KV, n, n < high, ok, top, total, acc, scale2, k, c, K, CHANNELS, TURNED, UPCAST
        )
    if MODE == "list":
        ENTRIES += b * E * K
        for n0 in range(0, tl.load(STOP + b * T + t0), BN):
            n = n0 + tl.arange(0, BN)
            e = tl.load(CHOSEN + (b * T + t0) * N + n, mask=n < N, other=-1)
            top, total, acc = forward_step(
                q, ENTRIES, e, e >= 0, (e >= 0)[None, :], top, total, acc, scale2, k, c, K,
                CHANNELS, TURNED, UPCAST,
            )  # fmt: skip
    elif MODE != "none":
        ENTRIES += b * E * K
        first = tl.load(FIRST + b * T + t, mask=in_T, other=0)
        stop = tl.load(STOP + b * T + t, mask=in_T, other=0)
        low = tl.min(tl.where(stop > first, first, E)) // BN * BN
        for e0 in range(low, tl.max(stop), BN):
            e = e0 + tl.arange(0, BN)
            ok = visible(first, stop, CHOSEN, b * T * N, t, N, e0, BN, MODE)
            top, total, acc = forward_step(
                q, ENTRIES, e, e < E, ok, top, total, acc, scale2, k, c, K, CHANNELS, TURNED, UPCAST
            )
    at = row[:, None] * K + c[None, :]
    tl.store(O + row0 * K + at, (acc / total[:, None]).to(O.dtype.element_ty), row_ok[:, None])
    if part == 0:
        tl.store(LSE + row0 + row, (top + tl.log2(total)) / LOG2E, mask=row_ok)


@triton.jit
def attention_mass(
    Q, ENTRIES, FIRST, STOP, INDEX, LSE, MASS, first_row, T, E, N, scale2,
    H: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr,
    TURNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Probability of each used entry of a query, summed over heads. Grid (rows, blocks of N).

    MASS [rows, N]: entries of the ``list``, or all of a row (``range``), 0 for those not used.
    """
    row = (first_row + tl.program_id(0)).to(tl.int64)
    ENTRIES += row // T * E * K
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, K)
    if MODE == "list":
        e = tl.load(INDEX + row * N + n, mask=n < N, other=-1)
        used = e >= 0
    else:
        e = n
        used = (n >= tl.load(FIRST + row)) & (n < tl.load(STOP + row))
    mass = tl.zeros([BN], tl.float32)
    if tl.max(used.to(tl.int32)) > 0:
        keys = tl.load(ENTRIES + e[:, None] * K + k[None, :], mask=used[:, None], other=0.0)
        for h0 in range(0, H, ROWS):
            h = h0 + tl.arange(0, ROWS)
            at = row * H * K + h[:, None] * K + k[None, :]
            q = tl.load(Q + at, mask=(h < H)[:, None], other=0.0)
            lse2 = tl.load(LSE + row * H + h, mask=h < H, other=0.0) * LOG2E
            p = tl.exp2(scores(q, keys, TURNED, UPCAST) * scale2 - lse2[:, None])
            mass += tl.sum(tl.where((h < H)[:, None], p, 0.0), 0)
    mass = tl.where(used, mass, 0.0)
    tl.store(MASS + tl.program_id(0).to(tl.int64) * N + n, mass, mask=n < N)


@triton.jit
def attention_delta(
    O, DO, SINK, LSE, DELTA, DSINK, rows, H, K: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """Of each query and head ``delta = o . do``, and its part of dsink. Grid (blocks of rows,)."""
    r0 = tl.program_id(0).to(tl.int64) * BR
    r = tl.arange(0, BR)
    ok = r0 + r < rows
    at = r[:, None] * K + tl.arange(0, K)[None, :]
    o = tl.load(O + r0 * K + at, mask=ok[:, None], other=0.0).to(tl.float32)
    do = tl.load(DO + r0 * K + at, mask=ok[:, None], other=0.0).to(tl.float32)
    delta = tl.sum(o * do, 1)
    tl.store(DELTA + r0 + r, delta, mask=ok)
    sink = tl.load(SINK + (r0 + r) % H, mask=ok, other=0.0)
    lse = tl.load(LSE + r0 + r, mask=ok, other=0.0)
    tl.store(DSINK + r0 + r, -tl.exp(sink - lse) * delta, mask=ok)


@triton.jit
def queries_step(
    x, KEYS, at, loaded, ok, lse2, delta, dq, scale2, scale, k, c,
    ROWS: tl.constexpr, K: tl.constexpr, CHANNELS: tl.constexpr, BN: tl.constexpr,
    TURNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``dq += ds keys``; x holds q and do in turn."""
    keys = tl.load(KEYS + at[:, None] * K + k[None, :], mask=loaded[:, None], other=0.0)
    if TURNED:
        both = tl.reshape(dot(keys, tl.trans(x), None, UPCAST), [BN, ROWS, 2])
        s, dp = tl.split(both)
        s = tl.trans(s)
        dp = tl.trans(dp)
    else:
        both = tl.reshape(dot(x, tl.trans(keys), None, UPCAST), [ROWS, 2, BN])
        s, dp = tl.split(tl.permute(both, (0, 2, 1)))
    p = tl.exp2(s * scale2 - lse2[:, None])
    # a NaN of the query (in delta) must not reach keys it does not see
    ds = tl.where(ok, p * (dp - delta[:, None]) * scale, 0.0)
    if CHANNELS != K:
        keys = tl.load(KEYS + at[:, None] * K + c[None, :], mask=loaded[:, None], other=0.0)
    return dot(ds.to(keys.dtype), keys, dq, UPCAST)


@triton.jit
def attention_grad_queries(
    Q, KV, ENTRIES, START, FIRST, STOP, CHOSEN, LSE, DELTA, DO, DQ, T, E, N, scale2, scale, window,
    H: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr,
    CHANNELS: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr, TURNED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """dq, by the rows and loops of the forward pass; the same grid."""
    QUERIES: tl.constexpr = ROWS // HEADS
    PARTS: tl.constexpr = K // CHANNELS
    t0 = tl.program_id(0) * QUERIES
    b = tl.program_id(2).to(tl.int64)
    h0 = tl.program_id(1) // PARTS * HEADS
    r = tl.arange(0, ROWS)
    t = t0 + r // HEADS
    k = tl.arange(0, K)
    c = tl.program_id(1) % PARTS * CHANNELS + tl.arange(0, CHANNELS)
    in_T = t < T
    row_ok = in_T & (h0 + r % HEADS < H)
    row0 = (b * T + t0) * H + h0
    row = r // HEADS * H + r % HEADS
    x = interleaved(Q, DO, row0, T - t0, H - h0, k, H, HEADS, ROWS, K)
    lse2 = tl.load(LSE + row0 + row, mask=row_ok, other=0.0) * LOG2E
    delta = tl.load(DELTA + row0 + row, mask=row_ok, other=0.0)
    start = tl.load(START + b * T + t, mask=in_T, other=T)
    lowest = tl.maximum(start, t - (window - 1))
    dq = tl.zeros([ROWS, CHANNELS], tl.float32)
    KV += b * T * K
    high = tl.minimum(t0 + QUERIES, T)
    for n0 in range(tl.min(tl.where(in_T, lowest, T)), high, BN):
        n = n0 + tl.arange(0, BN)
        ok = (n[None, :] >= lowest[:, None]) & (n[None, :] <= t[:, None])
        dq = queries_step(
            x, KV, n, n < high, ok, lse2, delta, dq, scale2, scale, k, c, ROWS, K, CHANNELS, BN,
            TURNED, UPCAST,
        )  # fmt: skip
    if MODE == "list":
        ENTRIES += b * E * K
        for n0 in range(0, tl.load(STOP + b * T + t0), BN):
            n = n0 + tl.arange(0, BN)
            e = tl.load(CHOSEN + (b * T + t0) * N + n, mask=n < N, other=-1)
            dq = queries_step(
                x, ENTRIES, e, e >= 0, (e >= 0)[None, :], lse2, delta, dq, scale2, scale, k, c,
                ROWS, K, CHANNELS, BN, TURNED, UPCAST,
            )  # fmt: skip
    elif MODE != "none":
        ENTRIES += b * E * K
        first = tl.load(FIRST + b * T + t, mask=in_T, other=0)
        stop = tl.load(STOP + b * T + t, mask=in_T, other=0)
        low = tl.min(tl.where(stop > first, first, E)) // BN * BN
        for e0 in range(low, tl.max(stop), BN):
            e = e0 + tl.arange(0, BN)
            ok = visible(first, stop, CHOSEN, b * T * N, t, N, e0, BN, MODE)
            dq = queries_step(
                x, ENTRIES, e, e < E, ok, lse2, delta, dq, scale2, scale, k, c, ROWS, K, CHANNELS,
                BN, TURNED, UPCAST,
            )  # fmt: skip
    at = row[:, None] * K + c[None, :]
    tl.store(DQ + row0 * K + at, dq.to(DQ.dtype.element_ty), mask=row_ok[:, None])


@triton.jit
def interleaved(
    Q, DO, row0, queries, heads, c,
    H: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Channels c of q (even rows) and do (odd rows), [2 * ROWS, ...]."""
    r = tl.arange(0, 2 * ROWS) // 2
    ok = (r // HEADS < queries) & (r % HEADS < heads)
    base = tl.where(tl.arange(0, 2 * ROWS) % 2 == 1, DO + row0 * K, Q + row0 * K)
    at = base + (r // HEADS * H + r % HEADS) * K
    return tl.load(at[:, None] + c[None, :], mask=ok[:, None], other=0.0)


@triton.jit
def keys_step(
    keys, Q, DO, row0, queries, heads, ok, lse2, delta, acc, scale2, scale, k, c,
    H: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr,
    CHANNELS: tl.constexpr, BN: tl.constexpr, TURNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``acc += ds^T q + p^T do`` of ROWS rows from row0 on; ok [BN, ROWS]."""
    x = interleaved(Q, DO, row0, queries, heads, k, H, HEADS, ROWS, K)
    s, dp = tl.split(tl.reshape(scores(keys, x, TURNED, UPCAST), [BN, ROWS, 2]))
    p = tl.where(ok, tl.exp2(s * scale2 - lse2[None, :]), 0.0)
    ds = tl.where(ok, p * (dp - delta[None, :]) * scale, 0.0)
    both = tl.reshape(tl.join(ds, p), [BN, 2 * ROWS]).to(keys.dtype)
    if CHANNELS != K:
        x = interleaved(Q, DO, row0, queries, heads, c, H, HEADS, ROWS, K)
    return dot(both, x, acc, UPCAST)


@triton.jit
def reach(FIRST, STOP, e0, T, BN: tl.constexpr, BT: tl.constexpr):
    """First query that sees an entry of the block from e0 on, and one past the last."""
    low = tl.full([BT], T, tl.int32)
    high = tl.zeros([BT], tl.int32)
    for t0 in range(0, T, BT):
        t = t0 + tl.arange(0, BT)
        first = tl.load(FIRST + t, mask=t < T, other=0)
        stop = tl.load(STOP + t, mask=t < T, other=0)
        sees = (stop > first) & (first < e0 + BN) & (stop > e0)
        low = tl.where(sees, tl.minimum(low, t), low)
        high = tl.where(sees, tl.maximum(high, t + 1), high)
    return tl.min(low), tl.max(high)


@triton.jit
def attention_grad_keys(
    Q, KEYS, START, FIRST, STOP, BITS, LSE, DELTA, DO, PARTS_, T, E, words, scale2, scale, window,
    H: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr,
    CHANNELS: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr, TURNED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient of BN keys, which a program owns. Grid (blocks of E, splits, B * parts of K).

    ``none``: the keys are the window's, E = T. It walks over (query tile, head tile) in order. The
    queries that see the keys are split; each split writes its own PARTS_ [splits, B, E, K].
    """
    QUERIES: tl.constexpr = ROWS // HEADS
    PARTS: tl.constexpr = K // CHANNELS
    TILES: tl.constexpr = (H + HEADS - 1) // HEADS
    e0 = tl.program_id(0) * BN
    b = (tl.program_id(2) // PARTS).to(tl.int64)
    e = e0 + tl.arange(0, BN)
    k = tl.arange(0, K)
    c = tl.program_id(2) % PARTS * CHANNELS + tl.arange(0, CHANNELS)
    r = tl.arange(0, ROWS)
    at = b * E * K + e[:, None] * K + k[None, :]
    keys = tl.load(KEYS + at, mask=(e < E)[:, None], other=0.0)
    acc = tl.zeros([BN, CHANNELS], tl.float32)
    if MODE == "none":
        low = e0
        high = tl.minimum(e0 + BN - 1 + window, T)
    else:
        low, high = reach(FIRST + b * T, STOP + b * T, e0, T, BN, 1024)
    splits = tl.num_programs(1)
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), splits), QUERIES) * QUERIES
    low += tl.program_id(1) * share
    high = tl.minimum(low + share, high)
    steps = tl.cdiv(tl.maximum(high - low, 0), QUERIES) * TILES
    for i in range(0, steps):
        t0 = low + i // TILES * QUERIES
        h0 = i % TILES * HEADS
        row0 = (b * T + t0) * H + h0
        t = t0 + r // HEADS
        in_T = t < high
        row_ok = in_T & (h0 + r % HEADS < H)
        row = r // HEADS * H + r % HEADS
        lse2 = tl.load(LSE + row0 + row, mask=row_ok, other=0.0) * LOG2E
        delta = tl.load(DELTA + row0 + row, mask=row_ok, other=0.0)
        if MODE == "none":
            start = tl.load(START + b * T + t, mask=in_T, other=T)
            lowest = tl.maximum(start, t - (window - 1))
            ok = (e[:, None] >= lowest[None, :]) & (e[:, None] <= t[None, :])
        else:
            first = tl.load(FIRST + b * T + t, mask=in_T, other=0)
            stop = tl.load(STOP + b * T + t, mask=in_T, other=0)
            ok = (e[:, None] >= first[None, :]) & (e[:, None] < stop[None, :])
            if MODE == "bits":
                word = bits_at(BITS + b * T * words, t, words, e0, in_T)
                ok = ok & (((word[None, :] >> tl.arange(0, BN).to(tl.int64)[:, None]) & 1) != 0)
        acc = keys_step(
            keys, Q, DO, row0, high - t0, H - h0, ok & row_ok[None, :], lse2, delta, acc, scale2,
            scale, k, c, H, HEADS, ROWS, K, CHANNELS, BN, TURNED, UPCAST,
        )  # fmt: skip
    batch = tl.num_programs(2) // PARTS
    PARTS_ += (tl.program_id(1) * batch + b) * E * K
    at = e[:, None] * K + c[None, :]
    tl.store(PARTS_ + at, acc.to(PARTS_.dtype.element_ty), mask=(e < E)[:, None])


@triton.jit
def pairs_of(
    Q, ENTRIES, LSE, DELTA, DO, row, e, c, scale2, scale,
    H: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, CHANNELS: tl.constexpr,
    BN: tl.constexpr, TURNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BN, CHANNELS] fp32: what a query's heads give to channels c of its chosen entries e."""
    k = tl.arange(0, K)
    keys = tl.load(ENTRIES + e[:, None] * K + k[None, :], mask=(e >= 0)[:, None], other=0.0)
    acc = tl.zeros([BN, CHANNELS], tl.float32)
    for h0 in range(0, H, ROWS):
        h = h0 + tl.arange(0, ROWS)
        lse2 = tl.load(LSE + row * H + h, mask=h < H, other=0.0) * LOG2E
        delta = tl.load(DELTA + row * H + h, mask=h < H, other=0.0)
        acc = keys_step(
            keys, Q, DO, row * H + h0, 1, H - h0, (h < H)[None, :], lse2, delta, acc, scale2,
            scale, k, c, H, ROWS, ROWS, K, CHANNELS, BN, TURNED, UPCAST,
        )  # fmt: skip
    return acc


@triton.jit
def attention_grad_pairs(
    Q, ENTRIES, INDEX, LSE, DELTA, DO, PAIRS, first_row, T, E, N, scale2, scale,
    H: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, CHANNELS: tl.constexpr,
    BN: tl.constexpr, TURNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A row of PAIRS for each entry that a query chose. Grid (rows, blocks of N * parts of K)."""
    PARTS: tl.constexpr = K // CHANNELS
    row = (first_row + tl.program_id(0)).to(tl.int64)
    c = tl.program_id(1) % PARTS * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.program_id(1) // PARTS * BN + tl.arange(0, BN)
    e = tl.load(INDEX + row * N + n, mask=n < N, other=-1)
    if tl.max(e) >= 0:
        ENTRIES += row // T * E * K
        acc = pairs_of(
            Q, ENTRIES, LSE, DELTA, DO, row, e, c, scale2, scale, H, ROWS, K, CHANNELS, BN, TURNED,
            UPCAST,
        )  # fmt: skip
        PAIRS += tl.program_id(0).to(tl.int64) * N * K
        tl.store(PAIRS + n[:, None] * K + c[None, :], acc, mask=(e >= 0)[:, None])


@triton.jit
def attention_grad_pairs_atomic(
    Q, ENTRIES, INDEX, LSE, DELTA, DO, SUM, T, E, N, scale2, scale,
    H: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, CHANNELS: tl.constexpr,
    BN: tl.constexpr, TURNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The same for all rows, added to SUM [B, E, K], which begins as zeros, in no order."""
    PARTS: tl.constexpr = K // CHANNELS
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) % PARTS * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.program_id(1) // PARTS * BN + tl.arange(0, BN)
    e = tl.load(INDEX + row * N + n, mask=n < N, other=-1)
    if tl.max(e) >= 0:
        of_row = row // T * E * K
        acc = pairs_of(
            Q, ENTRIES + of_row, LSE, DELTA, DO, row, e, c, scale2, scale, H, ROWS, K, CHANNELS, BN,
            TURNED, UPCAST,
        )  # fmt: skip
        at = e[:, None] * K + c[None, :]
        tl.atomic_add(SUM + of_row + at, acc, mask=(e >= 0)[:, None], sem="relaxed")
