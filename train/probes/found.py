"""Whether each layer looks where an answer stands, and whether its indexer chose that place."""

# Legend: B rows, T tokens, H heads, K head dim, E entries, N chosen entries
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.attention.core import WindowAttention
from model.config import IndexerPhase, LayerKind
from model.kernels.attention import AttentionResult, EntrySet, entry_mask
from model.transformer import DeepSeekV4
from train.probes.attention import watching
from train.probes.question import Question


@torch.no_grad()
def answers_found(model: DeepSeekV4, asked: Sequence[Question]) -> list[dict[str, Any]]:
    """One record a layer, of the token that predicts the answer.

    Args:
        model: in the state it is to be probed in.
        asked: questions whose ``distance`` leads to one token.

    Returns:
        Of each layer ``layer``, ``kind``, ``window`` and ``entries``: the attention on that token
        in the window, and on the entries that its block is part of (an overlapping entry reads the
        block before its own too), means over heads and questions; ``fair``: what those entries
        would get if all visible entries got as much; where an indexer chose, ``chosen``: the
        fraction of questions in which one of them was chosen, and ``by_chance``: that fraction for
        as many choices by lot.
    """
    found: dict[str, list[dict[str, float]]] = {}
    kinds: dict[str, str] = {}
    place = 0

    def look(attn: WindowAttention, args: tuple[Any, ...], result: AttentionResult) -> None:
        kinds[attn.name] = LayerKind(attn.kind).value
        found.setdefault(attn.name, []).append(_found(attn, args, result, place))

    with watching(model, look):
        for q in asked:
            ids_BT = torch.from_numpy(q.ids_N[None, : q.begin]).to(model.embed.weight.device)
            place = q.begin - 1 - q.distance
            context = model.context(torch.zeros(ids_BT.shape, dtype=torch.int64))
            context.phase = IndexerPhase.sparse
            model.trunk(model.streams(ids_BT), ids_BT, context)
    return [
        {"layer": name, "kind": kinds[name]}
        | {key: sum(one[key] for one in some) / len(some) for key in some[0]}
        for name, some in found.items()
    ]


def _found(
    attn: WindowAttention, args: tuple[Any, ...], result: AttentionResult, place: int
) -> dict[str, float]:
    q_BTHK, kv_BTK, _, _, window, entries = args
    last = q_BTHK.shape[1] - 1
    q_HK, lse_H = q_BTHK[0, last].float(), result.lse_BTH[0, last].float()

    def mass(keys_EK: Tensor) -> float:
        score_HE = q_HK @ keys_EK.float().T * q_BTHK.shape[-1] ** -0.5
        return float((score_HE - lse_H[:, None]).exp().sum(1).mean())

    near = place > last - window
    found = {"window": mass(kv_BTK[0, place : place + 1]) if near else 0.0}
    if entries is None:
        return found
    block = place // getattr(attn, "ratio", 1)
    ours = [block, block + 1] if LayerKind(attn.kind) is LayerKind.csa else [block]
    at = slice(last, last + 1)
    visible_E = entry_mask(EntrySet(entries.kv_BEK, *_range(entries, at)))[0, 0]
    ours = [e for e in ours if e < len(visible_E) and visible_E[e]]
    used_E = visible_E
    if entries.index_BTN is not None:
        index_BTN = entries.index_BTN[:, at]
        used_E = entry_mask(EntrySet(entries.kv_BEK, *_range(entries, at), index_BTN))[0, 0]
    hit = [e for e in ours if used_E[e]]
    n, chosen = int(visible_E.sum()), int(used_E.sum())
    found |= {
        "entries": mass(entries.kv_BEK[0, hit]) if hit else 0.0,
        "fair": len(ours) / max(n, 1),
    }
    if entries.index_BTN is not None:
        missed = 1.0
        for taken in range(len(ours)):  # none of ours among the chosen, drawn one by one
            missed *= max(0, n - chosen - taken) / (n - taken)
        found |= {"chosen": float(bool(hit)), "by_chance": 1 - missed}
    return found


def _range(entries: EntrySet, at: slice) -> tuple[Tensor, Tensor]:
    return entries.first_BT[:, at], entries.stop_BT[:, at]
