"""Where each layer's attention goes: window, sink, entries by distance; and whom the indexer finds.

One document is read in one pass without a cache. Around each layer's attention kernel its inputs
are looked at for some queries, and the probabilities formed again from them: with the denominator
that the kernel gave, so that window, sink and entries add up to 1 (which is checked).
"""

# Legend: B rows, T tokens, P looked-at queries, H heads, K head dim, E entries, N chosen, D
# distances
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from model.attention.core import WindowAttention
from model.block import Block
from model.config import IndexerPhase, LayerKind
from model.kernels.attention import AttentionResult, EntrySet, entry_mask
from model.transformer import DeepSeekV4
from train.errors import TrainingFailedError

QUERIES = 64  # looked at, evenly spread over the document's second half
_OFF = 2e-2  # by which probabilities may miss 1: bf16 rounds each of them


@torch.no_grad()
def attention_by_distance(
    model: DeepSeekV4, ids_T: Tensor, distances: Sequence[int]
) -> list[dict[str, Any]]:
    """One record a layer.

    Args:
        model: in the state it is to be probed in.
        ids_T: a document.
        distances: beginnings of the buckets, ascending: tokens between a query and the last token
            of an entry.

    Returns:
        Of each layer ``layer``, ``kind``, ``window`` and ``sink`` (fractions of the attention, mean
        over heads and queries), ``entries`` (bucket -> fraction) and, where an indexer chose,
        ``recall`` (bucket -> fraction of the entries with the largest attention over all visible
        ones, as many as were chosen, that it chose) and ``recall_queries``.
    """
    ids_BT = ids_T[None].to(model.embed.weight.device)
    context = model.context(torch.zeros(ids_BT.shape, dtype=torch.int64))
    context.phase = IndexerPhase.sparse
    found: list[dict[str, Any]] = []

    def look(attn: WindowAttention, args: tuple[Any, ...], result: AttentionResult) -> None:
        found.append(_record(attn, args, result, distances))

    with watching(model, look):
        model.trunk(model.streams(ids_BT), ids_BT, context)
    return found


@contextmanager
def watching(
    model: DeepSeekV4,
    look: Callable[[WindowAttention, tuple[Any, ...], AttentionResult], None],
) -> Iterator[None]:
    """Call ``look`` with the inputs and the result of every layer's attention kernel."""
    blocks = [block for block in model.layers.values() if isinstance(block, Block)]
    layers = [block.attn for block in blocks if isinstance(block.attn, WindowAttention)]
    kernels = [attn._attention for attn in layers]

    def watched(attn: WindowAttention, kernel: Any) -> Any:
        def run(*args: Any) -> AttentionResult:
            result = kernel(*args)
            look(attn, args, result)
            return result

        return run

    for attn, kernel in zip(layers, kernels, strict=True):
        attn._attention = watched(attn, kernel)
    try:
        yield
    finally:
        for attn, kernel in zip(layers, kernels, strict=True):
            attn._attention = kernel


def _record(
    attn: WindowAttention, args: tuple[Any, ...], result: AttentionResult, distances: Sequence[int]
) -> dict[str, Any]:  # fmt: skip
    q_BTHK, kv_BTK, sink_H, start_BT, window, entries = args
    T, H = q_BTHK.shape[1], q_BTHK.shape[2]
    pick_P = torch.linspace(T // 2, T - 1, min(QUERIES, T - T // 2)).long().to(q_BTHK.device)
    q_PHK, lse_PH = q_BTHK[0, pick_P].float(), result.lse_BTH[0, pick_P].float()
    scale = q_BTHK.shape[-1] ** -0.5

    def mass(keys_EK: Tensor, used_PE: Tensor) -> Tensor:
        score_PHE = torch.einsum("phk,ek->phe", q_PHK, keys_EK.float()) * scale
        p_PHE = (score_PHE - lse_PH[..., None]).exp().masked_fill(~used_PE[:, None], 0.0)
        return p_PHE.sum(1) / H

    row_T = torch.arange(T, device=pick_P.device)
    low_P = torch.maximum(start_BT[0, pick_P], pick_P - (window - 1))
    seen_PT = (row_T >= low_P[:, None]) & (row_T <= pick_P[:, None])
    total_P = mass(kv_BTK[0], seen_PT).sum(1)
    sink_P = (sink_H.float() - lse_PH).exp().mean(1)
    record: dict[str, Any] = {
        "layer": attn.name, "kind": LayerKind(attn.kind).value,
        "window": float(total_P.mean()), "sink": float(sink_P.mean()), "entries": {},
    }  # fmt: skip
    total_P = total_P + sink_P
    if entries is not None:
        ratio, num_entries = getattr(attn, "ratio", 0), entries.kv_BEK.shape[1]
        last_E = torch.arange(1, num_entries + 1, device=pick_P.device) * ratio - 1
        edges_D = torch.tensor(list(distances), device=pick_P.device)
        bucket_PE = torch.bucketize(pick_P[:, None] - last_E, edges_D, right=True) - 1
        used_PE = entry_mask(_some(entries, pick_P))[0]
        mass_PE = mass(entries.kv_BEK[0], used_PE)
        total_P = total_P + mass_PE.sum(1)
        record["entries"] = _by_bucket(mass_PE / len(pick_P), bucket_PE, distances)
        if entries.index_BTN is not None:
            everything = EntrySet(entries.kv_BEK, entries.first_BT, entries.stop_BT)
            visible_PE = entry_mask(_some(everything, pick_P))[0]
            full_PE = mass(entries.kv_BEK[0], visible_PE)
            record |= _recall(full_PE, visible_PE, used_PE, bucket_PE, distances)
    off = float((total_P - 1).abs().max())
    if not off < _OFF:
        raise TrainingFailedError(
            f"{attn.name}: window, sink and entries hold {1 + off:.4f} of the attention, not 1"
        )
    return record


def _recall(
    full_PE: Tensor, visible_PE: Tensor, chosen_PE: Tensor, bucket_PE: Tensor,
    distances: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """How many of the entries with the largest full scores were chosen, where some were not."""
    wanted_P = chosen_PE.sum(1)
    acts_P = visible_PE.sum(1) > wanted_P
    rank_PE = full_PE.masked_fill(~visible_PE, -1.0).argsort(1, descending=True).argsort(1)
    best_PE = (rank_PE < wanted_P[:, None]) & visible_PE & acts_P[:, None]
    wanted = _by_bucket(best_PE.float(), bucket_PE, distances)
    got = _by_bucket((best_PE & chosen_PE).float(), bucket_PE, distances)
    return {
        "recall": {name: got[name] / n for name, n in wanted.items() if n},
        "recall_queries": int(acts_P.sum()),
    }


def _some(entries: EntrySet, pick_P: Tensor) -> EntrySet:
    index = entries.index_BTN
    return EntrySet(
        entries.kv_BEK, entries.first_BT[:, pick_P], entries.stop_BT[:, pick_P],
        None if index is None else index[:, pick_P],
    )  # fmt: skip


def _by_bucket(value_PE: Tensor, bucket_PE: Tensor, distances: Sequence[int]) -> dict[str, float]:
    """Sums over the entries of each bucket, by its beginning."""
    return {
        str(begin): float(value_PE.masked_fill(bucket_PE != place, 0.0).sum())
        for place, begin in enumerate(distances)
    }
