"""The kernels of ``mhc.py``: a program holds some channels of all streams of its tokens."""
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportUnboundVariable=false, reportAttributeAccessIssue=false

# Legend: N tokens, S streams (SP: rounded up to a power of two), D hidden, C = S * D,
# M mix channels: pre S, post S, comb S * S; of the head pre alone (MP: rounded up)
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _total(PART, at, ok, stride, PARTS: tl.constexpr):
    """Sum of the parts, in order."""
    total = tl.load(PART + at, mask=ok, other=0.0)
    for part in range(1, PARTS):
        total += tl.load(PART + part * stride + at, mask=ok, other=0.0)
    return total


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _softmax(logits, ok):
    """Over the destinations; zeros in the padding."""
    top = tl.max(tl.where(ok, logits, float("-inf")), 2, keep_dims=True)
    weights = tl.where(ok, tl.exp(logits - tl.where(top == float("-inf"), 0.0, top)), 0.0)
    return tl.where(ok, weights / tl.sum(weights, 2, keep_dims=True), 0.0)


@triton.jit
def mhc_mix(
    X, FN, PART, SQUARES, N, C, chunk, M: tl.constexpr, MP: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A part of ``x fn^T`` and of the sum of squares. Grid (blocks of tokens, parts)."""
    block, part = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, BT)
    m = tl.arange(0, MP)
    n = block * BT + rows
    X += block.to(tl.int64) * BT * C
    start = part * chunk
    stop = tl.minimum(start + chunk, C)
    acc = tl.zeros([BT, MP], tl.float32)
    squares = tl.zeros([BT], tl.float32)
    for first in tl.range(start, stop, BK):
        c = first + tl.arange(0, BK)
        x_ok = (n < N)[:, None] & (c < stop)[None, :]
        x = tl.load(X + rows[:, None] * C + c[None, :], mask=x_ok, other=0.0).to(tl.float32)
        fn_ok = (m < M)[None, :] & (c < stop)[:, None]
        fn = tl.load(FN + m[None, :] * C + c[:, None], mask=fn_ok, other=0.0)
        acc = tl.dot(x, fn, acc, input_precision=PRECISION)
        squares += tl.sum(x * x, 1)
    at = part * N + n
    tl.store(PART + at[:, None] * M + m[None, :], acc, mask=(n < N)[:, None] & (m < M)[None, :])
    tl.store(SQUARES + at, squares, mask=n < N)


@triton.jit
def mhc_coefficients(
    X, PART, SQUARES, BASE, SCALE, U, POST, COMB, MIX, RMS, N, D, eps, rms_eps, iters,
    S: tl.constexpr, SP: tl.constexpr, M: tl.constexpr, HEAD: tl.constexpr, PARTS: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """``u = sum_j pre_j x_j``, post, comb; mix and RMS for the backward pass. Grid (blocks,)."""
    rows, s = tl.arange(0, BT), tl.arange(0, SP)
    n = tl.program_id(0) * BT + rows
    rms = 1.0 / tl.sqrt(_total(SQUARES, n, n < N, N, PARTS) / (S * D) + rms_eps)
    tl.store(RMS + n, rms, mask=n < N)
    ok = (n < N)[:, None] & (s < S)[None, :]
    at = n[:, None] * M + s[None, :]
    mix = _total(PART, at, ok, N * M, PARTS) * rms[:, None]
    tl.store(MIX + at, mix, mask=ok)
    base = tl.load(BASE + s, mask=s < S, other=0.0)[None, :]
    pre = _sigmoid(mix * tl.load(SCALE) + base) + eps
    block = tl.program_id(0).to(tl.int64)
    X += block * BT * S * D
    U += block * BT * D
    for first in tl.range(0, D, BD):
        d = first + tl.arange(0, BD)
        x_ok = (n < N)[:, None] & (d < D)[None, :]
        u = tl.zeros([BT, BD], tl.float32)
        for j in tl.static_range(S):
            x = tl.load(X + (rows[:, None] * S + j) * D + d[None, :], mask=x_ok, other=0.0)
            weight = tl.sum(tl.where((s == j)[None, :], pre, 0.0), 1)
            u += weight[:, None] * x.to(tl.float32)
        tl.store(U + rows[:, None] * D + d[None, :], u.to(U.dtype.element_ty), mask=x_ok)
    if not HEAD:
        mix = _total(PART, at + S, ok, N * M, PARTS) * rms[:, None]
        tl.store(MIX + at + S, mix, mask=ok)
        base = tl.load(BASE + S + s, mask=s < S, other=0.0)[None, :]
        post = 2.0 * _sigmoid(mix * tl.load(SCALE + 1) + base)
        tl.store(POST + n[:, None] * S + s[None, :], post, mask=ok)
        cell = s[:, None] * S + s[None, :]
        cell_ok = (s < S)[:, None] & (s < S)[None, :]
        ok = (n < N)[:, None, None] & cell_ok[None, :, :]
        at = n[:, None, None] * M + 2 * S + cell[None, :, :]
        mix = _total(PART, at, ok, N * M, PARTS) * rms[:, None, None]
        tl.store(MIX + at, mix, mask=ok)
        base = tl.load(BASE + 2 * S + cell, mask=cell_ok, other=0.0)[None, :, :]
        comb = tl.where(ok, _softmax(mix * tl.load(SCALE + 2) + base, ok) + eps, 0.0)
        comb = comb / (tl.sum(comb, 1, keep_dims=True) + eps)
        for _ in range(1, iters):
            comb = comb / (tl.sum(comb, 2, keep_dims=True) + eps)
            comb = comb / (tl.sum(comb, 1, keep_dims=True) + eps)
        tl.store(COMB + n[:, None, None] * S * S + cell[None, :, :], comb, mask=ok)


@triton.jit
def mhc_merge_streams(
    Y, X, POST, COMB, NEW, N, D, S: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    """``new_k = post_k y + sum_j comb_jk x_j``. Grid (blocks of tokens, blocks of D)."""
    block = tl.program_id(0).to(tl.int64)
    rows, d = tl.arange(0, BT), tl.program_id(1) * BD + tl.arange(0, BD)
    n = tl.program_id(0) * BT + rows
    ok = (n < N)[:, None] & (d < D)[None, :]
    X += block * BT * S * D
    NEW += block * BT * S * D
    Y += block * BT * D
    y = tl.load(Y + rows[:, None] * D + d[None, :], mask=ok, other=0.0).to(tl.float32)
    x = ()
    for j in tl.static_range(S):
        stream = tl.load(X + (rows[:, None] * S + j) * D + d[None, :], mask=ok, other=0.0)
        x = x + (stream.to(tl.float32),)
    for k in tl.static_range(S):
        new = tl.load(POST + n * S + k, mask=n < N, other=0.0)[:, None] * y
        for j in tl.static_range(S):
            new += tl.load(COMB + (n * S + j) * S + k, mask=n < N, other=0.0)[:, None] * x[j]
        at = (rows[:, None] * S + k) * D + d[None, :]
        tl.store(NEW + at, new.to(NEW.dtype.element_ty), mask=ok)


@triton.jit
def mhc_merge_mix(
    Y, X, POST, COMB, FN, NEW, PART, SQUARES, N, D, chunk, S: tl.constexpr, M: tl.constexpr,
    MP: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``mhc_merge_streams``, and ``mhc_mix`` of the result. Grid (blocks of tokens, parts of D)."""
    block, part = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, BT)
    m = tl.arange(0, MP)
    n = block * BT + rows
    wide = block.to(tl.int64) * BT * D
    Y += wide
    X += wide * S
    NEW += wide * S
    start = part * chunk
    stop = tl.minimum(start + chunk, D)
    acc = tl.zeros([BT, MP], tl.float32)
    squares = tl.zeros([BT], tl.float32)
    for first in tl.range(start, stop, BD):
        d = first + tl.arange(0, BD)
        ok = (n < N)[:, None] & (d < stop)[None, :]
        y = tl.load(Y + rows[:, None] * D + d[None, :], mask=ok, other=0.0).to(tl.float32)
        x = ()
        for j in tl.static_range(S):
            stream = tl.load(X + (rows[:, None] * S + j) * D + d[None, :], mask=ok, other=0.0)
            x = x + (stream.to(tl.float32),)
        for k in tl.static_range(S):
            new = tl.load(POST + n * S + k, mask=n < N, other=0.0)[:, None] * y
            for j in tl.static_range(S):
                new += tl.load(COMB + (n * S + j) * S + k, mask=n < N, other=0.0)[:, None] * x[j]
            rounded = new.to(NEW.dtype.element_ty)
            tl.store(NEW + (rows[:, None] * S + k) * D + d[None, :], rounded, mask=ok)
            new = rounded.to(tl.float32)  # as the next sublayer reads it
            fn_ok = (m < M)[None, :] & (d < stop)[:, None]
            fn = tl.load(FN + (m[None, :] * S + k) * D + d[:, None], mask=fn_ok, other=0.0)
            acc = tl.dot(new, fn, acc, input_precision=PRECISION)
            squares += tl.sum(new * new, 1)
    at = part * N + n
    tl.store(PART + at[:, None] * M + m[None, :], acc, mask=(n < N)[:, None] & (m < M)[None, :])
    tl.store(SQUARES + at, squares, mask=n < N)


@triton.jit
def mhc_merge_streams_backward(
    G, Y, POST, GY, GPOST, N, D, S: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    """Gradients of y and post; a program walks over D. Grid (blocks of tokens,)."""
    block = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BT)
    n = tl.program_id(0) * BT + rows
    G += block * BT * S * D
    Y += block * BT * D
    GY += block * BT * D
    sums = ()
    for _ in tl.static_range(S):
        sums = sums + (tl.zeros([BT, BD], tl.float32),)
    for first in tl.range(0, D, BD):
        d = first + tl.arange(0, BD)
        ok = (n < N)[:, None] & (d < D)[None, :]
        y = tl.load(Y + rows[:, None] * D + d[None, :], mask=ok, other=0.0).to(tl.float32)
        grad = tl.zeros([BT, BD], tl.float32)
        more = ()
        for k in tl.static_range(S):
            g = tl.load(G + (rows[:, None] * S + k) * D + d[None, :], mask=ok, other=0.0)
            g = g.to(tl.float32)
            grad += tl.load(POST + n * S + k, mask=n < N, other=0.0)[:, None] * g
            more = more + (sums[k] + g * y,)
        sums = more
        tl.store(GY + rows[:, None] * D + d[None, :], grad.to(GY.dtype.element_ty), mask=ok)
    for k in tl.static_range(S):
        tl.store(GPOST + n * S + k, tl.sum(sums[k], 1), mask=n < N)


@triton.jit
def mhc_products(
    X, GU, G, GPRE, GCOMB, N, D, S: tl.constexpr, HEAD: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """``gpre_j = gu . x_j`` and ``gcomb_jk = x_j . g_k``. Grid (blocks of tokens,)."""
    block = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BT)
    n = tl.program_id(0) * BT + rows
    X += block * BT * S * D
    G += block * BT * S * D
    GU += block * BT * D
    K: tl.constexpr = 1 if HEAD else 1 + S  # products of each stream
    sums = ()
    for _ in tl.static_range(S * K):
        sums = sums + (tl.zeros([BT, BD], tl.float32),)
    for first in tl.range(0, D, BD):
        d = first + tl.arange(0, BD)
        ok = (n < N)[:, None] & (d < D)[None, :]
        gu = tl.load(GU + rows[:, None] * D + d[None, :], mask=ok, other=0.0)
        grads = (gu.to(tl.float32),)
        for k in tl.static_range(K - 1):
            g = tl.load(G + (rows[:, None] * S + k) * D + d[None, :], mask=ok, other=0.0)
            grads = grads + (g.to(tl.float32),)
        more = ()
        for j in tl.static_range(S):
            x = tl.load(X + (rows[:, None] * S + j) * D + d[None, :], mask=ok, other=0.0)
            for k in tl.static_range(K):
                more = more + (sums[j * K + k] + x.to(tl.float32) * grads[k],)
        sums = more
    for j in tl.static_range(S):
        tl.store(GPRE + n * S + j, tl.sum(sums[j * K], 1), mask=n < N)
        for k in tl.static_range(K - 1):
            product = tl.sum(sums[j * K + 1 + k], 1)
            tl.store(GCOMB + (n * S + j) * S + k, product, mask=n < N)


@triton.jit
def _gates_backward(
    MIX, BASE, SCALE, GRAD, RAW, PBASE, PSCALE, n, s, rms, N, M, first, group, factor,
    S: tl.constexpr,
):  # fmt: skip
    """Through ``factor * sigmoid`` of S channels from ``first``; the gates, and their shrink."""
    block = tl.program_id(0)
    ok = (n < N)[:, None] & (s < S)[None, :]
    at = n[:, None] * M + first + s[None, :]
    mix = tl.load(MIX + at, mask=ok, other=0.0)
    scale = tl.load(SCALE + group)
    gate = _sigmoid(mix * scale + tl.load(BASE + first + s, mask=s < S, other=0.0)[None, :])
    grad = tl.load(GRAD + n[:, None] * S + s[None, :], mask=ok, other=0.0)
    grad = factor * grad * gate * (1.0 - gate)
    tl.store(RAW + at, grad * scale * rms[:, None], mask=ok)
    tl.store(PBASE + block * M + first + s, tl.sum(grad, 0), mask=s < S)
    tl.store(PSCALE + block * 3 + group, tl.sum(tl.sum(grad * mix, 1), 0))
    return gate, tl.sum(grad * scale * mix, 1)


@triton.jit
def mhc_coefficients_backward(
    MIX, BASE, SCALE, RMS, GPRE, GPOST, GCOMB, MORE, PRE, COMB, RAW, SHRINK, PBASE, PSCALE, TAPE,
    N, C, eps, iters, S: tl.constexpr, SP: tl.constexpr, M: tl.constexpr, HEAD: tl.constexpr,
    BT: tl.constexpr,
):  # fmt: skip
    """Gradients of ``x fn^T`` (RAW, SHRINK), and this block's of base and scale. Grid (blocks,).

    ``TAPE [2 * iters - 1, N, S]`` holds 1 / divisor of every Sinkhorn step; the matrix is walked
    back by multiplying. ``MORE``: a further gradient of comb, or None.
    """
    block = tl.program_id(0)
    n = block * BT + tl.arange(0, BT)
    s = tl.arange(0, SP)
    rms = tl.load(RMS + n, mask=n < N, other=0.0)
    gate, shrink = _gates_backward(
        MIX, BASE, SCALE, GPRE, RAW, PBASE, PSCALE, n, s, rms, N, M, 0, 0, 1.0, S
    )
    pre_ok = (n < N)[:, None] & (s < S)[None, :]
    tl.store(PRE + n[:, None] * S + s[None, :], gate + eps, mask=pre_ok)
    if not HEAD:
        _, more = _gates_backward(
            MIX, BASE, SCALE, GPOST, RAW, PBASE, PSCALE, n, s, rms, N, M, S, 1, 2.0, S
        )
        shrink += more
        cell = s[:, None] * S + s[None, :]
        cell_ok = (s < S)[:, None] & (s < S)[None, :]
        ok = (n < N)[:, None, None] & cell_ok[None, :, :]
        at = n[:, None, None] * M + 2 * S + cell[None, :, :]
        wide = n[:, None, None] * S * S + cell[None, :, :]
        row = n[:, None, None] * S + s[None, :, None]
        row_ok = (n < N)[:, None, None] & (s < S)[None, :, None]
        col = n[:, None, None] * S + s[None, None, :]
        col_ok = (n < N)[:, None, None] & (s < S)[None, None, :]
        mix = tl.load(MIX + at, mask=ok, other=0.0)
        scale = tl.load(SCALE + 2)
        base = tl.load(BASE + 2 * S + cell, mask=cell_ok, other=0.0)[None, :, :]
        soft = _softmax(mix * scale + base, ok)
        comb = tl.where(ok, soft + eps, 0.0)
        first = 1.0 / (tl.sum(comb, 1, keep_dims=True) + eps)
        comb = comb * first
        for step in range(1, iters):
            inverse = 1.0 / (tl.sum(comb, 2, keep_dims=True) + eps)
            comb = comb * inverse
            tl.store(TAPE + (2 * step - 1) * N * S + row, inverse, mask=row_ok)
            inverse = 1.0 / (tl.sum(comb, 1, keep_dims=True) + eps)
            comb = comb * inverse
            tl.store(TAPE + 2 * step * N * S + col, inverse, mask=col_ok)
        tl.store(COMB + wide, comb, mask=ok)
        tl.debug_barrier()  # the tape is read by other threads of this program
        grad = tl.load(GCOMB + wide, mask=ok, other=0.0)
        if MORE is not None:
            grad += tl.load(MORE + wide, mask=ok, other=0.0)
        for back in range(1, iters):
            step = iters - back
            inverse = tl.load(TAPE + 2 * step * N * S + col, mask=col_ok, other=1.0)
            grad = (grad - tl.sum(grad * comb, 1, keep_dims=True)) * inverse
            comb = comb / inverse
            inverse = tl.load(TAPE + (2 * step - 1) * N * S + row, mask=row_ok, other=1.0)
            grad = (grad - tl.sum(grad * comb, 2, keep_dims=True)) * inverse
            comb = comb / inverse
        grad = tl.where(ok, (grad - tl.sum(grad * comb, 1, keep_dims=True)) * first, 0.0)
        grad = (grad - tl.sum(grad * soft, 2, keep_dims=True)) * soft
        tl.store(RAW + at, grad * scale * rms[:, None, None], mask=ok)
        tl.store(PBASE + block * M + 2 * S + cell, tl.sum(grad, 0), mask=cell_ok)
        tl.store(PSCALE + block * 3 + 2, tl.sum(tl.sum(tl.sum(grad * mix, 2), 1), 0))
        shrink += tl.sum(tl.sum(grad * scale * mix, 2), 1)
    tl.store(SHRINK + n, shrink * rms * rms / C, mask=n < N)


@triton.jit
def mhc_streams_backward(
    GU, G, X, PRE, COMB, RAW, SHRINK, FN, GX, PFN, WROTE, WEIGHT, GWROTE, PWEIGHT, N, D, chunk,
    S: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, HEAD: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the streams, and a part of fn's. Grid (blocks of D, parts of the tokens).

    ``gx_j = pre_j gu + sum_k comb_jk g_k + raw fn_j - shrink x_j``; ``gfn = raw^T x``. A program
    owns BD channels of all streams and walks over its tokens. Where the streams were formed by
    ``mhc_merge_mix``: also the gradients of what was written (``WROTE`` with ``WEIGHT``, its y and
    post), that of the weights as this program's part.
    """
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    m = tl.arange(0, MP)
    rows = tl.arange(0, BT)
    fn_at = m[:, None] * S * D + d[None, :]
    fn_ok = (m < M)[:, None] & (d < D)[None, :]
    fn = ()
    sums = ()
    for j in tl.static_range(S):
        fn = fn + (tl.load(FN + fn_at + j * D, mask=fn_ok, other=0.0),)
        sums = sums + (tl.zeros([MP, BD], tl.float32),)
    start = tl.program_id(1) * chunk
    stop = tl.minimum(start + chunk, N)
    for first in tl.range(start, stop, BT):
        n = first + rows
        ok = (n < stop)[:, None] & (d < D)[None, :]
        block = tl.full((), 0, tl.int64) + first
        raw_ok = (n < stop)[:, None] & (m < M)[None, :]
        raw = tl.load(RAW + n[:, None] * M + m[None, :], mask=raw_ok, other=0.0)
        shrink = tl.load(SHRINK + n, mask=n < stop, other=0.0)[:, None]
        gu = tl.load(GU + block * D + rows[:, None] * D + d[None, :], mask=ok, other=0.0)
        if WROTE is not None:
            y_at = block * D + rows[:, None] * D + d[None, :]
            y = tl.load(WROTE + y_at, mask=ok, other=0.0).to(tl.float32)
            gy = tl.zeros([BT, BD], tl.float32)
        g = ()
        if not HEAD:
            for k in tl.static_range(S):
                at = (rows[:, None] * S + k) * D + d[None, :]
                stream = tl.load(G + block * S * D + at, mask=ok, other=0.0)
                g = g + (stream.to(tl.float32),)
        more = ()
        for j in tl.static_range(S):
            at = (rows[:, None] * S + j) * D + d[None, :]
            x = tl.load(X + block * S * D + at, mask=ok, other=0.0).to(tl.float32)
            grad = tl.dot(raw, fn[j], input_precision=PRECISION) - shrink * x
            pre = tl.load(PRE + n * S + j, mask=n < stop, other=0.0)[:, None]
            grad += pre * gu.to(tl.float32)
            if not HEAD:
                for k in tl.static_range(S):
                    comb = tl.load(COMB + (n * S + j) * S + k, mask=n < stop, other=0.0)
                    grad += comb[:, None] * g[k]
            grad = grad.to(GX.dtype.element_ty)
            tl.store(GX + block * S * D + at, grad, mask=ok)
            if WROTE is not None:
                written = grad.to(tl.float32)  # as mhc_merge_streams_backward reads it
                weight = tl.load(WEIGHT + n * S + j, mask=n < stop, other=0.0)
                gy += weight[:, None] * written
                at = (tl.program_id(0) * N + n) * S + j
                tl.store(PWEIGHT + at, tl.sum(written * y, 1), mask=n < stop)
            part = tl.dot(tl.trans(raw), x, sums[j], input_precision=PRECISION)
            more = more + (part,)
        sums = more
        if WROTE is not None:
            tl.store(GWROTE + y_at, gy.to(GWROTE.dtype.element_ty), mask=ok)
    for j in tl.static_range(S):
        tl.store(PFN + tl.program_id(1) * M * S * D + fn_at + j * D, sums[j], mask=fn_ok)
