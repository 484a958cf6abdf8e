"""Tiles of the attention kernels by architecture, and what is shipped: data for ``attention.py``.

The choice is by what compiles, fits and does not spill, with every warp on rows of its own
(``scripts/bench.py triton_aot``); no GPU has timed them. ``other`` is for GPUs with 100 KB of
shared memory (sm_86, sm_89, sm_120) and serves all that are not named.
"""

# Legend: H heads, K head dim
from __future__ import annotations

from typing import Any

from model.errors import ConfigError
from model.kernels.triton import attention_kernels as kernels
from model.kernels.triton.launch import INTERPRETER, Shipped, Tile, Tiles

_SMALL_MFMA = {"matrix_instr_nonkdim": 16}


def _tile(
    rows: int, keys: int, channels: int, warps: int, stages: int, turned: bool = False
) -> Tile:
    sizes = {"ROWS": rows, "BN": keys, "CHANNELS": channels, "TURNED": turned}
    return Tile(sizes, warps, stages)


def _mfma(*sizes: int, turned: bool = False) -> Tile:
    tile = _tile(*sizes, turned=turned)
    return Tile(tile.sizes, tile.warps, tile.stages, _SMALL_MFMA)


# Few programs: they cost the interpreter 10 to 30 ms each.
_INTERPRETED = {INTERPRETER: _tile(64, 32, 1 << 30, 1, 1)}

# (kernel, mode) -> head dim up to -> architecture -> tile.
# Rows, keys, channels, warps, stages; for gfx942 products of 16 x 16.
TILES: dict[tuple[str, str], dict[int, Tiles]] = {
    ("forward", "list"): {
        128: {
            "other": _tile(16, 64, 128, 4, 3), "sm_100": _tile(16, 64, 128, 4, 3),
            "gfx942": _mfma(16, 64, 128, 4, 2, turned=True),
        },
        512: {
            "other": _tile(64, 16, 512, 8, 3, turned=True), "sm_90": _tile(64, 16, 256, 4, 2),
            "sm_100": _tile(64, 32, 512, 8, 2), "gfx942": _mfma(64, 16, 512, 4, 2),
        },
    },
    ("forward", "range"): {
        64: {
            "other": _tile(64, 64, 64, 4, 2, turned=True), "sm_90": _tile(64, 64, 64, 4, 2),
            "sm_100": _tile(64, 64, 64, 4, 2), "gfx942": _mfma(64, 64, 64, 4, 2),
        },
        128: {
            "other": _tile(64, 32, 128, 4, 2, turned=True), "sm_90": _tile(64, 64, 128, 4, 2),
            "sm_100": _tile(128, 64, 128, 8, 2), "sm_120": _tile(64, 32, 128, 4, 3, turned=True),
            "gfx942": _mfma(64, 32, 128, 4, 2),
        },
        512: {
            "other": _tile(64, 16, 512, 8, 2, turned=True), "sm_90": _tile(128, 32, 256, 8, 2),
            "sm_100": _tile(128, 32, 256, 8, 2), "gfx942": _mfma(64, 16, 512, 4, 2),
        },
    },
    ("queries", "list"): {
        128: {
            "other": _tile(16, 64, 128, 4, 2), "gfx942": _mfma(16, 32, 128, 2, 2),
        },
        512: {
            "other": _tile(32, 16, 512, 8, 2, turned=True), "sm_90": _tile(64, 32, 512, 8, 2),
            "sm_100": _tile(64, 16, 512, 8, 2), "gfx942": _mfma(32, 32, 512, 4, 1),
        },
    },
    ("queries", "range"): {
        64: {
            "other": _tile(32, 64, 64, 4, 2, turned=True), "sm_90": _tile(64, 32, 64, 4, 2),
            "sm_100": _tile(64, 32, 64, 4, 2), "gfx942": _mfma(64, 32, 64, 4, 2),
        },
        128: {
            "other": _tile(64, 32, 128, 4, 2, turned=True), "sm_90": _tile(64, 32, 128, 4, 2),
            "sm_100": _tile(64, 32, 128, 4, 2), "gfx942": _mfma(64, 32, 128, 4, 2),
        },
        512: {
            "other": _tile(32, 16, 512, 8, 2, turned=True), "sm_90": _tile(64, 32, 512, 8, 2),
            "sm_100": _tile(64, 16, 512, 8, 2), "gfx942": _mfma(32, 32, 512, 4, 1),
        },
    },
    ("keys", "range"): {
        128: {
            "other": _tile(32, 64, 128, 4, 2, turned=True), "sm_90": _tile(32, 64, 128, 4, 2),
            "sm_100": _tile(32, 64, 128, 4, 2), "gfx942": _mfma(32, 64, 128, 4, 2),
        },
        512: {
            "other": _tile(16, 32, 256, 4, 2, turned=True), "sm_90": _tile(16, 64, 256, 4, 2),
            "sm_100": _tile(16, 64, 512, 8, 2), "gfx942": _mfma(8, 64, 512, 4, 1),
        },
    },
    ("pairs", "list"): {
        64: {
            "other": _tile(16, 64, 64, 4, 1), "sm_100": _tile(16, 64, 64, 8, 1),
            "gfx942": _mfma(16, 64, 64, 4, 1),
        },
        128: {"other": _tile(16, 64, 128, 4, 1), "gfx942": _mfma(16, 64, 128, 4, 1)},
        512: {
            "other": _tile(16, 32, 256, 4, 2, turned=True), "sm_90": _tile(16, 128, 256, 8, 2),
            "sm_100": _tile(16, 32, 256, 4, 2), "gfx942": _mfma(8, 64, 256, 4, 1),
        },
    },
    ("mass", "list"): {
        128: {
            "other": _tile(16, 64, 128, 4, 1), "sm_80": _tile(16, 64, 128, 8, 1),
            "gfx942": _mfma(16, 64, 128, 4, 1),
        },
        512: {
            "other": _tile(64, 16, 512, 8, 2, turned=True), "sm_90": _tile(64, 64, 512, 4, 1),
            "sm_100": _tile(64, 64, 512, 4, 1), "gfx942": _mfma(64, 16, 512, 4, 1),
        },
    },
}  # fmt: skip


def tiles_of(kernel: str, mode: str, head_dim: int) -> Tiles:
    """The tiles of a kernel; what is not a list has the tiles of a range.

    Args:
        kernel: ``forward``, ``mass``, ``queries``, ``keys``, ``pairs`` or ``pairs atomic``.
        mode: of the kernels.
        head_dim: a power of two.

    Raises:
        ConfigError: no tile holds such a head dim.
    """
    shared = kernel in ("forward", "queries", "keys") and mode != "list"
    classes = TILES[kernel.removesuffix(" atomic"), "range" if shared else "list"]
    fitting = [limit for limit in classes if head_dim <= limit]
    if not fitting:
        raise ConfigError(
            f"model.head_dim={head_dim}: Triton's attention has tiles up to {max(classes)}"
        )
    return {**_INTERPRETED, **classes[min(fitting)]}


def constants(tile: Tile, heads: int, head_dim: int, mode: str) -> dict[str, Any]:
    """The constexprs of a tile of rows for a model.

    Queries that share their keys are merged with heads into rows, in tiles of a power of two that
    divides the heads; a list belongs to one query.

    Args:
        tile: of the table.
        heads: of the model.
        head_dim: a power of two.
        mode: of the kernels.
    """
    rows = tile.sizes["ROWS"]
    merged = rows if mode == "list" else min(heads & -heads, rows)
    channels = min(tile.sizes["CHANNELS"], head_dim)
    return {**tile.constants(), "H": heads, "HEADS": merged, "K": head_dim, "CHANNELS": channels}


_POINTERS = {"Q": "*bf16", "ENTRIES": "*bf16", "LSE": "*fp32", "FIRST": "*i32", "STOP": "*i32"}
_NUMBERS = dict.fromkeys(("T", "E", "N", "window", "first_row", "words"), "i32")
_NUMBERS |= {"scale": "fp32", "scale2": "fp32"}
_BACK = {"DELTA": "*fp32", "DO": "*bf16", "DQ": "*bf16", "PAIRS": "*fp32"}
_TYPES: dict[str, dict[str, str]] = {
    "forward": {"KV": "*bf16", "SINK": "*fp32", "START": "*i32", "O": "*bf16"},
    "mass": {"INDEX": "*i32", "MASS": "*fp32"},
    "queries": {"KV": "*bf16", "START": "*i32", **_BACK},
    "keys": {"KEYS": "*bf16", "START": "*i32", "BITS": "*i64", "PARTS_": "*fp32", **_BACK},
    "pairs": {"INDEX": "*i32", **_BACK},
    "pairs atomic": {"INDEX": "*i32", "SUM": "*fp32", **_BACK},
}
KERNELS = {
    "forward": kernels.attention_forward,
    "mass": kernels.attention_mass,
    "queries": kernels.attention_grad_queries,
    "keys": kernels.attention_grad_keys,
    "pairs": kernels.attention_grad_pairs,
    "pairs atomic": kernels.attention_grad_pairs_atomic,
}


_SPILLS = {
    ("forward", "bits", 512): {"sm_100": "4 bytes; the mask's word beside 128 rows"},
    ("keys", "bits", 512): {"sm_90": "12 bytes; a tile of half the keys would leave wgmma"},
}


def _shipped(kernel: str, mode: str, heads: int, head_dim: int) -> Shipped:
    function = KERNELS[kernel]
    chosen = {"CHOSEN": "*i64" if mode == "bits" else "*i32"}
    types = _POINTERS | _NUMBERS | chosen | _TYPES[kernel]
    tiles: dict[str, Tile] = {}
    for architecture, tile in tiles_of(kernel, mode, head_dim).items():
        if architecture == INTERPRETER:
            continue
        sizes = constants(Tile(tile.sizes), heads, head_dim, mode)
        sizes = {n: v for n, v in sizes.items() if n in function.arg_names}
        tiles[architecture] = Tile(sizes, tile.warps, tile.stages, tile.options)
    name = f"attention {kernel} {mode} K={head_dim} H={heads}"
    fixed = {"MODE": mode, "UPCAST": False}
    return Shipped(name, function, types, fixed, tiles, _SPILLS.get((kernel, mode, head_dim), {}))


_SHAPES = ((64, 512), (12, 128), (6, 64))  # heads, head dim: V4-Flash, v4_small, v4_nano
_USES = (
    ("forward", "list"), ("forward", "range"), ("forward", "bits"), ("forward", "none"),
    ("queries", "list"), ("queries", "range"), ("queries", "bits"), ("keys", "none"),
    ("keys", "range"), ("keys", "bits"), ("pairs", "list"), ("pairs atomic", "list"),
    ("mass", "list"), ("mass", "range"),
)  # fmt: skip
_DELTA_TYPES = {
    "O": "*bf16", "DO": "*bf16", "rows": "i32", "H": "i32",
    **dict.fromkeys(("SINK", "LSE", "DELTA", "DSINK"), "*fp32"),
}  # fmt: skip
DELTA = Tile({"BR": 16}, warps=4, stages=1)
SHIPPED = (
    *(_shipped(*use, *shape) for shape in _SHAPES for use in _USES),
    *(
        Shipped(f"attention delta K={k}", kernels.attention_delta, _DELTA_TYPES, {"K": k},
                {"other": DELTA})
        for _, k in _SHAPES
    ),
)  # fmt: skip
