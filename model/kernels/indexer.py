"""The lightning indexer's scores, choice and loss: the plain reference (reference B.7, B.8).

    I[t, i] = sum_h w[t, h] * relu(q[t, h] . k[i])

The choice carries no gradient. The loss is KL(teacher || softmax(I)) over the set S_t of entries
that attention used: all visible ones in the phases ``full`` and ``warmup``, the chosen ones in
``sparse``. The teacher is the attention probability formed with the FULL denominator (window, sink
and entries), summed over heads, then normalised over S_t.
"""

# Legend: B rows, T tokens, H attention heads, K head dim, J indexer heads, L indexer head dim, E
# entries, N chosen
from __future__ import annotations

import torch
from torch import Tensor

from model.kernels.attention import EntrySet, entry_mask
from model.sequence_plan import Bounds

# The indexer's inputs: rotated (and cast) queries, keys, and per-head weights with both constant
# factors applied.
IndexerInputs = tuple[Tensor, Tensor, Tensor]


def index_scores(q_BTJL: Tensor, k_BEL: Tensor, w_BTJ: Tensor) -> Tensor:
    """All scores [B, T, E] in fp32."""
    dots_BTJE = torch.einsum("btjl,bel->btje", q_BTJL, k_BEL).float()
    return torch.einsum("btje,btj->bte", dots_BTJE.relu(), w_BTJ.float())


def ranked(scores: Tensor, visible: Tensor) -> Tensor:
    """The scores as the choice sees them: -inf for what is not visible, and for nothing else.

    A visible -inf counts as the lowest finite score and NaN stays, which ``topk`` takes for the
    highest: what is not finite is chosen and reaches the loss, it does not vanish from both.
    """
    lowest = torch.finfo(scores.dtype).min
    return scores.clamp(min=lowest).masked_fill(~visible, float("-inf"))


@torch.no_grad()
def index_topk_reference(
    indexer: IndexerInputs,
    first_BT: Tensor,
    stop_BT: Tensor,
    topk: int,
    bounds: Bounds | None = None,
) -> Tensor:
    """The ``topk`` visible entries with the highest scores.

    Args:
        indexer: (q_BTJL, k_BEL, w_BTJ).
        first_BT: first visible entry.
        stop_BT: one past the last visible entry.
        topk: entries to choose.
        bounds: of first and stop, on the host, for implementations in chunks.

    Returns:
        [B, T, min(topk, E)] int64, -1 where fewer are visible; unordered.
    """
    scores_BTE = index_scores(*indexer)
    E = scores_BTE.shape[-1]
    row_E = torch.arange(E, device=scores_BTE.device)
    visible_BTE = (row_E >= first_BT[..., None]) & (row_E < stop_BT[..., None])
    values, index_BTN = ranked(scores_BTE, visible_BTE).topk(min(topk, E), dim=-1)
    return torch.where(values == float("-inf"), -1, index_BTN)


def indexer_loss_reference(
    indexer: IndexerInputs,
    q_BTHK: Tensor,
    lse_BTH: Tensor,
    entries: EntrySet,
    mass_BTN: Tensor | None = None,
) -> Tensor:
    """Sum over queries of the KL divergence in nats; gradient to the indexer's inputs only.

    Args:
        indexer: (q_BTJL, k_BEL, w_BTJ).
        q_BTHK: attention's rotated queries.
        lse_BTH: attention's log denominators.
        entries: the entries attention used; queries that see none add 0.
        mass_BTN: attention's probability of every chosen entry, where it gave one; formed again
            from q and lse here.
    """
    mask_BTE = entry_mask(entries)
    with torch.no_grad():
        scores_BTHE = (
            torch.einsum("bthk,bek->bthe", q_BTHK, entries.kv_BEK).float()
            * q_BTHK.shape[-1] ** -0.5
        )
        mass_BTE = (scores_BTHE - lse_BTH[..., None]).exp().sum(dim=2).masked_fill(~mask_BTE, 0.0)
        teacher_BTE = mass_BTE / mass_BTE.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    sees_BT = mask_BTE.any(dim=-1)
    student_BTE = index_scores(*indexer).masked_fill(~mask_BTE, float("-inf"))
    student_BTE = torch.where(sees_BT[..., None], student_BTE, 0.0).log_softmax(dim=-1)
    kl_BTE = torch.xlogy(teacher_BTE, teacher_BTE) - teacher_BTE * student_BTE.masked_fill(
        ~mask_BTE, 0.0
    )
    return torch.where(sees_BT, kl_BTE.sum(dim=-1), 0.0).sum()


@torch.no_grad()
def indexer_monitors(
    indexer: IndexerInputs,
    q_BTHK: Tensor,
    lse_BTH: Tensor,
    entries: EntrySet,
    topk: int,
    pick: Tensor,
) -> dict[str, Tensor]:
    """How good the choice is, on those of the picked queries that see more than ``topk`` entries.

    Returns:
        ``captured_mass``: share of the teacher's mass over all visible entries that the indexer's
            top-k holds;
        ``recall``: share of the teacher's own top-k among them; ``leaves_out``: share of all
            queries whose top-k
        leaves visible entries out. Each as ``.sum`` and ``.count``.
    """
    visible_BT = entries.stop_BT - entries.first_BT
    acts_BT = visible_BT > topk
    result = {
        "leaves_out.sum": acts_BT.sum().float(),
        "leaves_out.count": (visible_BT > 0).sum().float(),
    }
    pick = pick.to(q_BTHK.device, non_blocking=True)
    first, stop, acts_BP = entries.first_BT[:, pick], entries.stop_BT[:, pick], acts_BT[:, pick]
    all_visible = EntrySet(entries.kv_BEK, first, stop)
    mask_BPE = entry_mask(all_visible)
    q_JL, k_BEL, w_J = indexer
    E = k_BEL.shape[1]
    scores = (
        torch.einsum("bphk,bek->bphe", q_BTHK[:, pick], entries.kv_BEK).float()
        * q_BTHK.shape[-1] ** -0.5
    )
    mass_BPE = (scores - lse_BTH[:, pick, :, None]).exp().sum(dim=2).masked_fill(~mask_BPE, 0.0)
    student = index_scores(q_JL[:, pick], k_BEL, w_J[:, pick]).masked_fill(~mask_BPE, float("-inf"))
    chosen = student.topk(min(topk, E), dim=-1).indices
    best = torch.zeros_like(mask_BPE).scatter(2, mass_BPE.topk(min(topk, E), dim=-1).indices, True)
    share_BP = mass_BPE.gather(2, chosen).sum(-1) / mass_BPE.sum(-1).clamp(min=1e-30)
    recall_BP = best.gather(2, chosen).float().mean(-1)
    count = acts_BP.sum().float()
    for name, value_BP in (("captured_mass", share_BP), ("recall", recall_BP)):
        result[f"{name}.sum"] = torch.where(acts_BP, value_BP, 0.0).sum()
        result[f"{name}.count"] = count
    return result
