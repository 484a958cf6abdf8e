"""Sizes and costs in closed form, from the configuration alone: nothing here builds a module.

* parameters and buffers by name, totals and active counts (reference A.3, E.1);
* training FLOPs per token, forward and backward, by part and by indexer phase;
* decoding FLOPs per token and KV-cache bytes, beside V3.2 and a GQA cache (reference F);
* activation bytes, a coarse estimate calibrated on measurements.

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

from model.config import LayerKind, ModelConfig, Residual, Router

Shape = tuple[int, ...]

# ---- parameters -------------------------------------------------------------------------------


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Global shape of every trained parameter by name, in the order of the network."""
    width, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, Shape] = {"embed.weight": (vocab, width)}
    for layer in range(config.num_hidden_layers):
        block = _block_shapes(config, config.kind(layer), config.ratio(layer))
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= _hc_head_shapes(config)
    shapes |= {"norm.weight": (width,), "head.weight": (vocab, width)}
    for depth in range(config.num_nextn_predict_layers):
        block = _block_shapes(config, LayerKind.swa, 0) | _hc_head_shapes(config)
        block |= {f"{name}.weight": (width, width) for name in ("e_proj", "h_proj")}
        block |= {f"{name}.weight": (width,) for name in ("enorm", "hnorm", "norm")}
        shapes |= {f"mtp.{depth}.{name}": shape for name, shape in block.items()}
    return shapes


def buffer_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Global shape of every saved buffer: selection biases and hash tables, one a MoE layer."""
    gates = {f"layers.{i}.ffn.gate": config.router(i) for i in range(config.num_hidden_layers)}
    gates |= {f"mtp.{i}.ffn.gate": Router.learned for i in range(config.num_nextn_predict_layers)}
    bias, table = (config.n_routed_experts,), (config.vocab_size, config.num_experts_per_tok)
    return {
        f"{gate}.tid2eid" if router is Router.hash else f"{gate}.bias": (
            table if router is Router.hash else bias
        )
        for gate, router in gates.items()
    }


def _block_shapes(config: ModelConfig, kind: LayerKind, ratio: int) -> dict[str, Shape]:
    width = config.hidden_size
    shapes: dict[str, Shape] = {"attn_norm.weight": (width,), "ffn_norm.weight": (width,)}
    shapes |= {f"attn.{name}": shape for name, shape in _attention_shapes(config, kind, ratio)}
    shapes |= {f"ffn.{name}": shape for name, shape in _moe_shapes(config)}
    if Residual(config.residual) is Residual.mhc:
        streams = config.hc_mult
        mixes = (2 + streams) * streams
        for name in ("hc_attn", "hc_ffn"):
            shapes |= {f"{name}.fn": (mixes, streams * width), f"{name}.base": (mixes,)}
            shapes |= {f"{name}.scale": (3,)}
            shapes |= {f"{name}.gamma": (streams * width,)} if config.hc_gamma else {}
    return shapes


def _hc_head_shapes(config: ModelConfig) -> dict[str, Shape]:
    if Residual(config.residual) is Residual.plain:
        return {}
    streams, width = config.hc_mult, config.hidden_size
    shapes: dict[str, Shape] = {"hc_head.fn": (streams, streams * width)}
    shapes |= {"hc_head.base": (streams,), "hc_head.scale": (1,)}
    return shapes | ({"hc_head.gamma": (streams * width,)} if config.hc_gamma else {})


def _attention_shapes(
    config: ModelConfig, kind: LayerKind, ratio: int
) -> Iterator[tuple[str, Shape]]:
    width, rank, dim = config.hidden_size, config.q_lora_rank, config.head_dim
    heads, groups = config.num_attention_heads, config.o_groups
    if kind is LayerKind.mha:
        yield from ((f"{name}.weight", (heads * dim, width)) for name in ("wq", "wk", "wv"))
        yield "wo.weight", (width, heads * dim)
        return
    yield "wq_a.weight", (rank, width)
    yield "q_norm.weight", (rank,)
    yield "wq_b.weight", (heads * dim, rank)
    yield "wkv.weight", (dim, width)
    yield "kv_norm.weight", (dim,)
    yield "attn_sink", (heads,)
    yield "wo_a.weight", (groups * config.o_lora_rank, heads * dim // groups)
    yield "wo_b.weight", (width, groups * config.o_lora_rank)
    if kind in (LayerKind.csa, LayerKind.hca):
        yield from _compressor_shapes(
            "compressor", width, dim, ratio, overlap=kind is LayerKind.csa
        )
    if kind is LayerKind.csa:
        index_heads, index_dim = config.index_n_heads, config.index_head_dim
        yield "indexer.wq_b.weight", (index_heads * index_dim, rank)
        yield "indexer.weights_proj.weight", (index_heads, width)
        yield from _compressor_shapes("indexer.compressor", width, index_dim, ratio, overlap=True)


def _compressor_shapes(
    name: str, width: int, dim: int, ratio: int, overlap: bool
) -> Iterator[tuple[str, Shape]]:
    channels = 2 * dim if overlap else dim
    yield f"{name}.wkv.weight", (channels, width)
    yield f"{name}.wgate.weight", (channels, width)
    yield f"{name}.ape", (ratio, channels)
    yield f"{name}.norm.weight", (dim,)


def _moe_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    width, experts, inner = (
        config.hidden_size,
        config.n_routed_experts,
        config.moe_intermediate_size,
    )
    yield "gate.weight", (experts, width)
    for name in ("w1", "w3"):
        yield f"experts.{name}.weight", (experts, inner, width)
    yield "experts.w2.weight", (experts, width, inner)
    if shared := config.n_shared_experts * inner:  # several shared experts are one wider one
        for name in ("w1", "w3"):
            yield f"shared_experts.{name}.weight", (shared, width)
        yield "shared_experts.w2.weight", (width, shared)


@dataclass(frozen=True)
class ParameterCounts:
    """How many numbers a model holds, as the published totals count: selection biases included.

    Attributes:
        by_kind: embedding, head, attention, compressor, indexer, gate, gate_bias, experts, shared,
            mhc, norms of the main model, and ``mtp`` whole.
        active_by_kind: the share of each that one token uses (``num_experts_per_tok`` of the
            routed experts, everything else whole).
    """

    by_kind: dict[str, int]
    active_by_kind: dict[str, int]

    @property
    def total(self) -> int:
        """Everything, MTP included."""
        return sum(self.by_kind.values())

    @property
    def main(self) -> int:
        """Everything without MTP."""
        return self.total - self.by_kind["mtp"]

    @property
    def active(self) -> int:
        """What one token uses in the main model, embedding table included."""
        return sum(self.active_by_kind.values()) - self.active_by_kind["mtp"]

    @property
    def active_without_embedding(self) -> int:
        """The published "13B" and "49B": the embedding is a lookup."""
        return self.active - self.active_by_kind["embedding"]


_KINDS = (
    ("mtp.", "mtp"),
    ("embed.", "embedding"),
    ("head.", "head"),
    (".indexer.", "indexer"),
    (".compressor.", "compressor"),
    ("norm.weight", "norms"),
    ("hc_", "mhc"),
    (".gate.bias", "gate_bias"),
    (".gate.weight", "gate"),
    (".shared_experts.", "shared"),
    (".experts.", "experts"),
    (".attn.", "attention"),
)


def kind_of(fqn: str) -> str:
    """Kind that :class:`ParameterCounts` books a parameter under."""
    for mark, kind in _KINDS:
        if fqn.startswith(mark) if mark in ("mtp.", "head.", "embed.") else mark in fqn:
            return kind
    raise ValueError(f"parameter {fqn} belongs to no kind")


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Count parameters and selection biases by kind, all and active."""
    shapes = parameter_shapes(config)
    shapes |= {k: v for k, v in buffer_shapes(config).items() if k.endswith(".bias")}
    kinds = [*dict.fromkeys(kind for _, kind in _KINDS)]
    total, active = dict.fromkeys(kinds, 0), dict.fromkeys(kinds, 0)
    for fqn, shape in shapes.items():
        size, kind = math.prod(shape), kind_of(fqn)
        routed = ".experts." in fqn
        total[kind] += size
        active[kind] += (
            size * config.num_experts_per_tok // config.n_routed_experts if routed else size
        )
    return ParameterCounts(total, active)


# ---- training FLOPs ---------------------------------------------------------------------------


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
    for name, shape in _attention_shapes(config, kind, ratio):
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


# ---- decoding: FLOPs and cache ----------------------------------------------------------------


@dataclass(frozen=True)
class DecodingFlops:
    """FLOPs of one decoded token (reference F).

    Attributes:
        gemm: matmuls with weights; FP8.
        core: scores and values of the core attention; bf16, so twice the cost of FP8.
        index: the indexer's scores.
        index_weight: cost of an indexer FLOP in FP8 ones: a half in FP4 (V4), one in FP8 (V3.2).
    """

    gemm: float
    core: float
    index: float
    index_weight: float = 0.5

    @property
    def raw(self) -> float:
        """Each operation once, whatever its format."""
        return self.gemm + self.core + self.index

    @property
    def fp8_equivalent(self) -> float:
        """Each operation in units of an FP8 one; the weights fit the paper's figure 1."""
        return self.gemm + 2 * self.core + self.index_weight * self.index


def decoding_flops(config: ModelConfig, context: int) -> DecodingFlops:
    """FLOPs of the token that follows ``context`` tokens (main model, no MTP)."""
    core = index = 0.0
    for layer in range(config.num_hidden_layers):
        kind, ratio = config.kind(layer), config.ratio(layer)
        keys = context if kind is LayerKind.dense else min(config.sliding_window, context)
        if kind is LayerKind.csa:
            keys += min(config.index_topk, context // ratio)
            index += 2.0 * config.index_n_heads * config.index_head_dim * (context // ratio)
        elif kind is LayerKind.hca:
            keys += context // ratio
        core += 4.0 * config.num_attention_heads * config.head_dim * keys
    return DecodingFlops(2.0 * parameter_counts(config).active_without_embedding, core, index)


def v32_decoding_flops(context: int) -> DecodingFlops:
    """DeepSeek-V3.2: 61 layers, 128 heads of 576 + 512, top-2048, indexer of 64 heads of 128."""
    core = 61 * 2.0 * 128 * (576 + 512) * min(2048, context)
    return DecodingFlops(2 * 37e9, core, 61 * 2.0 * 64 * 128 * context, index_weight=1.0)


def kv_cache_bytes(config: ModelConfig, context: int, value_bytes: int = 0) -> int:
    """Bytes of KV cache after ``context`` tokens: window rows, entries and indexer keys.

    As released (reference F) an entry or window row is FP8 with a scale per 64 channels (padded to
    8) and bf16 RoPE channels; an indexer key is FP4 with a scale per 32 channels.

    Args:
        config: the model.
        context: tokens.
        value_bytes: of every channel (2: bf16); 0: the released formats.
    """
    plain = config.head_dim - config.qk_rope_head_dim
    row = plain + 2 * config.qk_rope_head_dim + 8 * math.ceil(math.ceil(plain / 64) / 8)
    index_row = math.ceil(config.index_head_dim / 2) + math.ceil(config.index_head_dim / 32)
    if value_bytes:
        row, index_row = value_bytes * config.head_dim, value_bytes * config.index_head_dim
    total = 0
    for layer in range(config.num_hidden_layers):
        kind, ratio = config.kind(layer), config.ratio(layer)
        window = context if kind is LayerKind.dense else min(config.sliding_window, context)
        total += window * row
        if kind is LayerKind.csa:
            total += context // ratio * (row + index_row)
        elif kind is LayerKind.hca:
            total += context // ratio * row
    return total


def v32_kv_cache_bytes(context: int) -> int:
    """DeepSeek-V3.2: 61 layers, 656 bytes of latent and 132 of indexer key a token."""
    return 61 * (656 + 132) * context


def gqa8_kv_cache_bytes(layers: int, context: int) -> int:
    """A bf16 cache of 8 KV heads of 128 channels, keys and values."""
    return layers * 2 * 8 * 128 * 2 * context
