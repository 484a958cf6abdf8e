"""What a chunk of queries meets: the plain path's keys, their products, and the way back.

The window is a band: a chunk of C queries meets C + window - 1 tokens. Entries are a slice (all
visible ones) with a mask while the slice is short, or gathered per query when the choice is much
smaller than the slice. What all queries of a chunk meet stands in one table, since on a GPU it is
the number of operations that costs.
"""

# Legend: B rows, U window keys, C queries of a chunk, H heads, K head dim, E entries, N chosen, S
# keys that a chunk's queries share, G keys of a query, A one or two tensors side by side
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels.attention import EntrySet
from model.kernels.gather import add_rows_
from model.sequence_plan import Bounds

# Elements of one chunk's score tensor. On a CPU 2^18 fp32 = 1 MiB, about a core's L2 cache:
# 2^16 pays more for calls, 2^20 for memory traffic (docs/LOG.md). Elsewhere calls are what costs:
# 256 queries, unless their scores would take more than 1 GiB.
_CHUNK_ELEMENTS = {"cpu": 1 << 18}
_CHUNK_ELEMENTS_ELSEWHERE = 1 << 28
# Gathering keys per query moves N * K elements a query; masking computes the whole slice. Masking
# wins up to here.
MASK_UP_TO = 6
# Masks of chosen entries are scattered for many chunks at once: up to these bytes (one a query and
# entry), at least for one chunk.
_MASK_BYTES = {"cpu": 0}  # a chunk's stays in cache
_MASK_BYTES_ELSEWHERE = 1 << 26


def chunk_size(like: Tensor, rows_by_heads: int, keys: int, tokens: int) -> int:
    """Queries of a chunk.

    Args:
        like: on the device.
        rows_by_heads: scores of a query and key.
        keys: of a query, about.
        tokens: queries.
    """
    elements = _CHUNK_ELEMENTS.get(like.device.type, _CHUNK_ELEMENTS_ELSEWHERE)
    size = max(elements // max(rows_by_heads * keys, 1), 1)
    return max(16, min(256, 1 << (size.bit_length() - 1), tokens))


def chunks_of(T: int, size: int) -> Iterator[slice]:
    """Chunks of ``size`` of T queries; the last may be shorter."""
    for begin in range(0, T, size):
        yield slice(begin, min(begin + size, T))


class MetEntries(NamedTuple):
    """Entries that a chunk meets: a slice of the row, or for each query those that it chose.

    Attributes:
        rows: the slice; of what is gathered, all that the chunk sees.
        hidden_BCG: which of them a query does not use.
        index_BCN: gathered: the entry of each, 0 for none.
    """

    rows: slice
    hidden_BCG: Tensor
    index_BCN: Tensor | None


class ChunkKeys(NamedTuple):
    """Keys of a chunk: those that all its queries meet, then those of each query.

    Attributes:
        shared_BSK: tokens of the window, then a slice of the entries.
        gathered_BCNK: chosen entries.
        hidden_BCG: which of all these a query does not use.
        window: place of the first in the window's table.
        met: the entries; None: there are none.
    """

    shared_BSK: Tensor | None
    gathered_BCNK: Tensor | None
    hidden_BCG: Tensor
    window: slice
    met: MetEntries | None


_NO_WINDOW = slice(0, 0)


class ChunkWindow:
    """What queries see of the window, for all chunks of a call at once.

    Args:
        start_BT: first token that each query may see.
        window: tokens.
        num_keys: rows of the window's table, of which the last are the queries' own.
        size: queries of a chunk.
    """

    def __init__(self, start_BT: Tensor, window: int, num_keys: int, size: int) -> None:
        T, device = start_BT.shape[1], start_BT.device
        self.before, self.reach = num_keys - T, window - 1
        query_T = torch.arange(self.before, num_keys, device=device)
        lowest_BT = torch.maximum(start_BT, query_T - self.reach)
        first_T = torch.arange(T, device=device) // size * size + (self.before - self.reach)
        key_TG = first_T[:, None] + torch.arange(size + self.reach, device=device)
        self.hidden_BTG = (key_TG < lowest_BT[..., None]) | (key_TG > query_T[:, None])

    def of(self, chunk: slice) -> tuple[slice, Tensor]:
        """Rows of the table that a chunk meets, and which of them [B, C, rows] a query does not."""
        first = chunk.start + self.before - self.reach
        low, stop = max(0, first), chunk.stop + self.before
        return slice(low, stop), self.hidden_BTG[:, chunk, low - first : stop - first]


class ChunkEntries:
    """What queries use of the entries of their row, for all chunks of a call at once."""

    def __init__(self, entries: EntrySet) -> None:
        self.first_BT1, self.stop_BT1 = entries.first_BT[..., None], entries.stop_BT[..., None]
        self.bounds, self.index_BTN = _bounds(entries), entries.index_BTN
        self.E, device = entries.kv_BEK.shape[1], entries.kv_BEK.device
        self.masked, self.hidden_BME = slice(0, 0), None
        if self.index_BTN is None:
            self.row_E = torch.arange(self.E, device=device)
        else:
            self.none_BTN = self.index_BTN < 0
            self.column_BTN = self.index_BTN.masked_fill(self.none_BTN, self.E)

    def of(self, chunk: slice) -> MetEntries | None:
        """What a chunk meets; None when no query of it sees any."""
        rows = slice(*self.bounds.of(chunk))
        if rows.start >= rows.stop:
            return None
        if self.index_BTN is None:
            row_G = self.row_E[rows]
            outside = (row_G < self.first_BT1[:, chunk]) | (row_G >= self.stop_BT1[:, chunk])
            return MetEntries(rows, outside, None)
        column_BCN = self.column_BTN[:, chunk]
        N = column_BCN.shape[-1]
        if rows.stop - rows.start > MASK_UP_TO * N:
            none_BCN = self.none_BTN[:, chunk]
            return MetEntries(rows, none_BCN, column_BCN.masked_fill(none_BCN, 0))
        return MetEntries(rows, self._unchosen(chunk)[..., rows], None)

    def _unchosen(self, chunk: slice) -> Tensor:
        """Which entries of the row each query did not choose; made for the chunks to come too."""
        if self.hidden_BME is None or chunk.stop > self.masked.stop:
            B, T, _ = self.column_BTN.shape
            device = self.column_BTN.device
            room = _MASK_BYTES.get(device.type, _MASK_BYTES_ELSEWHERE) // (B * (self.E + 1))
            stop = min(T, max(chunk.stop, chunk.start + room))
            self.masked = slice(chunk.start, stop)
            hidden = torch.ones(B, stop - chunk.start, self.E + 1, dtype=torch.bool, device=device)
            self.hidden_BME = hidden.scatter_(2, self.column_BTN[:, self.masked], False)
        begin = chunk.start - self.masked.start
        return self.hidden_BME[:, begin : begin + chunk.stop - chunk.start]


def _bounds(entries: EntrySet) -> Bounds:
    """The set's bounds; a set that has none is read, for which a device is waited for."""
    if entries.bounds is not None:
        return entries.bounds
    first_BT, stop_BT = entries.first_BT.cpu(), entries.stop_BT.cpu()
    sees_BT = stop_BT > first_BT
    return Bounds(
        torch.where(sees_BT, first_BT, entries.kv_BEK.shape[1]).amin(dim=0),
        torch.where(sees_BT, stop_BT, 0).amax(dim=0),
    )


def _flat(table_BEK: Tensor, index_BCN: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a batch as one table, and the rows of it that an index names."""
    B, E, K = table_BEK.shape
    flat = index_BCN + torch.arange(B, device=table_BEK.device)[:, None, None] * E
    return table_BEK.reshape(B * E, K), flat.flatten()


def take(table_BEK: Tensor, met: MetEntries) -> ChunkKeys:
    """The entries of a chunk."""
    if met.index_BCN is None:
        return ChunkKeys(table_BEK[:, met.rows], None, met.hidden_BCG, _NO_WINDOW, met)
    table, flat = _flat(table_BEK, met.index_BCN)
    gathered = table.index_select(0, flat).view(*met.index_BCN.shape, -1)
    return ChunkKeys(None, gathered, met.hidden_BCG, _NO_WINDOW, met)


def join(
    kv_BUK: Tensor, window: tuple[slice, Tensor], entries_BEK: Tensor | None, met: MetEntries | None
) -> ChunkKeys:
    """The window's keys and the entries of a chunk."""
    rows, hidden = window
    near = kv_BUK[:, rows]
    if entries_BEK is None or met is None:
        return ChunkKeys(near, None, hidden, rows, None)
    far = take(entries_BEK, met)
    shared = near if far.shared_BSK is None else torch.cat((near, far.shared_BSK), dim=1)
    hidden = torch.cat((hidden, met.hidden_BCG), dim=-1)
    return ChunkKeys(shared, far.gathered_BCNK, hidden, rows, met)


def dots_of(x_BACHK: Tensor, keys: ChunkKeys) -> Tensor:
    """``x . key`` for all keys: [B, A, C, H, G]."""
    parts = []
    if keys.shared_BSK is not None:
        flat = x_BACHK.reshape(x_BACHK.shape[0], -1, x_BACHK.shape[-1])
        dots = torch.bmm(flat, keys.shared_BSK.transpose(1, 2))
        parts.append(dots.view(*x_BACHK.shape[:-1], -1))
    if keys.gathered_BCNK is not None:
        x_BCRK = x_BACHK.transpose(1, 2).flatten(2, 3)
        dots = torch.matmul(x_BCRK, keys.gathered_BCNK.transpose(-1, -2))
        parts.append(dots.unflatten(2, (x_BACHK.shape[1], -1)).transpose(1, 2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def mix_into(out_BCHK: Tensor, p_BCHG: Tensor, keys: ChunkKeys) -> None:
    """``sum_g p key_g`` into rows of a result."""
    if keys.gathered_BCNK is not None or keys.shared_BSK is None:
        out_BCHK.copy_(mix(p_BCHG, keys))
        return
    out = out_BCHK.view(len(p_BCHG), -1, out_BCHK.shape[-1])
    torch.bmm(p_BCHG.flatten(1, 2), keys.shared_BSK, out=out)


def mix(p_BCHG: Tensor, keys: ChunkKeys) -> Tensor:
    """``sum_g p key_g``: [B, C, H, K]; of two kinds of keys in fp32."""
    B, C, H, _ = p_BCHG.shape
    if keys.shared_BSK is None:
        assert keys.gathered_BCNK is not None
        return torch.matmul(p_BCHG, keys.gathered_BCNK)
    S = keys.shared_BSK.shape[1]
    out = torch.bmm(p_BCHG[..., :S].reshape(B, C * H, S), keys.shared_BSK).view(B, C, H, -1)
    if keys.gathered_BCNK is None:
        return out
    return out.float() + torch.matmul(p_BCHG[..., S:], keys.gathered_BCNK)


def accumulate(
    grad_kv: Tensor | None, grad_entries: Tensor | None, keys: ChunkKeys, p: Tensor, x: Tensor
) -> None:
    """Add ``p^T x`` to the rows (fp32) that the keys came from; p [B, A, C, H, G], x [.., K]."""
    B, S = p.shape[0], 0
    if keys.shared_BSK is not None:
        S, W = keys.shared_BSK.shape[1], keys.window.stop - keys.window.start
        flat = p[..., :S].reshape(B, -1, S)
        part = torch.bmm(flat.transpose(1, 2), x.reshape(B, flat.shape[1], -1))
        if grad_kv is not None:
            grad_kv[:, keys.window].add_(part[:, :W])
        if S > W:
            assert grad_entries is not None
            assert keys.met is not None
            grad_entries[:, keys.met.rows].add_(part[:, W:])
    if keys.gathered_BCNK is not None:
        assert grad_entries is not None
        assert keys.met is not None
        assert keys.met.index_BCN is not None
        p_BCNR = p[..., S:].permute(0, 2, 4, 1, 3).flatten(3)
        part = torch.matmul(p_BCNR, x.transpose(1, 2).flatten(2, 3)).to(grad_entries.dtype)
        table, flat = _flat(grad_entries, keys.met.index_BCN)
        add_rows_(table, flat, part.view(-1, part.shape[-1]))


def _scaled(dots: Tensor, scale_1: Tensor) -> Tensor:
    """In fp32, by one operation: a scale with a dim promotes what is narrower."""
    return torch.mul(dots, scale_1, out=dots if dots.dtype == torch.float32 else None)


def positive(dots: Tensor, zero_1: Tensor) -> Tensor:
    """``relu`` in fp32, by one operation; fp32 dots are used up, of others the sign stays."""
    return torch.maximum(dots, zero_1, out=dots if dots.dtype == torch.float32 else None)


def masked_scores(dots_BCHG: Tensor, scale_1: Tensor, keys: ChunkKeys) -> Tensor:
    """Scaled dots in fp32, -inf for what is hidden; the dots are used up."""
    hidden = keys.hidden_BCG[:, :, None]
    return _scaled(dots_BCHG, scale_1).masked_fill_(hidden, float("-inf"))


def typical_entries(entries: EntrySet | None) -> int:
    """About how many of the entries a chunk meets."""
    if entries is None:
        return 0
    E = entries.kv_BEK.shape[1]
    if entries.index_BTN is None:
        return E
    return min(E, MASK_UP_TO * entries.index_BTN.shape[-1])
