"""What attention and the indexer share in Triton: products, visible entries, lists turned round.

A list of chosen entries serves queries. The gradient of an entry needs the queries that chose it:
either every query of the visible range, masked by one bit an entry (:func:`pack_bits`: short rows),
or one fp32 row for each pair (query, chosen entry), summed in the order of queries
(:func:`sum_pairs`: long rows). Both give equal bits each time. ``model.deterministic=false`` adds
the pairs atomically instead, without a workspace and a sort.
"""

# Legend: B rows, T tokens, E entries, N chosen entries, W words of 64 entries, P pairs of a query
# and a chosen entry, C channels
from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.triton.launch import Shipped, Tile, blocks, define, launch

WORD = 64  # entries of a word of the bit mask
# fp32 rows of pairs that stand in memory at once.
PAIR_BYTES = 512 << 20

_PACK = Tile({"BR": 4, "BW": 8, "BN": 64}, warps=4, stages=1)
_LENGTHS = Tile({"BR": 4, "BN": 256}, warps=4, stages=1)
_OWNERS = Tile({"BP": 1024}, warps=4, stages=1)
_SUM = Tile({"BP": 8}, warps=4, stages=2)


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    """``a b + acc`` in fp32. fp32 operands are not rounded to tf32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def scores(rows, keys, TURNED: tl.constexpr, UPCAST: tl.constexpr):
    """``rows keys^T``. TURNED forms the transpose, which mma.sync tiles over all warps."""
    if TURNED:
        return tl.trans(dot(keys, tl.trans(rows), None, UPCAST))
    else:
        return dot(rows, tl.trans(keys), None, UPCAST)


@triton.jit
def bits_at(BITS, t, words, e0, ok):
    """[queries] int64, bit i for entry e0 + i; those of a tile lie in one word."""
    return tl.load(BITS + t * words + e0 // 64, mask=ok, other=0) >> (e0 % 64)


@triton.jit
def pack_bits(
    INDEX, BITS, rows, N, words, BR: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Bit e % 64 of word e // 64 says that e is in a row's list. Grid (rows, blocks of words)."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    w = tl.program_id(1) * BW + tl.arange(0, BW)
    word = tl.zeros([BR, BW], tl.int64)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        ok = (row < rows)[:, None] & (n < N)[None, :]
        e = tl.load(INDEX + row[:, None] * N + n[None, :], mask=ok, other=-1)
        bit = tl.full([BR, BN], 1, tl.int64) << (e % 64).to(tl.int64)
        here = (e >= 0)[:, None, :] & ((e // 64)[:, None, :] == w[None, :, None])
        word += tl.sum(tl.where(here, bit[:, None, :], 0), 2)  # distinct entries: a sum is an or
    ok = (row < rows)[:, None] & (w < words)[None, :]
    tl.store(BITS + row[:, None] * words + w[None, :], word, mask=ok)


@triton.jit
def list_lengths(INDEX, LENGTH, rows, N, BR: tl.constexpr, BN: tl.constexpr):
    """One past the last chosen entry of each list. Grid (blocks of rows,)."""
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    length = tl.zeros([BR], tl.int32)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        ok = (row < rows)[:, None] & (n < N)[None, :]
        e = tl.load(INDEX + row[:, None] * N + n[None, :], mask=ok, other=-1)
        length = tl.maximum(length, tl.max(tl.where(e >= 0, n[None, :] + 1, 0), 1))
    tl.store(LENGTH + row, length, mask=row < rows)


@triton.jit
def pair_owners(INDEX, OWNER, pairs, of_row, E, nobody, BP: tl.constexpr):
    """The entry of the whole batch that a pair adds to; ``nobody``: none. Grid (blocks,)."""
    at = tl.program_id(0).to(tl.int64) * BP + tl.arange(0, BP)
    e = tl.load(INDEX + at, mask=at < pairs, other=-1)
    owner = tl.where(e < 0, nobody, e + (at // of_row).to(tl.int32) * E)
    tl.store(OWNER + at, owner, mask=at < pairs)


@triton.jit
def segment_sum(PAIRS, ORDER, OFFSETS, OUT, C, BC: tl.constexpr, BP: tl.constexpr):
    """``out[e] += sum of pairs[order[offsets[e] : offsets[e + 1]]]``, in order. Grid (entries,)."""
    e = tl.program_id(0).to(tl.int64)
    low = tl.load(OFFSETS + e)
    high = tl.load(OFFSETS + e + 1)
    c = tl.arange(0, BC)
    total = tl.load(OUT + e * C + c, mask=c < C, other=0.0)
    for p0 in range(low, high, BP):
        p = p0 + tl.arange(0, BP)
        at = tl.load(ORDER + p, mask=p < high, other=0).to(tl.int64)
        ok = (p < high)[:, None] & (c < C)[None, :]
        total += tl.sum(tl.load(PAIRS + at[:, None] * C + c[None, :], mask=ok, other=0.0), 0)
    tl.store(OUT + e * C + c, total, mask=c < C)


def _pack(index: Tensor, entries: int) -> Tensor:
    B, T, N = index.shape
    words = blocks(entries, WORD)
    bits = index.new_empty(B, T, words, dtype=torch.int64)
    grid = blocks(B * T, _PACK.sizes["BR"]), blocks(words, _PACK.sizes["BW"])
    launch(pack_bits, grid, index, bits, B * T, N, words, **_PACK.constants())
    return bits


def _lengths(index: Tensor) -> Tensor:
    B, T, N = index.shape
    length = index.new_empty(B, T)
    launch(
        list_lengths, (blocks(B * T, _LENGTHS.sizes["BR"]),), index, length, B * T, N,
        **_LENGTHS.constants(),
    )  # fmt: skip
    return length


define("triton_list_lengths(Tensor index) -> Tensor", _lengths)
define("triton_pack_bits(Tensor index, int entries) -> Tensor", _pack)


def sum_pairs(
    index_BTN: Tensor, entries: int, channels: int, write: Callable[[int, int, Tensor], None]
) -> Tensor:
    """Sum what pairs of a query and a chosen entry give to the entry, in the order of queries.

    Args:
        index_BTN: chosen entries, int32, -1 = none.
        entries: of a row.
        channels: of a pair's row.
        write: ``write(first, rows, pairs)`` fills the fp32 rows [rows * N, C] of the chosen entries
            of queries ``first`` and on, counted through all rows of the batch.

    Returns:
        [B, E, C] fp32.
    """
    B, T, N = index_BTN.shape
    total = index_BTN.new_zeros(B, entries, channels, dtype=torch.float32)
    owner_P = index_BTN.new_empty(B * T * N)
    launch(
        pair_owners, (blocks(B * T * N, _OWNERS.sizes["BP"]),), index_BTN, owner_P, B * T * N,
        T * N, entries, B * entries, **_OWNERS.constants(),
    )  # fmt: skip
    every = torch.arange(B * entries + 1, device=index_BTN.device, dtype=torch.int32)
    queries = max(1, PAIR_BYTES // (4 * channels * max(N, 1)))
    for first in range(0, B * T, queries):
        rows = min(queries, B * T - first)
        ids, order = owner_P[first * N : (first + rows) * N].sort(stable=True)
        pairs = total.new_empty(rows * N, channels)
        write(first, rows, pairs)
        offsets = torch.searchsorted(ids, every, out_int32=True)
        launch(
            segment_sum, (B * entries,), pairs, order, offsets, total, channels,
            BC=triton.next_power_of_2(channels), **_SUM.constants(),
        )  # fmt: skip
    return total


def _shipped() -> tuple[Shipped, ...]:
    pack = {"INDEX": "*i32", "BITS": "*i64", "rows": "i32", "N": "i32", "words": "i32"}
    owners = {"INDEX": "*i32", "OWNER": "*i32"}
    owners |= dict.fromkeys(("pairs", "of_row", "E", "nobody"), "i32")
    sums = {"PAIRS": "*fp32", "ORDER": "*i64", "OFFSETS": "*i32", "OUT": "*fp32", "C": "i32"}
    return (
        Shipped("pack bits", pack_bits, pack, {}, {"other": _PACK}),
        Shipped("list lengths", list_lengths, {**pack, "LENGTH": "*i32"}, {}, {"other": _LENGTHS}),
        Shipped("pair owners", pair_owners, owners, {}, {"other": _OWNERS}),
        *(
            Shipped(f"segment sum C={c}", segment_sum, sums, {"BC": c}, {"other": _SUM})
            for c in (64, 128, 512)
        ),
    )


SHIPPED = _shipped()
