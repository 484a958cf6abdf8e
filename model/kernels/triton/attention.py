"""Attention over a window and compressed entries in Triton (reference B.3, ``../attention.py``).

Scores are formed in tiles and never stored; the backward pass forms them again from the saved log
denominators. A choice of entries is met as a list or, while a row has few entries for each chosen
one, as a mask of bits over all of them (:func:`masks_choice`). Sums over queries keep an order:
the backward pass gives equal bits each time, unless a list's pairs are asked to be added atomically
(``model.deterministic=false``).
"""

# Legend: B rows, T tokens, U window keys, H heads, K head dim, E entries, N chosen entries, W words
# of 64 entries
from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from model.kernels.attention import AttentionResult, EntrySet
from model.kernels.triton.attention_kernels import (
    attention_delta,
    attention_forward,
    attention_grad_keys,
    attention_grad_pairs,
    attention_grad_pairs_atomic,
    attention_grad_queries,
    attention_mass,
)
from model.kernels.triton.attention_tiles import DELTA, constants, tiles_of
from model.kernels.triton.entries import sum_pairs
from model.kernels.triton.launch import (
    INTERPRETER,
    OPS,
    architecture_of,
    blocks,
    define,
    launch,
    tile_of,
    upcast,
)

LOG2E = 1.4426950408889634
# bf16 FLOPs a byte of memory: datasheets of A100, RTX 3090, RTX 4090, H100, B200, RTX 5090, MI300X.
_FLOPS_PER_BYTE = {
    "sm_80": 153, "sm_86": 76, "sm_89": 164, "sm_90": 295, "sm_100": 281, "sm_120": 117,
    "gfx942": 247, INTERPRETER: 164,
}  # fmt: skip
# Programs that fill a device, and the fewest queries worth a program of their own.
_PROGRAMS = 256
_QUERIES = {INTERPRETER: 16}


def masks_choice(
    heads: int, entries: int, chosen: int, architecture: str, deterministic: bool = True
) -> bool:
    """Whether a choice is met as a mask over all visible entries.

    A pair of the list costs the backward pass 8 K bytes, which are written and read again, or 4 K
    that are added atomically (at the rate of memory; a cache may be faster); an entry that is
    visible and not chosen costs 18 H K FLOPs. On average half of a row's entries are visible.

    Args:
        heads: of attention.
        entries: of a row.
        chosen: entries of a query's list.
        architecture: as ``architecture_of`` names it.
        deterministic: the pairs of a list are summed in order.
    """
    balance = _FLOPS_PER_BYTE.get(architecture, 164) * (0.44 if deterministic else 0.22)
    return entries / 2 <= chosen * (1 + balance / heads)


def _mode(entries: Tensor | None, index: Tensor | None, bits: Tensor | None) -> str:
    if entries is None:
        return "none"
    if bits is not None:
        return "bits"
    return "range" if index is None else "list"


def _setting(kernel: str, q: Tensor, mode: str) -> dict[str, Any]:
    """Constexprs of a kernel for these queries."""
    *_, H, K = q.shape
    tile = tile_of(tiles_of(kernel, mode, K), architecture_of(q.device))
    return {**constants(tile, H, K, mode), "UPCAST": upcast(q)}


def _scales(scale: float) -> tuple[float, float]:
    """Of scores in base 2, and of gradients."""
    return scale * LOG2E, scale


def _forward(
    q: Tensor,
    kv: Tensor,
    sink: Tensor,
    start: Tensor,
    window: int,
    scale: float,
    entries: Tensor | None,
    first: Tensor | None,
    stop: Tensor | None,
    index: Tensor | None,
    bits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    B, T, H, K = q.shape
    mode = _mode(entries, index, bits)
    setting = _setting("forward", q, mode)
    o, lse = torch.empty_like(q), q.new_empty(B, T, H, dtype=torch.float32)
    chosen = bits if mode == "bits" else index
    launch(
        attention_forward, _row_grid(q, setting), q, kv, entries, sink, start, first,
        stop, chosen, o, lse, T,
        0 if entries is None else entries.shape[1], 0 if chosen is None else chosen.shape[-1],
        _scales(scale)[0], window, **setting, MODE=mode,
    )  # fmt: skip
    return o, lse


def _row_grid(q: Tensor, setting: dict[str, Any]) -> tuple[int, int, int]:
    B, T, H, K = q.shape
    tiles, parts = blocks(H, setting["HEADS"]), K // setting["CHANNELS"]
    return blocks(T, setting["ROWS"] // setting["HEADS"]), tiles * parts, B


def mass_rows(
    q: Tensor,
    entries: Tensor,
    lse: Tensor,
    first: Tensor | None,
    stop: Tensor | None,
    index: Tensor | None,
    scale: float,
    begin: int,
    rows: int,
) -> Tensor:
    """The operator behind :func:`mass_of`, for ``rows`` queries of all rows from ``begin`` on."""
    T = q.shape[1]
    E = entries.shape[1]
    mode = "range" if index is None else "list"
    N = E if index is None else index.shape[-1]
    setting = _setting("mass", q, "list")
    mass = q.new_empty(rows, N, dtype=torch.float32)
    for name in ("HEADS", "CHANNELS"):
        del setting[name]
    launch(
        attention_mass, (rows, blocks(N, setting["BN"])), q, entries, first, stop, index, lse, mass,
        begin, T, E, N, _scales(scale)[0], **setting, MODE=mode,
    )  # fmt: skip
    return mass


def _backward(
    q: Tensor,
    kv: Tensor,
    sink: Tensor,
    start: Tensor,
    window: int,
    scale: float,
    entries: Tensor | None,
    first: Tensor | None,
    stop: Tensor | None,
    index: Tensor | None,
    bits: Tensor | None,
    o: Tensor,
    lse: Tensor,
    grad: Tensor,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, H, K = q.shape
    mode = _mode(entries, index, bits)
    delta, of_sink = torch.empty_like(lse), torch.empty_like(lse)
    launch(
        attention_delta, (blocks(B * T * H, DELTA.sizes["BR"]),), o, grad, sink, lse, delta,
        of_sink, B * T * H, H, K=K, **DELTA.constants(),
    )  # fmt: skip
    grad_sink = of_sink.sum(dim=(0, 1))
    setting = _setting("queries", q, mode)
    grad_q = torch.empty_like(q)
    chosen = bits if mode == "bits" else index
    launch(
        attention_grad_queries, _row_grid(q, setting), q, kv, entries, start, first,
        stop, chosen, lse, delta, grad,
        grad_q, T, 0 if entries is None else entries.shape[1],
        0 if chosen is None else chosen.shape[-1], *_scales(scale), window, **setting, MODE=mode,
    )  # fmt: skip

    def of_keys(keys: Tensor, mode: str) -> Tensor:
        E = keys.shape[1]
        setting = _setting("keys", q, mode)
        parts = K // setting["CHANNELS"]
        owners = blocks(E, setting["BN"])
        fewest = _QUERIES.get(architecture_of(q.device), 64)
        splits = max(1, min(_PROGRAMS // (owners * parts * B), blocks(T, fewest)))
        dtype = keys.dtype if splits == 1 else torch.float32
        out = keys.new_empty(splits, *keys.shape, dtype=dtype)
        launch(
            attention_grad_keys, (owners, splits, B * parts), q, keys, start, first, stop, bits,
            lse, delta, grad, out, T, E, 0 if bits is None else bits.shape[-1], *_scales(scale),
            window, **setting, MODE=mode,
        )  # fmt: skip
        return out[0] if splits == 1 else out.sum(0).to(keys.dtype)

    grad_kv = of_keys(kv, "none")
    if entries is None:
        return grad_q, grad_kv, grad_sink, q.new_empty(0)
    if mode != "list" or index is None:
        return grad_q, grad_kv, grad_sink, of_keys(entries, mode)
    pair_setting = _setting("pairs", q, "list")
    del pair_setting["HEADS"]
    N = index.shape[-1]
    grid_N = blocks(N, pair_setting["BN"]) * (K // pair_setting["CHANNELS"])
    if not deterministic:
        total = entries.new_zeros(entries.shape, dtype=torch.float32)
        launch(
            attention_grad_pairs_atomic, (B * T, grid_N), q, entries, index, lse, delta, grad,
            total, T, entries.shape[1], N, *_scales(scale), **pair_setting,
        )  # fmt: skip
        return grad_q, grad_kv, grad_sink, total.to(entries.dtype)

    def write(begin: int, rows: int, pairs: Tensor) -> None:
        launch(
            attention_grad_pairs, (rows, grid_N), q, entries, index, lse, delta, grad, pairs, begin,
            T, entries.shape[1], N, *_scales(scale), **pair_setting,
        )  # fmt: skip

    grad_entries = sum_pairs(index, entries.shape[1], K, write).to(entries.dtype)
    return grad_q, grad_kv, grad_sink, grad_entries


_INPUTS = (
    "Tensor q, Tensor kv, Tensor sink, Tensor start, int window, float scale, Tensor? entries,"
    " Tensor? first, Tensor? stop, Tensor? index, Tensor? bits"
)
define(f"triton_attention({_INPUTS}) -> (Tensor, Tensor)", _forward)
define(
    f"triton_attention_backward({_INPUTS}, Tensor o, Tensor lse, Tensor grad, bool deterministic)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
)
define(
    "triton_attention_mass(Tensor q, Tensor entries, Tensor lse, Tensor? first, Tensor? stop,"
    " Tensor? index, float scale, int begin, int rows) -> Tensor",
    mass_rows,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_BTHK: Tensor,
        kv_BTK: Tensor,
        sink_H: Tensor,
        entries_BEK: Tensor | None,
        start_BT: Tensor,
        window: int,
        scale: float,
        uses: tuple[Tensor | None, ...],
        deterministic: bool,
    ) -> tuple[Tensor, Tensor]:
        inputs = (q_BTHK, kv_BTK, sink_H, start_BT, window, scale, entries_BEK, *uses)
        o_BTHK, lse_BTH = OPS.triton_attention(*inputs)
        ctx.save_for_backward(q_BTHK, kv_BTK, sink_H, start_BT, entries_BEK, *uses, o_BTHK, lse_BTH)
        ctx.numbers, ctx.deterministic = (window, scale), deterministic
        ctx.mark_non_differentiable(lse_BTH)
        return o_BTHK, lse_BTH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o_BTHK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, sink, start, entries, *rest = ctx.saved_tensors
        grad = grad_o_BTHK.to(q.dtype).contiguous()
        grad_q, grad_kv, grad_sink, grad_entries = OPS.triton_attention_backward(
            q, kv, sink, start, *ctx.numbers, entries, *rest, grad, ctx.deterministic
        )
        grad_entries = None if entries is None else grad_entries
        return grad_q, grad_kv, grad_sink, grad_entries, *[None] * 5


def padded(x: Tensor) -> Tensor:
    """Contiguous, the last dim padded with zeros to a power of two of at least 16."""
    more = max(16, 1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]
    return (pad(x, (0, more)) if more else x).contiguous()


def ints(x: Tensor | None) -> Tensor | None:
    """As kernels read indices: contiguous int32."""
    return None if x is None else x.to(torch.int32).contiguous()


def attention(
    q_BTHK: Tensor,
    kv_BUK: Tensor,
    sink_H: Tensor,
    start_BT: Tensor,
    window: int,
    entries: EntrySet | None,
    deterministic: bool = True,
) -> AttentionResult:
    """:func:`model.kernels.attention.attention_reference` in Triton; gives the mass as well.

    Not ``deterministic``, the gradient of the entries of a list has a sum in no order.
    """
    before = kv_BUK.shape[1] - q_BTHK.shape[1]
    if before:
        asked = _with_blind_queries(q_BTHK, start_BT, entries, before)
        o, lse, _ = attention(asked[0], kv_BUK, sink_H, asked[1], window, asked[2], deterministic)
        o, lse = o[:, before:], lse[:, before:]
        if entries is None or entries.index_BTN is None:
            return AttentionResult(o, lse, None)
        return AttentionResult(o, lse, mass_of(q_BTHK, lse, entries))
    K, dtype = q_BTHK.shape[-1], q_BTHK.dtype
    q, kv, scale = padded(q_BTHK), padded(kv_BUK.to(dtype)), K**-0.5
    table, uses = None, (None, None, None, None)
    if entries is not None:
        table, index, bits = padded(entries.kv_BEK.to(dtype)), ints(entries.index_BTN), None
        E, place = table.shape[1], architecture_of(q.device)
        if index is not None and masks_choice(q.shape[2], E, index.shape[-1], place, deterministic):
            index, bits = None, OPS.triton_pack_bits(index, E)
        stop = ints(entries.stop_BT) if index is None else OPS.triton_list_lengths(index)
        uses = (ints(entries.first_BT), stop, index, bits)
    o, lse = _Attention.apply(
        q, kv, sink_H.float().contiguous(), table, ints(start_BT), window, scale, uses,
        deterministic,
    )  # fmt: skip
    mass = None
    if entries is not None and entries.index_BTN is not None:
        mass = mass_of(q_BTHK, lse, entries)
    return AttentionResult(o[..., :K], lse, mass)


def _with_blind_queries(
    q_BTHK: Tensor, start_BT: Tensor, entries: EntrySet | None, before: int
) -> tuple[Tensor, Tensor, EntrySet | None]:
    """A query that sees nothing for each key before a shard: the kernels count keys as queries."""
    if entries is not None:
        entries = replace(
            entries,
            first_BT=pad(entries.first_BT, (before, 0)),
            stop_BT=pad(entries.stop_BT, (before, 0)),
            index_BTN=None if entries.index_BTN is None
            else pad(entries.index_BTN, (0, 0, before, 0), value=-1),
            bounds=None,
        )  # fmt: skip
    start_BU = pad(start_BT, (before, 0), value=before + q_BTHK.shape[1])
    return pad(q_BTHK, (0, 0, 0, 0, before, 0)), start_BU, entries


@torch.no_grad()
def mass_of(q_BTHK: Tensor, lse_BTH: Tensor, entries: EntrySet) -> Tensor:
    """Attention's probability of every used entry, summed over heads.

    Args:
        q_BTHK: rotated queries.
        lse_BTH: log denominators.
        entries: the entries attention used.

    Returns:
        fp32 [B, T, N] of a choice, else [B, T, E]; 0 where an entry is not used.
    """
    B, T, _, K = q_BTHK.shape
    uses = (ints(entries.first_BT), ints(entries.stop_BT), ints(entries.index_BTN))
    q, table = padded(q_BTHK.detach()), padded(entries.kv_BEK.detach().to(q_BTHK.dtype))
    mass = OPS.triton_attention_mass(q, table, lse_BTH.contiguous(), *uses, K**-0.5, 0, B * T)
    return mass.view(B, T, -1)
