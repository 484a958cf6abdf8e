"""Attention over a sliding window and compressed entries: the plain reference (reference B.3).

Keys are values (one shared KV head). Window tokens and entries share ONE softmax, whose denominator
also holds a learned sink per head. The reference forms every score; ``attention_fast.py`` never
holds more than a chunk of queries.
"""

# Legend: B rows, T tokens, U window keys, H heads, K head dim, E entries, N chosen entries
from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.sequence_plan import Bounds


@dataclass(frozen=True)
class EntrySet:
    """Compressed entries and which of them each query may use.

    Attributes:
        kv_BEK: the entries.
        first_BT: first visible entry of each query.
        stop_BT: one past the last visible entry.
        index_BTN: the indexer's choice among the visible (distinct, -1 = none), or None for all
            visible.
        bounds: of first and stop, on the host; None: read from them where they are needed.
    """

    kv_BEK: Tensor
    first_BT: Tensor
    stop_BT: Tensor
    index_BTN: Tensor | None = None
    bounds: Bounds | None = None


class AttentionResult(NamedTuple):
    """What attention gives back.

    Attributes:
        o_BTHK: weighted values, dtype of q.
        lse_BTH: log of the full denominator (window, sink and entries), fp32, no gradient.
        mass_BTN: probability of every chosen entry summed over heads, fp32, no gradient; None
            where all visible entries are used, or where the implementation does not give it.
    """

    o_BTHK: Tensor
    lse_BTH: Tensor
    mass_BTN: Tensor | None = None


def window_mask(start_BT: Tensor, window: int, num_keys: int) -> Tensor:
    """[B, T, U] bool: key u is in the document of query t and among its last ``window`` tokens."""
    T = start_BT.shape[1]
    row_U = torch.arange(num_keys, device=start_BT.device)
    query_T = row_U[num_keys - T :]
    lowest_BT = torch.maximum(start_BT, query_T - (window - 1))
    return (row_U >= lowest_BT[..., None]) & (row_U <= query_T[:, None])


def entry_mask(entries: EntrySet) -> Tensor:
    """[B, T, E] bool: entry e is used by query t."""
    E = entries.kv_BEK.shape[1]
    if entries.index_BTN is None:
        row_E = torch.arange(E, device=entries.first_BT.device)
        return (row_E >= entries.first_BT[..., None]) & (row_E < entries.stop_BT[..., None])
    B, T, _ = entries.index_BTN.shape
    used = torch.zeros(B, T, E + 1, dtype=torch.bool, device=entries.index_BTN.device)
    return used.scatter(2, torch.where(entries.index_BTN < 0, E, entries.index_BTN), True)[..., :E]


def attention_reference(
    q_BTHK: Tensor,
    kv_BUK: Tensor,
    sink_H: Tensor,
    start_BT: Tensor,
    window: int,
    entries: EntrySet | None,
) -> AttentionResult:
    """One softmax over window tokens, entries and the sink.

    Args:
        q_BTHK: rotated queries.
        kv_BUK: rotated window keys, which are the values too; the last T of them are of the
            queries' own tokens, those in front of tokens before (a shard of a row).
        sink_H: sink logits.
        start_BT: first of these keys that each query may see.
        window: tokens of the window, the query's own included.
        entries: compressed entries, or None in a window-only layer.
    """
    keys_BNK, mask_BTN = kv_BUK, window_mask(start_BT, window, kv_BUK.shape[1])
    if entries is not None:
        keys_BNK = torch.cat((kv_BUK, entries.kv_BEK), dim=1)
        mask_BTN = torch.cat((mask_BTN, entry_mask(entries)), dim=2)
    scores_BTHN = (
        torch.einsum("bthk,bnk->bthn", q_BTHK, keys_BNK).float() * q_BTHK.shape[-1] ** -0.5
    )
    scores_BTHN = scores_BTHN.masked_fill(~mask_BTN[:, :, None], float("-inf"))
    sink_BTH1 = sink_H.float().expand(scores_BTHN.shape[:3])[..., None]
    lse_BTH = torch.cat((scores_BTHN, sink_BTH1), dim=-1).logsumexp(dim=-1)
    p_BTHN = (scores_BTHN - lse_BTH[..., None]).exp()
    o_BTHK = torch.einsum("bthn,bnk->bthk", p_BTHN.to(q_BTHK.dtype), keys_BNK)
    return AttentionResult(o_BTHK, lse_BTH.detach())
