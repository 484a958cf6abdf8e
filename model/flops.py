"""Training FLOPs per token in closed form: forward and backward, by part and by indexer phase.

One multiply-add counts as 2 FLOPs. Counted are contractions: matmuls, attention scores and values,
the mixing of streams, the weighted sums of the compressor. Not counted: normalisations, softmax,
Sinkhorn, RoPE, activations, and whatever is computed twice (activation checkpointing, chunked
backward passes, the indexer's teacher, which attention already has).
"""

# Legend (in comments): D hidden, S streams, H heads, C head dim, R query rank, G output groups,
# E experts, I expert width, V vocabulary, T tokens of a row
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from model.config import LayerKind, ModelConfig, Residual
from model.parameter_counts import attention_shapes


@dataclass(frozen=True)
class Keys:
    """Keys per query, averaged over the queries of a row.

    Attributes:
        core: keys of the core attention, window and entries together.
        scored: entries the indexer scores (0 where it does not run).
        taught: entries the indexer's loss compares (0 where there is no loss).
    """

    core: float
    scored: float = 0.0
    taught: float = 0.0


def mean_min(limit: int, tokens: int) -> float:
    """Mean over t = 1..tokens of ``min(t, limit)``."""
    head = min(limit, tokens)
    return (head * (head + 1) / 2 + (tokens - head) * limit) / tokens


def mean_entries(ratio: int, tokens: int, limit: int | None = None) -> float:
    """Mean over t = 1..tokens of ``min(floor(t / ratio), limit)``: causal entries of a query."""
    full = tokens if limit is None else min(tokens, limit * ratio)
    blocks, rest = divmod(full, ratio)
    below = ratio * blocks * (blocks - 1) / 2 + blocks * (rest + 1)
    return (below + (tokens - full) * (limit or 0)) / tokens


def mean_keys(
    config: ModelConfig, kind: LayerKind, ratio: int, seq_len: int, phase: str, indexer_loss: bool
) -> Keys:
    """Keys that causality leaves to a query, for one document that fills the row."""
    if kind in (LayerKind.dense, LayerKind.mha):
        return Keys(mean_min(seq_len, seq_len))
    window = mean_min(config.sliding_window, seq_len)
    if kind is LayerKind.swa:
        return Keys(window)
    visible = mean_entries(ratio, seq_len)
    if kind is LayerKind.hca:
        return Keys(window + visible)
    if phase == "sparse":
        chosen = mean_entries(ratio, seq_len, config.index_topk)
        return Keys(window + chosen, visible, chosen if indexer_loss else 0.0)
    taught = visible if indexer_loss else 0.0
    return Keys(window + visible, taught, taught)


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs per token of a training step by part (``core.csa``, ``experts``, ``mtp`` ...)."""

    forward: dict[str, float]
    backward: dict[str, float]

    @property
    def by_part(self) -> dict[str, float]:
        """Forward and backward together."""
        return {part: self.forward[part] + self.backward[part] for part in self.forward}

    @property
    def total(self) -> float:
        """All parts, forward and backward."""
        return sum(self.forward.values()) + sum(self.backward.values())


KeysOf = Callable[[ModelConfig, LayerKind, int, int, str, bool], Keys]


def training_flops(
    config: ModelConfig,
    seq_len: int,
    phase: str = "sparse",
    indexer_loss: bool = True,
    keys_of: KeysOf = mean_keys,
    mtp: bool = True,
) -> TrainingFlops:
    """FLOPs per token of forward and backward, by part.

    A backward pass costs twice the forward one: gradients of inputs and of weights. The indexer
    differs: its inputs are detached (no gradient of inputs), and its scores are differentiated on
    the entries that the loss compares only. In the warm-up phase nothing else is trained.

    Args:
        config: the model.
        seq_len: tokens of a row, taken as one document.
        phase: ``full`` and ``warmup`` attend all visible entries, ``sparse`` the indexer's choice.
        indexer_loss: whether the indexer is trained.
        keys_of: keys per query of a layer; another function counts what an implementation really
            multiplies, masked scores included.
        mtp: whether the MTP blocks run, as they do where their loss has a weight.

    Raises:
        ValueError: unknown phase, or a warm-up without the indexer's loss.
    """
    costs = _costs(config, seq_len, phase, indexer_loss, keys_of)
    return _by_part(cost for cost in costs if mtp or cost[1] != "mtp")


def _by_part(costs: Iterable[tuple[str, str, float, float]]) -> TrainingFlops:
    forward: dict[str, float] = {}
    backward: dict[str, float] = {}
    for _, part, cost, back in costs:
        forward[part] = forward.get(part, 0.0) + cost
        backward[part] = backward.get(part, 0.0) + back
    return TrainingFlops(forward, backward)


def training_flops_by_block(
    config: ModelConfig, seq_len: int, phase: str = "sparse", indexer_loss: bool = True
) -> dict[str, float]:
    """The same by ``layers.N``, ``head`` (with hc_head) and ``mtp.K``, forward plus backward.

    Pipeline stages are balanced by it; arguments as in :func:`training_flops`.
    """
    blocks: dict[str, float] = {}
    for block, _, cost, back in _costs(config, seq_len, phase, indexer_loss, mean_keys):
        blocks[block] = blocks.get(block, 0.0) + cost + back
    return blocks


def block_flops(
    config: ModelConfig, layer: int, seq_len: int, phase: str = "sparse", indexer_loss: bool = True
) -> TrainingFlops:
    """The same of one block by part; other arguments as in :func:`training_flops`."""
    costs = _costs(config, seq_len, phase, indexer_loss, mean_keys)
    return _by_part(cost for cost in costs if cost[0] == f"layers.{layer}")


def _costs(
    config: ModelConfig, seq_len: int, phase: str, indexer_loss: bool, keys_of: KeysOf
) -> Iterator[tuple[str, str, float, float]]:
    """Block, part, forward and backward FLOPs per token of everything."""
    if phase not in ("full", "warmup", "sparse"):
        raise ValueError(f"indexer phase {phase!r} is none of full, warmup, sparse")
    if phase == "warmup" and not indexer_loss:
        raise ValueError("indexer phase 'warmup' trains the indexer alone but indexer_loss=False")
    backward = 0.0 if phase == "warmup" else 2.0  # times the forward cost
    for layer in range(config.num_hidden_layers):
        kind, ratio = config.kind(layer), config.ratio(layer)
        keys = keys_of(config, kind, ratio, seq_len, phase, indexer_loss)
        for part, cost in _block_flops(config, kind, ratio, keys):
            yield f"layers.{layer}", part, cost, backward * cost
        if kind is LayerKind.csa:
            yield f"layers.{layer}", "indexer", *_indexer_flops(config, keys)
    collapse, head = _hc_head_flops(config), 2.0 * config.vocab_size * config.hidden_size
    yield "head", "mhc", collapse, backward * collapse
    yield "head", "head", head, backward * head
    keys = keys_of(config, LayerKind.swa, 0, seq_len, phase, indexer_loss)
    for depth in range(config.num_nextn_predict_layers):
        block = sum(cost for _, cost in _block_flops(config, LayerKind.swa, 0, keys))
        projections = 2.0 * (1 + config.num_streams) * config.hidden_size**2  # e_proj, h_proj
        cost = block + projections + collapse + head
        yield f"mtp.{depth}", "mtp", cost, backward * cost


def _block_flops(
    config: ModelConfig, kind: LayerKind, ratio: int, keys: Keys
) -> Iterator[tuple[str, float]]:
    """Forward FLOPs per token of one block without its indexer."""
    width, dim = config.hidden_size, config.head_dim
    for name, shape in attention_shapes(config, kind, ratio):
        if name.startswith("w"):  # wq_a, wq_b, wkv, wo_a (block diagonal), wo_b
            yield "attention", 2.0 * math.prod(shape)
    yield f"core.{kind.value}", 4.0 * config.num_attention_heads * dim * keys.core
    if kind in (LayerKind.csa, LayerKind.hca):
        yield "compressor", _compressor_flops(width, dim, overlap=kind is LayerKind.csa)
    yield "gate", 2.0 * config.n_routed_experts * width
    expert = 6.0 * config.moe_intermediate_size * width
    yield "experts", config.num_experts_per_tok * expert
    yield "shared", config.n_shared_experts * expert
    yield "mhc", 2 * _mhc_flops(config)


def _compressor_flops(width: int, dim: int, overlap: bool) -> float:
    channels = 2 * dim if overlap else dim
    return 4.0 * channels * width + 2.0 * channels  # two projections, one weighted sum


def _indexer_flops(config: ModelConfig, keys: Keys) -> tuple[float, float]:
    """Forward and backward FLOPs per token of one indexer."""
    if not keys.scored:
        return 0.0, 0.0
    heads, dim, width = config.index_n_heads, config.index_head_dim, config.hidden_size
    projections = 2.0 * heads * (dim * config.q_lora_rank + width) + 8.0 * dim * width
    pooling = 4.0 * dim
    a_score = 2.0 * heads * (dim + 1)  # every head's dot product, then their weighted sum
    forward = projections + pooling + a_score * keys.scored
    return forward, (projections + 2 * (pooling + a_score * keys.taught) if keys.taught else 0.0)


def _mhc_flops(config: ModelConfig) -> float:
    """Forward FLOPs per token of one sublayer's streams: projection, collapse, spread, mix."""
    if Residual(config.residual) is Residual.plain:
        return 0.0
    streams, wide = config.hc_mult, config.hc_mult * config.hidden_size
    return 2.0 * wide * ((2 + streams) * streams + 1 + 1 + streams)


def _hc_head_flops(config: ModelConfig) -> float:
    if Residual(config.residual) is Residual.plain:
        return 0.0
    return 2.0 * config.hc_mult * config.hidden_size * (config.hc_mult + 1)
