"""Parameters and buffers by name, totals and active counts, in closed form (reference A.3, E.1).

From the configuration alone: nothing here builds a module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from model.config import LayerKind, ModelConfig, Residual, Router

Shape = tuple[int, ...]


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
    shapes |= {f"attn.{name}": shape for name, shape in attention_shapes(config, kind, ratio)}
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


def attention_shapes(
    config: ModelConfig, kind: LayerKind, ratio: int
) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of an attention layer's parameters, its compressor and indexer included."""
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
