"""The fixed table of hash-routed layers: which experts serve each token id (reference B.9 and H).

DeepSeek-V4 publishes that the first layers route by a "predefined hash of the token id" but not
the hash. Ours is greedy by frequency: tokens are taken from the most to the least frequent, and
each gets the ``k`` distinct experts that carry the least load so far. So the load is balanced from
step 0, whatever the tokenizer. Ties are broken at random (seeded); otherwise equal tokens would
always land on the same groups of ``k`` experts. A released checkpoint brings its own tables, which
are kept on import.
"""

# Legend: V vocabulary, K experts a token, E experts
from __future__ import annotations

import heapq

import torch
from torch import Tensor

from model.errors import ConfigError

_TIE_BITS = 32  # random bits that decide between equally loaded experts


def build_table(
    vocab_size: int,
    num_experts: int,
    num_experts_per_tok: int,
    seed: int,
    token_counts_V: Tensor | None = None,
) -> Tensor:
    """Assign ``num_experts_per_tok`` distinct experts to every token id.

    Args:
        vocab_size: rows of the table.
        num_experts: experts to choose from.
        num_experts_per_tok: columns of the table.
        seed: decides ties; the same seed gives the same table on every machine and layout.
        token_counts_V: occurrences of each token id in the training text, [V], none negative; an
            id that never occurs counts as one, so that unseen ids spread too. None: every id is
            equally frequent.

    Returns:
        int64 [V, K]; every row holds distinct expert numbers.

    Raises:
        ValueError: more experts a token than experts, or counts of the wrong shape or sign.
    """
    if num_experts_per_tok > num_experts:
        raise ConfigError(
            f"model.num_experts_per_tok={num_experts_per_tok} must not exceed"
            f" model.n_routed_experts={num_experts}"
        )
    counts = _counts(vocab_size, token_counts_V)
    generator = torch.Generator().manual_seed(seed)
    shuffled_V = torch.randperm(vocab_size, generator=generator)
    order_V = shuffled_V[torch.sort(counts[shuffled_V], descending=True, stable=True).indices]
    ties_VK = torch.randint(2**_TIE_BITS, (vocab_size, num_experts_per_tok), generator=generator)
    first_ties_E = torch.randint(2**_TIE_BITS, (num_experts,), generator=generator)

    # One integer an expert: load, then random bits, then the expert's number. Smallest first.
    expert_bits = max(1, (num_experts - 1).bit_length())
    expert_mask = (1 << expert_bits) - 1
    load_shift = _TIE_BITS + expert_bits
    heap = [(tie << expert_bits) | e for e, tie in enumerate(first_ties_E.tolist())]
    heapq.heapify(heap)
    rows: list[list[int]] = []
    for count, ties in zip(counts[order_V].tolist(), ties_VK.tolist(), strict=True):
        taken = [heapq.heappop(heap) for _ in ties]
        row = [key & expert_mask for key in taken]
        for key, expert, tie in zip(taken, row, ties, strict=True):
            load = (key >> load_shift) + count
            heapq.heappush(heap, (load << load_shift) | (tie << expert_bits) | expert)
        rows.append(row)
    table_VK = torch.empty(vocab_size, num_experts_per_tok, dtype=torch.int64)
    table_VK[order_V] = torch.tensor(rows, dtype=torch.int64)
    return table_VK


def _counts(vocab_size: int, token_counts_V: Tensor | None) -> Tensor:
    if token_counts_V is None:
        return torch.ones(vocab_size, dtype=torch.int64)
    if token_counts_V.shape != (vocab_size,):
        raise ConfigError(
            f"token counts have shape {list(token_counts_V.shape)}"
            f" but model.vocab_size={vocab_size}"
        )
    counts_V = token_counts_V.detach().to("cpu", torch.int64)
    if vocab_size and int(counts_V.min()) < 0:
        worst = int(counts_V.argmin())
        raise ConfigError(
            f"token counts must not be negative: id {worst} has {int(counts_V[worst])}"
        )
    return counts_V.clamp(min=1)
