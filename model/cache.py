"""The compressed cache of texts that are being decoded (reference B.3 to B.7, paper 2.3).

A layer keeps the last ``sliding_window`` KV rows in a ring; a CSA or HCA layer its compressed
entries and, of the blocks that are not complete, what each token would add to an entry (under
overlap also the block before, which the next entry reads); a CSA layer the same of its indexer.

A pass over new tokens reads the cache and hands attention the same op as in training: the new
tokens are its window keys, cached rows and entries its entry set. A pass writes nothing that it
could not take back; :meth:`KVCache.commit` then keeps a prefix of it, so that drafts of speculative
decoding and the padding of unequal prompts leave no trace. How a row lies in memory is the business
of a :class:`RowFormat`; quantised ones are handed in from outside (``quant/cache_rows.py``).
"""

# Legend: B rows, T tokens of a pass, D hidden, Q query latent, H heads, K row dim, S slots, X width
# of a stored row, E entries, M tokens of a block, R slots of open tokens, C channels of a
# compressor, N chosen keys
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from model.attention.compressor import Compressor
from model.attention.core import WindowAttention
from model.attention.csa import CompressedSparseAttention
from model.attention.hca import HeavilyCompressedAttention
from model.config import LayerKind, ModelConfig
from model.context import ForwardContext, RopeTable
from model.errors import ConfigError
from model.kernels.attention import EntrySet
from model.rope import rope_frequencies, rope_tables
from model.sequence_plan import SequencePlan, SequenceShard


class RowFormat(Protocol):
    """How rows of a cache are stored.

    Attributes:
        dtype: of the stored elements.
    """

    dtype: torch.dtype

    def width(self, dim: int) -> int:
        """Stored elements of a row of ``dim`` channels."""
        ...

    def encode(self, x_NK: Tensor) -> Tensor:
        """Rows [N, K] as stored: [N, width(K)]."""
        ...

    def decode(self, rows_X: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        """Values [..., dim] of stored rows [..., X]."""
        ...


class PlainRows:
    """Rows as they are, in the compute dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def width(self, dim: int) -> int:
        """One element a channel."""
        return dim

    def encode(self, x_NK: Tensor) -> Tensor:
        """Rounded to the dtype."""
        return x_NK.to(self.dtype)

    def decode(self, rows_X: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        """Read as ``dtype``."""
        return rows_X.to(dtype)


@dataclass(frozen=True)
class CacheFormats:
    """Formats of the rows that every layer keeps.

    Attributes:
        kv: window rows and compressed entries.
        index: the indexer's keys.
    """

    kv: RowFormat
    index: RowFormat


class RowStore:
    """``slots`` stored rows for every row of the batch."""

    def __init__(
        self, batch: int, slots: int, dim: int, fmt: RowFormat, device: torch.device
    ) -> None:
        self.dim, self.fmt = dim, fmt
        self.rows_BSX = torch.zeros(batch, slots, fmt.width(dim), dtype=fmt.dtype, device=device)

    def write(self, x_BNK: Tensor, slot_BN: Tensor, valid_BN: Tensor) -> None:
        """Store the valid rows; their slots differ within a batch row."""
        batch_N, place_N = valid_BN.nonzero(as_tuple=True)
        if batch_N.numel():
            rows_NX = self.fmt.encode(x_BNK[batch_N, place_N])
            self.rows_BSX[batch_N, slot_BN[batch_N, place_N]] = rows_NX

    def read(self, count: int, dtype: torch.dtype) -> Tensor:
        """The first ``count`` rows [B, count, K]."""
        return self.fmt.decode(self.rows_BSX[:, :count], self.dim, dtype)

    def take(self, index_BN: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows by number [B, N, K]; any row where the number is negative."""
        row_B = torch.arange(index_BN.shape[0], device=index_BN.device)[:, None]
        return self.fmt.decode(self.rows_BSX[row_B, index_BN.clamp(min=0)], self.dim, dtype)


@dataclass(frozen=True)
class _Blocks:
    """Blocks of one ratio that a pass completes, padded to a common count E.

    Attributes:
        lead: blocks at the front that are read only as the one before (0 or 1).
        source_BEM: where each token lies in (open slots, tokens of the pass).
        has_previous_BE: not the text's first block.
        number_BE: entry that the block becomes.
        complete_BE: to be stored.
        rope: at the block's first token.
    """

    lead: int
    source_BEM: Tensor
    has_previous_BE: Tensor
    number_BE: Tensor
    complete_BE: Tensor
    rope: RopeTable


@dataclass
class Pass:
    """Where the tokens of one pass stand; shared by all layers.

    Attributes:
        lengths: tokens committed before, for every row.
        counts: tokens of the pass, for every row; the rest is padding.
        position_BT: of each token in its text.
        start_BT: first token of the pass that a query sees; one past itself for padding.
        valid_BT: not padding.
        frequencies: RoPE of the compressed layers.
    """

    lengths: list[int]
    counts: list[int]
    position_BT: Tensor
    start_BT: Tensor
    valid_BT: Tensor
    frequencies_R: Tensor
    blocks: dict[tuple[int, bool], _Blocks | None] = field(default_factory=dict)

    def column(self, counts: list[int]) -> Tensor:
        """One number for every row, as [B, 1] beside the positions."""
        return torch.tensor(counts, device=self.position_BT.device)[:, None]

    def num_entries(self, ratio: int) -> int:
        """Entries that the longest text has at the end of the pass."""
        ends = zip(self.lengths, self.counts, strict=True)
        return max((length + count) // ratio for length, count in ends)

    def ring_index(self, slots: int) -> Tensor:
        """[B, T, slots]: the slot where the row in it is in the query's window, else -1."""
        slot_S = torch.arange(slots, device=self.position_BT.device)
        last_B1 = self.column(self.lengths) - 1
        held_BS = last_B1 - (last_B1 - slot_S) % slots  # newest committed position of that slot
        age_BTS = self.position_BT[..., None] - held_BS[:, None]
        return torch.where((held_BS[:, None] >= 0) & (age_BTS < slots), slot_S, -1)

    def blocks_of(self, compressor: Compressor) -> _Blocks | None:
        """What ``compressor`` can complete now; None where that is nothing."""
        key = (compressor.ratio, compressor.overlap)
        if key not in self.blocks:
            self.blocks[key] = self._complete(*key)
        return self.blocks[key]

    def _complete(self, ratio: int, overlap: bool) -> _Blocks | None:
        ends = zip(self.lengths, self.counts, strict=True)
        most = max((length + count) // ratio - length // ratio for length, count in ends)
        if not most:
            return None
        device, T = self.position_BT.device, self.position_BT.shape[1]
        length_B1, lead = self.column(self.lengths), int(overlap)
        count_B1 = self.column(self.counts)
        number_BE = length_B1 // ratio + torch.arange(-lead, most, device=device)
        position_BEM = number_BE[..., None] * ratio + torch.arange(ratio, device=device)
        slots, length_B11 = ratio * (1 + lead), length_B1[..., None]
        in_pass = slots + (position_BEM - length_B11).clamp(max=T - 1)
        first = (number_BE * ratio).clamp(min=0)
        return _Blocks(
            lead=lead,
            source_BEM=torch.where(position_BEM < length_B11, position_BEM % slots, in_pass),
            has_previous_BE=number_BE > 0,
            number_BE=number_BE,
            complete_BE=(number_BE + 1) * ratio <= length_B1 + count_B1,
            rope=rope_tables(first, self.frequencies_R),
        )


def _newest(step: Pass, counts: list[int], slots: int) -> Tensor:
    """[B, T] bool: among the first ``counts`` tokens the last ``slots``, which differ modulo it."""
    token_T = torch.arange(step.position_BT.shape[1], device=step.position_BT.device)
    count_B1 = step.column(counts)
    return (token_T < count_B1) & (token_T >= count_B1 - slots)


class EntryCache:
    """Entries of one compressor, and its projections of tokens whose block is open."""

    def __init__(
        self,
        compressor: Compressor,
        batch: int,
        max_tokens: int,
        fmt: RowFormat,
        device: torch.device,
    ) -> None:
        self.compressor = compressor
        ratio, channels = compressor.ratio, compressor.wkv.out_features
        self.entries = RowStore(batch, max_tokens // ratio, compressor.dim, fmt, device)
        open_slots = ratio * (1 + compressor.overlap)
        self.open_k_BRC = torch.zeros(batch, open_slots, channels, device=device)
        self.open_z_BRC = torch.zeros_like(self.open_k_BRC)
        self._new: tuple[Tensor, Tensor] | None = None

    def extend(self, u_BTD: Tensor, step: Pass) -> None:
        """Project the new tokens and store every entry whose block is complete.

        An entry of tokens that are not committed later is written again when its block is.
        """
        k_BTC, z_BTC = self._new = self.compressor.project(u_BTD)
        blocks = step.blocks_of(self.compressor)
        if blocks is None:
            return
        row_B = torch.arange(u_BTD.shape[0], device=u_BTD.device)[:, None, None]
        k_BEMC = torch.cat((self.open_k_BRC, k_BTC), dim=1)[row_B, blocks.source_BEM]
        z_BEMC = torch.cat((self.open_z_BRC, z_BTC), dim=1)[row_B, blocks.source_BEM]
        entries_BEK = self.compressor.compress(
            k_BEMC, z_BEMC, blocks.has_previous_BE, blocks.rope, u_BTD.dtype
        )
        kept = slice(blocks.lead, None)
        self.entries.write(
            entries_BEK[:, kept], blocks.number_BE[:, kept], blocks.complete_BE[:, kept]
        )

    def commit(self, step: Pass, counts: list[int]) -> None:
        """Keep the projections of the first ``counts`` tokens of each row."""
        assert self._new is not None
        slots = self.open_k_BRC.shape[1]
        batch_N, token_N = _newest(step, counts, slots).nonzero(as_tuple=True)
        slot_N = step.position_BT[batch_N, token_N] % slots
        self.open_k_BRC[batch_N, slot_N] = self._new[0][batch_N, token_N]
        self.open_z_BRC[batch_N, slot_N] = self._new[1][batch_N, token_N]
        self._new = None


class LayerCache:
    """Everything one attention layer keeps."""

    def __init__(
        self,
        layer: WindowAttention,
        batch: int,
        max_tokens: int,
        formats: CacheFormats,
        device: torch.device,
    ) -> None:
        self.layer = layer
        slots = max_tokens if layer.kind is LayerKind.dense else min(layer.window, max_tokens)
        self.ring = RowStore(batch, slots, layer.head_dim, formats.kv, device)
        self.slots = slots
        self.core: EntryCache | None = None
        self.keys: EntryCache | None = None
        if isinstance(layer, CompressedSparseAttention | HeavilyCompressedAttention):
            self.core = EntryCache(layer.compressor, batch, max_tokens, formats.kv, device)
        if isinstance(layer, CompressedSparseAttention):
            indexer = layer.indexer.compressor
            self.keys = EntryCache(indexer, batch, max_tokens, formats.index, device)
        self._new: Tensor | None = None

    def attend(
        self,
        u_BTD: Tensor,
        q_latent_BTQ: Tensor,
        q_BTHK: Tensor,
        kv_BTK: Tensor,
        step: Pass,
        rope: RopeTable,
    ) -> Tensor:
        """Weighted values [B, T, H, K] over the cache and the tokens of the pass."""
        self._new = kv_BTK
        tables: list[Tensor] = []
        indices: list[Tensor] = []
        if any(step.lengths):
            tables.append(self.ring.read(self.slots, kv_BTK.dtype))
            indices.append(step.ring_index(self.slots))
        for cache in (self.core, self.keys):
            if cache is not None:
                cache.extend(u_BTD, step)
        if self.core is not None and step.num_entries(self.core.compressor.ratio):
            index_BTN = self._choose(u_BTD, q_latent_BTQ, step, rope)
            table_BEK, index_BTN = self._entries(index_BTN, step, kv_BTK.dtype)
            shift = tables[0].shape[1] if tables else 0
            indices.append(torch.where(index_BTN < 0, -1, index_BTN + shift))
            tables.append(table_BEK)
        past = None
        if tables:
            table_BEK, index_BTN = torch.cat(tables, dim=1), torch.cat(indices, dim=2)
            zeros_BT = torch.zeros_like(step.position_BT)
            past = EntrySet(table_BEK, zeros_BT, zeros_BT + table_BEK.shape[1], index_BTN)
        layer = self.layer
        result = layer._attention(q_BTHK, kv_BTK, layer.attn_sink, step.start_BT, self.slots, past)
        return result.o_BTHK

    def commit(self, step: Pass, counts: list[int]) -> None:
        """Keep the first ``counts`` tokens of each row."""
        assert self._new is not None
        keep_BT = _newest(step, counts, self.slots)
        self.ring.write(self._new, step.position_BT % self.slots, keep_BT)
        self._new = None
        for cache in (self.core, self.keys):
            if cache is not None:
                cache.commit(step, counts)

    def _choose(self, u_BTD: Tensor, q_latent_BTQ: Tensor, step: Pass, rope: RopeTable) -> Tensor:
        """Entries of each query [B, T, N], -1 for none: the indexer's choice, or all visible."""
        assert self.core is not None
        ratio = self.core.compressor.ratio
        num_entries = step.num_entries(ratio)
        stop_BT = torch.where(step.valid_BT, (step.position_BT + 1) // ratio, 0)
        if not isinstance(self.layer, CompressedSparseAttention):
            row_E = torch.arange(num_entries, device=stop_BT.device)
            return torch.where(row_E < stop_BT[..., None], row_E, -1)
        assert self.keys is not None
        q_BTJL, w_BTJ = self.layer.indexer(u_BTD, q_latent_BTQ, rope)
        k_BEL = self.keys.entries.read(num_entries, q_BTJL.dtype)
        first_BT = torch.zeros_like(stop_BT)
        return self.layer._index_topk((q_BTJL, k_BEL, w_BTJ), first_BT, stop_BT, self.layer.topk)

    def _entries(self, index_BTN: Tensor, step: Pass, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A table of entries, and the choice as its rows; of one query only what it chose."""
        assert self.core is not None
        store, num_entries = self.core.entries, step.num_entries(self.core.compressor.ratio)
        if index_BTN.shape[1] > 1 or index_BTN.shape[2] == num_entries:
            return store.read(num_entries, dtype), index_BTN
        row_N = torch.arange(index_BTN.shape[2], device=index_BTN.device)
        return store.take(index_BTN[:, 0], dtype), torch.where(index_BTN < 0, -1, row_N)


class KVCache:
    """The caches of several layers that see the same tokens.

    Args:
        config: the model.
        layers: attention layers by name.
        batch: texts.
        max_tokens: longest text.
        formats: of the stored rows.
        device: where the model computes.
        yarn: as ``model.yarn``.

    Attributes:
        lengths: committed tokens of each text.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: Mapping[str, WindowAttention],
        batch: int,
        max_tokens: int,
        formats: CacheFormats,
        device: torch.device,
        yarn: bool,
    ) -> None:
        self.max_tokens, self.device = max_tokens, device
        self.lengths = [0] * batch
        self.layers = {
            name: LayerCache(layer, batch, max_tokens, formats, device)
            for name, layer in layers.items()
        }
        self._window_R = rope_frequencies(config, compressed=False)
        self._compressed_R = rope_frequencies(config, compressed=True, yarn=yarn)
        self._pass: Pass | None = None
        self._rope: RopeTable | None = None

    def begin(self, counts: list[int], width: int) -> ForwardContext:
        """Context of a pass over ``width`` tokens a row, the first ``counts`` of which are real.

        Raises:
            ValueError: a text would outgrow the cache.
        """
        for length, count in zip(self.lengths, counts, strict=True):
            if length + count > self.max_tokens:
                raise ConfigError(
                    f"a text of {length} + {count} tokens does not fit a cache of"
                    f" max_tokens={self.max_tokens}"
                )
        token_T = torch.arange(width, device=self.device)
        length_B1 = torch.tensor(self.lengths, device=self.device)[:, None]
        count_B1 = torch.tensor(counts, device=self.device)[:, None]
        valid_BT = token_T < count_B1
        position_BT = length_B1 + token_T
        start_BT = torch.where(valid_BT, 0, token_T + 1)
        plan = SequencePlan(
            valid_BT=valid_BT,
            position_BT=position_BT,
            start_BT=start_BT,
            row_start_BT=start_BT,
            document_BT=torch.arange(len(counts), device=self.device)[:, None].expand(-1, width),
            length_BT=(length_B1 + count_B1).expand(-1, width),
            num_documents=len(counts),
            compressed={},
            shard=SequenceShard(),
            row_tokens=width,
        )
        self._rope = rope_tables(position_BT, self._compressed_R)
        self._pass = Pass(
            list(self.lengths), counts, position_BT, start_BT, valid_BT, self._compressed_R
        )
        window_rope = rope_tables(position_BT, self._window_R)
        return ForwardContext(plan, window_rope, self._rope, {}, past=self)

    def attend(
        self,
        layer: WindowAttention,
        u_BTD: Tensor,
        q_latent_BTQ: Tensor,
        q_BTHK: Tensor,
        kv_BTK: Tensor,
    ) -> Tensor:
        """See :class:`model.context.Past`."""
        assert self._pass is not None
        assert self._rope is not None
        cache = self.layers[layer.name]
        return cache.attend(u_BTD, q_latent_BTQ, q_BTHK, kv_BTK, self._pass, self._rope)

    def commit(self, counts: list[int]) -> None:
        """Keep the first ``counts`` tokens of each row of the last pass, and forget the others."""
        assert self._pass is not None
        for cache in self.layers.values():
            cache.commit(self._pass, counts)
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
        self._pass = None
