"""The lightning indexer's choice and loss in Triton (reference B.7, B.8, ``../indexer.py``).

The choice takes the largest int64 keys of a chunk of queries: a key holds the score and, below it,
the entry, so equal scores go to the lower entry. The loss keeps the gradient of its scores, [B, T,
N] of a choice or [B, T, E] of all visible entries, for the backward pass.
"""

# Legend: B rows, T tokens, H attention heads, K head dim, J indexer heads, L indexer head dim, E
# entries, N chosen
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.errors import ConfigError
from model.kernels.attention import EntrySet
from model.kernels.indexer import IndexerInputs
from model.kernels.triton.attention import ints, mass_rows, padded
from model.kernels.triton.entries import sum_pairs
from model.kernels.triton.indexer_kernels import (
    divergence,
    index_scores,
    list_grad_pairs,
    list_grad_pairs_atomic,
    list_grad_queries,
    list_scores,
    range_grad_keys,
    range_grad_queries,
    unranked,
)
from model.kernels.triton.launch import (
    ARCHITECTURES,
    INTERPRETER,
    OPS,
    Shipped,
    Tile,
    Tiles,
    architecture_of,
    blocks,
    define,
    launch,
    tile_of,
    upcast,
)
from model.sequence_plan import Bounds

# Bytes of a chunk of queries' scores, and of the teacher's mass over all visible entries.
CHUNK_BYTES = 256 << 20
# Programs that fill a device, and the fewest queries worth a program of their own.
_PROGRAMS = 256
_QUERIES = {INTERPRETER: 16}

_MFMA = {"matrix_instr_nonkdim": 16}
_RANGE_INTERPRETED = Tile({"BT": 32, "BE": 32}, 1, 1)
_LIST_INTERPRETED = Tile({"BN": 32}, 1, 1)
# The choice is by what compiles, fits and does not spill (``scripts/bench.py triton_aot``).
_SCORES: Tiles = {
    "other": Tile({"BT": 64, "BE": 64}, 4, 3), "sm_90": Tile({"BT": 128, "BE": 64}, 8, 3),
    "sm_100": Tile({"BT": 128, "BE": 64}, 8, 3),
    "gfx942": Tile({"BT": 128, "BE": 128}, 8, 2, _MFMA), INTERPRETER: _RANGE_INTERPRETED,
}  # fmt: skip
# By heads: on gfx942 a warp for 16 of them, else warps form the same products.
_LIST: dict[int, Tiles] = {
    heads: {
        "other": Tile({"BN": 64}, 4, 2), "gfx942": Tile({"BN": 64}, heads // 16, 2, _MFMA),
        INTERPRETER: _LIST_INTERPRETED,
    }
    for heads in (16, 32, 64, 128)
}  # fmt: skip
# On sm_120, 16 heads in tiles of 32 would form products twice, and more in tiles of 64 would spill.
_PAIRS: dict[int, Tiles] = {
    heads: {
        "other": Tile({"BN": 64}, 4, 1), "sm_100": Tile({"BN": 64}, 8, 1),
        "sm_120": Tile({"BN": 64 if heads == 16 else 32}, 4, 1),
        "gfx942": Tile({"BN": 64}, 4, 1, _MFMA), INTERPRETER: _LIST_INTERPRETED,
    }
    for heads in (16, 32, 64, 128)
}  # fmt: skip
_QUERIES_RANGE: Tiles = {
    "other": Tile({"BT": 64, "BE": 32}, 4, 2), "gfx942": Tile({"BT": 64, "BE": 32}, 4, 2, _MFMA),
    INTERPRETER: _RANGE_INTERPRETED,
}  # fmt: skip
_KEYS_RANGE: Tiles = {
    "other": Tile({"BT": 64, "BE": 32}, 4, 2),
    "gfx942": Tile({"BT": 64, "BE": 64}, 4, 2, _MFMA), INTERPRETER: _RANGE_INTERPRETED,
}  # fmt: skip
_DIVERGENCE = Tile({"BN": 1024}, 4, 1)
_UNRANK = Tile({"BN": 512}, 4, 1)


def _setting(tiles: Tiles, q: Tensor) -> dict[str, Any]:
    """Constexprs of a kernel for these queries."""
    tile = tile_of(tiles, architecture_of(q.device))
    J, L = q.shape[-2:]
    heads = {"HEADS": _heads(J)} if "BN" in tile.sizes else {}
    return {**tile.constants(), **heads, "J": J, "L": L, "UPCAST": upcast(q)}


def _heads(heads: int) -> int:
    """Rows of a tile of one query.

    Raises:
        ConfigError: no tile holds so many heads.
    """
    if heads > max(_LIST):
        raise ConfigError(
            f"model.index_n_heads={heads}: Triton's indexer has tiles up to {max(_LIST)}"
        )
    return max(16, 1 << (heads - 1).bit_length())


def _scores(
    q: Tensor, keys: Tensor, weight: Tensor, first: Tensor, stop: Tensor, begin: int, chunk: int,
    *, ranked: bool,
) -> Tensor:  # fmt: skip
    B, T = q.shape[:2]
    E = keys.shape[1]
    setting = _setting(_SCORES, q)
    out = q.new_empty(B, chunk, E, dtype=torch.int64 if ranked else torch.float32)
    launch(
        index_scores, (blocks(chunk, setting["BT"]), blocks(E, setting["BE"]), B), q, keys, weight,
        first, stop, out, begin, chunk, T, E, **setting, RANKED=ranked,
    )  # fmt: skip
    return out


def _choose(
    q: Tensor, keys: Tensor, weight: Tensor, first: Tensor, stop: Tensor, count: int
) -> Tensor:
    B, T = q.shape[:2]
    index = q.new_empty(B, T, count, dtype=torch.int32)
    size = max(1, CHUNK_BYTES // (8 * B * keys.shape[1]))
    for begin in range(0, T, size):
        chunk = min(size, T - begin)
        ranks = _scores(q, keys, weight, first, stop, begin, chunk, ranked=True)
        best = ranks.topk(count, dim=-1).values
        launch(
            unranked, (chunk, B), best, index, begin, chunk, T, count, **_UNRANK.constants()
        )  # fmt: skip
    return index


def _loss(
    q: Tensor,
    keys: Tensor,
    weight: Tensor,
    first: Tensor,
    stop: Tensor,
    index: Tensor | None,
    attention_q: Tensor,
    entries: Tensor,
    lse: Tensor,
    scale: float,
    mass: Tensor | None,
) -> tuple[Tensor, Tensor]:
    B, T = q.shape[:2]
    if index is None:
        scores = _scores(q, keys, weight, first, stop, 0, T, ranked=False)
    else:
        scores = q.new_empty(index.shape, dtype=torch.float32)
        launch(
            list_scores, (B * T,), q, keys, weight, index, scores, T, keys.shape[1],
            index.shape[-1], **_setting(_LIST[_heads(q.shape[2])], q),
        )  # fmt: skip
    N = scores.shape[-1]
    loss = q.new_empty(B * T, dtype=torch.float32)
    size = B * T if mass is not None else max(1, CHUNK_BYTES // (4 * N))
    for begin in range(0, B * T, size):
        rows = min(size, B * T - begin)
        teacher = mass
        if teacher is None:
            use = (first, stop, index, scale)
            teacher = mass_rows(attention_q, entries, lse, *use, begin, rows)
        launch(
            divergence, (rows,), scores, teacher, index, first, stop, loss, begin, N,
            **_DIVERGENCE.constants(), MODE="range" if index is None else "list",
        )  # fmt: skip
    return loss.sum(), scores


def _loss_backward(
    q: Tensor,
    keys: Tensor,
    weight: Tensor,
    first: Tensor,
    stop: Tensor,
    index: Tensor | None,
    grad_scores: Tensor,
    grad: Tensor,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, J, L = q.shape
    E = keys.shape[1]
    grad_q, grad_w = torch.empty_like(q), torch.empty_like(weight)
    if index is None:
        setting = _setting(_QUERIES_RANGE, q)
        launch(
            range_grad_queries, (blocks(T, setting["BT"]), J, B), q, keys, weight, first, stop,
            grad_scores, grad, grad_q, grad_w, T, E, **setting,
        )  # fmt: skip
        setting = _setting(_KEYS_RANGE, q)
        owners = blocks(E, setting["BE"])
        fewest = _QUERIES.get(architecture_of(q.device), 64)
        splits = max(1, min(_PROGRAMS // (owners * B), blocks(T, fewest)))
        parts = keys.new_empty(splits, *keys.shape, dtype=torch.float32)
        launch(
            range_grad_keys, (owners, splits, B), q, keys, weight, first, stop, grad_scores, parts,
            T, E, **setting,
        )  # fmt: skip
        return grad_q, _scaled(parts.sum(0), grad, keys), grad_w
    N = index.shape[-1]
    launch(
        list_grad_queries, (B * T,), q, keys, weight, index, grad_scores, grad, grad_q, grad_w, T,
        E, N, **_setting(_LIST[_heads(q.shape[2])], q),
    )  # fmt: skip
    setting = _setting(_PAIRS[_heads(q.shape[2])], q)
    if not deterministic:
        total = keys.new_zeros(keys.shape, dtype=torch.float32)
        launch(
            list_grad_pairs_atomic, (B * T, blocks(N, setting["BN"])), q, keys, weight, index,
            grad_scores, total, T, E, N, **setting,
        )  # fmt: skip
        return grad_q, _scaled(total, grad, keys), grad_w

    def write(begin: int, rows: int, pairs: Tensor) -> None:
        launch(
            list_grad_pairs, (rows, blocks(N, setting["BN"])), q, keys, weight, index, grad_scores,
            pairs, begin, T, E, N, **setting,
        )  # fmt: skip

    return grad_q, _scaled(sum_pairs(index, E, L, write), grad, keys), grad_w


def _scaled(x: Tensor, factor: Tensor, like: Tensor) -> Tensor:
    """``x * factor``, rounded once to the dtype of ``like``."""
    return torch.mul(x, factor, out=torch.empty_like(like))


_INPUTS = "Tensor q, Tensor keys, Tensor weight, Tensor first, Tensor stop"
define(f"triton_index_topk({_INPUTS}, int count) -> Tensor", _choose)
define(
    f"triton_indexer_loss({_INPUTS}, Tensor? index, Tensor attention_q, Tensor entries, Tensor lse,"
    " float scale, Tensor? mass) -> (Tensor, Tensor)",
    _loss,
)
define(
    f"triton_indexer_loss_backward({_INPUTS}, Tensor? index, Tensor grad_scores, Tensor grad,"
    " bool deterministic) -> (Tensor, Tensor, Tensor)",
    _loss_backward,
)


def _inputs(indexer: IndexerInputs) -> tuple[Tensor, Tensor, Tensor]:
    q_BTJL, k_BEL, w_BTJ = indexer
    return padded(q_BTJL), padded(k_BEL.to(q_BTJL.dtype)), w_BTJ.float().contiguous()


@torch.no_grad()
def index_topk(
    indexer: IndexerInputs,
    first_BT: Tensor,
    stop_BT: Tensor,
    topk: int,
    bounds: Bounds | None = None,
) -> Tensor:
    """:func:`model.kernels.indexer.index_topk_reference` in Triton.

    The best first, int32; equal scores go to the lower entry.
    """
    count = min(topk, indexer[1].shape[1])
    return OPS.triton_index_topk(*_inputs(indexer), ints(first_BT), ints(stop_BT), count)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BTJL: Tensor, k_BEL: Tensor, w_BTJ: Tensor, sets: tuple[Any, ...],
        teacher: tuple[Any, ...], deterministic: bool,
    ) -> Tensor:  # fmt: skip
        loss, grad_scores = OPS.triton_indexer_loss(q_BTJL, k_BEL, w_BTJ, *sets, *teacher)
        ctx.save_for_backward(q_BTJL, k_BEL, w_BTJ, *sets, grad_scores)
        ctx.deterministic = deterministic
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = OPS.triton_indexer_loss_backward(
            *ctx.saved_tensors, grad.float(), ctx.deterministic
        )
        return *grads, None, None, None


def indexer_loss(
    indexer: IndexerInputs,
    q_BTHK: Tensor,
    lse_BTH: Tensor,
    entries: EntrySet,
    mass_BTN: Tensor | None = None,
    deterministic: bool = True,
) -> Tensor:
    """:func:`model.kernels.indexer.indexer_loss_reference` in Triton.

    Not ``deterministic``, the gradient of the keys of a list has a sum in no order.
    """
    sets = (ints(entries.first_BT), ints(entries.stop_BT), ints(entries.index_BTN))
    teacher = (
        padded(q_BTHK.detach()), padded(entries.kv_BEK.detach().to(q_BTHK.dtype)),
        lse_BTH.detach().contiguous(), q_BTHK.shape[-1] ** -0.5,
        None if mass_BTN is None else mass_BTN.contiguous(),
    )  # fmt: skip
    return _Loss.apply(*_inputs(indexer), sets, teacher, deterministic)


def _shipped(heads: int, dim: int) -> tuple[Shipped, ...]:
    types = {
        **dict.fromkeys(("Q", "KEYS", "DQ"), "*bf16"),
        **dict.fromkeys(("WEIGHT", "DS", "GRAD", "DW", "PAIRS", "PARTS", "SUM"), "*fp32"),
        **dict.fromkeys(("FIRST", "STOP", "INDEX"), "*i32"),
        **dict.fromkeys(("t_first", "chunk", "first_row", "T", "E", "N"), "i32"),
    }

    def one(name: str, kernel: Any, tiles: Tiles, out: str = "*fp32", **more: Any) -> Shipped:
        constants = {"J": heads, "L": dim, "HEADS": _heads(heads), "UPCAST": False, **more}
        compiled = {place: tile for place, tile in tiles.items() if place != INTERPRETER}
        name = f"indexer {name} {heads}x{dim}"
        small = dim == 32 and tiles is _KEYS_RANGE
        why = "32 x 32 products have fewer tiles than warps"
        replicates = dict.fromkeys(ARCHITECTURES[:-1], why) if small else {}
        full = dim == 128 and tiles is _QUERIES_RANGE
        spills = {"sm_120": "smaller tiles form products twice"} if full else {}
        return Shipped(name, kernel, {**types, "OUT": out}, constants, compiled, spills, replicates)

    return (
        one("choice", index_scores, _SCORES, "*i64", RANKED=True),
        one("scores", index_scores, _SCORES, RANKED=False),
        one("list scores", list_scores, _LIST[_heads(heads)]),
        one("list dq", list_grad_queries, _LIST[_heads(heads)]),
        one("list dk", list_grad_pairs, _PAIRS[_heads(heads)]),
        one("list dk atomic", list_grad_pairs_atomic, _PAIRS[_heads(heads)]),
        one("dq", range_grad_queries, _QUERIES_RANGE),
        one("dk", range_grad_keys, _KEYS_RANGE),
    )


_ROWS = {
    **dict.fromkeys(("SCORES", "MASS", "LOSS"), "*fp32"),
    **dict.fromkeys(("INDEX", "FIRST", "STOP"), "*i32"), "first_row": "i32", "N": "i32",
}  # fmt: skip
SHIPPED = (
    Shipped("indexer unranked", unranked,
            {"BEST": "*i64", "INDEX": "*i32", **dict.fromkeys(("begin", "chunk", "T", "N"), "i32")},
            {}, {"other": _UNRANK}),
    *_shipped(64, 128), *_shipped(32, 64), *_shipped(16, 32),
    *(
        Shipped(f"indexer divergence {mode}", divergence, _ROWS, {"MODE": mode},
                {"other": _DIVERGENCE})
        for mode in ("list", "range")
    ),
)  # fmt: skip
