"""What every layer of one forward pass shares: plan, RoPE tables, phase and what to report."""

# Legend: B rows, T tokens, R rotation pairs, L entries computed here
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from model.config import IndexerPhase, ModelConfig
from model.kv_exchange import KVExchange, WholeRows
from model.rope import rope_frequencies, rope_tables
from model.sequence_plan import SequencePlan, build_sequence_plan

RopeTable = tuple[Tensor, Tensor]


class Past(Protocol):
    """What came before the tokens of this pass: keys from a cache (``model/cache.py``)."""

    def attend(
        self, layer: Any, u_BTD: Tensor, q_latent_BTQ: Tensor, q_BTHK: Tensor, kv_BTK: Tensor
    ) -> Tensor:
        """Attention's weighted values [B, T, H, K] over the past and this pass' own tokens."""
        ...


@dataclass
class ForwardContext:
    """Shared by the layers of one forward pass.

    Attributes:
        plan: positions and visibility.
        window_rope: (cos, sin) [B, T, R] of window-only layers.
        compressed_rope: (cos, sin) [B, T, R] of compressed layers.
        entry_rope: ratio -> (cos, sin) [B, L, R] of the entries that are computed here.
        phase: the indexer's phase.
        indexer_loss: compute the indexer's KL.
        balance_loss: compute the balance loss.
        monitors: compute the costly monitors too.
        replay: FQN of a gate or indexer -> indices to use instead of its own choice (weights stay
            its own).
        record: filled with the indices that were chosen, by FQN; None: nothing is kept.
        past: the cache of a text that is being decoded; None: the plan holds all there is.
        kv_exchange: brings what other ranks hold of the rows.
    """

    plan: SequencePlan
    window_rope: RopeTable
    compressed_rope: RopeTable
    entry_rope: dict[int, RopeTable]
    phase: IndexerPhase = IndexerPhase.sparse
    indexer_loss: bool = False
    balance_loss: bool = False
    monitors: bool = False
    replay: dict[str, Tensor] = field(default_factory=dict)
    record: dict[str, Tensor] | None = None
    past: Past | None = None
    kv_exchange: KVExchange = field(default_factory=WholeRows)


def build_context(
    config: ModelConfig,
    document_ids_BT: Tensor,
    yarn: bool,
    device: torch.device | None = None,
    kv_exchange: KVExchange = WholeRows(),  # noqa: B008  has no state
) -> ForwardContext:
    """Plan and RoPE tables of a batch.

    Args:
        config: the model.
        document_ids_BT: of whole rows: equal inside a document, -1 for padding; best on the host.
        yarn: compressed layers use YaRN.
        device: of the layers; None: that of the ids.
        kv_exchange: reaches what is not here; says which part of the rows is.
    """
    plan = build_sequence_plan(
        document_ids_BT, config.ratios, config.sliding_window, kv_exchange.shard
    )
    plan = plan.to(document_ids_BT.device if device is None else device)
    window = rope_frequencies(config, compressed=False)
    compressed = rope_frequencies(config, compressed=True, yarn=yarn)
    return ForwardContext(
        plan=plan,
        window_rope=rope_tables(plan.position_BT, window),
        compressed_rope=rope_tables(plan.position_BT, compressed),
        kv_exchange=kv_exchange,
        entry_rope={m: rope_tables(p.position_BL, compressed) for m, p in plan.compressed.items()},
    )
