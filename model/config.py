"""Model configuration: keys spelled as in the released ``config.json`` (reference A.1).

A layer is explicit: ``layer_kinds`` names it (swa | csa | hca | dense) and ``compress_ratios``
gives its ratio. A released config has ratios only (0, 4, 128); model/config_json.py maps them onto
kinds. CSA overlaps two windows and HCA does not, whatever the ratio.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from conf.problems import refuse
from conf.ranges import number, out_of_range
from model.errors import ConfigError
from model.scaled import LARGEST, scaled_shape


class IndexerPhase(StrEnum):
    """How CSA layers attend and what trains the indexer (reference B.8, C.2)."""

    full = "full"  # every visible entry is attended; a run adds no indexer loss
    warmup = "warmup"  # every visible entry is attended; only the indexer trains, over all
    sparse = "sparse"  # the indexer's top-k is attended; it learns over that set


class LayerKind(StrEnum):
    """What a main layer attends to besides the sliding window."""

    swa = "swa"  # nothing: window only
    csa = "csa"  # overlapping compressed entries chosen by the indexer
    hca = "hca"  # all causal heavily compressed entries
    dense = "dense"  # full uncompressed causal attention (ablation; no window, no entries)
    mha = "mha"  # plain multi-head attention, nothing of V4's (comparison; cannot generate)


class Attention(StrEnum):
    """Ablation switch: which attention the compressed layers use (``hybrid`` = as listed)."""

    hybrid = "hybrid"
    csa = "csa"
    hca = "hca"
    swa = "swa"
    dense = "dense"


class Residual(StrEnum):
    """Ablation switch: manifold-constrained hyper-connections, or one plain residual stream."""

    mhc = "mhc"
    plain = "plain"


class Router(StrEnum):
    """How a layer chooses experts: learned scores, or a fixed table by token id."""

    learned = "learned"
    hash = "hash"


class Kernels(StrEnum):
    """Which implementation of each op runs (``model/kernels/select.py``)."""

    auto = "auto"  # Triton on a GPU, C++ on a CPU that has a compiler, else torch
    reference = "reference"  # short definitions in plain torch: slow
    torch = "torch"  # plain torch in chunks, on any device
    compiled = "compiled"  # C++, on a CPU
    triton = "triton"  # on a GPU; on a CPU in Triton's interpreter
    fast = "fast"  # an older spelling of auto


@dataclass
class RopeScaling:
    """YaRN of the compressed layers (reference B.4); factor 1 switches it off."""

    factor: float = number(16.0, least=1)
    original_max_position_embeddings: int = number(65536, least=1)
    beta_fast: float = number(32.0, above=0)
    beta_slow: float = number(1.0, above=0)


@dataclass
class ModelConfig:
    """What fixes the shapes and the maths of a model; sizes in elements unless said otherwise."""

    name: str = "v4_nano"
    # Place in the family v4_scaled, its number of layers; 0: of no family (model/scaled.py).
    scale: int = number(0, least=0, most=LARGEST)
    vocab_size: int = number(4096, least=1)
    hidden_size: int = number(256, least=1)
    num_hidden_layers: int = number(6, least=1)
    num_attention_heads: int = number(8, least=1)
    num_key_value_heads: int = number(1, least=1)
    head_dim: int = number(64, least=1)
    qk_rope_head_dim: int = number(16, least=2)
    q_lora_rank: int = number(128, least=1)
    o_groups: int = number(2, least=1)
    o_lora_rank: int = number(128, least=1)
    # One ratio a main layer, then one a MTP block (0, as released).
    compress_ratios: list[int] = number([0, 0, 4, 128, 4, 128, 0], least=0)
    # One kind a main layer; empty: ratio 0 is swa, 4 is csa, 128 is hca.
    layer_kinds: list[LayerKind] = field(default_factory=list)
    sliding_window: int = number(64, least=1)
    index_n_heads: int = number(16, least=1)
    index_head_dim: int = number(32, least=1)
    index_topk: int = number(32, least=1)
    n_routed_experts: int = number(16, least=1)
    n_shared_experts: int = number(1, least=0)
    num_experts_per_tok: int = number(2, least=1)
    moe_intermediate_size: int = number(128, least=1)
    scoring_func: str = "sqrtsoftplus"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = number(1.5, above=0)
    num_hash_layers: int = number(1, least=0)
    # One router a main layer; empty: the first num_hash_layers are hash, the rest learned.
    routers: list[Router] = field(default_factory=list)
    swiglu_limit: float = number(10.0, least=0.1)
    hc_mult: int = number(4, least=1)
    hc_sinkhorn_iters: int = number(20, least=1, most=1000)
    hc_eps: float = number(1e-6, above=0)
    # Learned RMSNorm weight of the mHC projection, folded on export (reference B.2).
    hc_gamma: bool = False
    # Diagonal added to the comb base at initialisation; 0 = uniform start.
    hc_identity_base: float = number(0.0)
    # Deviation of fn at initialisation times sqrt(hc_mult * hidden_size): the spread of a token's
    # mixes, the same at every width (docs/studies/mhc_init). 0 = fn by initializer_range, whose
    # spread grows with sqrt(hidden_size).
    hc_fn_gain: float = number(0.0, least=0)
    rms_norm_eps: float = number(1e-6, above=0, most=0.1)
    rope_theta: float = number(10000.0, above=1)
    compress_rope_theta: float = number(160000.0, above=1)
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    # YaRN acts from this training sequence length on, tokens; 0 = always.
    yarn_from_seq_len: int = number(0, least=0)
    max_position_embeddings: int = number(1048576, least=1)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    num_nextn_predict_layers: int = number(1, least=0, most=64)
    initializer_range: float = number(0.02, least=1e-4, most=1)
    attention: Attention = Attention.hybrid
    residual: Residual = Residual.mhc
    kernels: Kernels = Kernels.auto
    # Triton's backward passes sum what queries give to the entries they chose in one order; false:
    # they add it atomically, in whatever order comes: less memory and fewer launches.
    deterministic: bool = True
    loss_chunk_tokens: int = number(2048, least=1)  # tokens of logits alive at once in the loss

    # ---- derived ---------------------------------------------------------------------------------
    def kind(self, layer: int) -> LayerKind:
        """Kind of main layer ``layer`` after the ablation switch."""
        listed = (
            LayerKind(self.layer_kinds[layer])
            if self.layer_kinds
            else _KIND_OF_RATIO[self.compress_ratios[layer]]
        )
        switch = Attention(self.attention)
        if switch is Attention.hybrid or listed is LayerKind.swa:
            return listed
        return LayerKind(switch.value)

    def ratio(self, layer: int) -> int:
        """Tokens per compressed entry of main layer ``layer``; 0 where the layer has none.

        Under ``attention=csa`` or ``hca`` a layer takes the smallest, respectively largest ratio
        that the listed layers of that kind use.
        """
        kind = self.kind(layer)
        if kind not in (LayerKind.csa, LayerKind.hca):
            return 0
        listed = self._listed_kind(layer)
        if listed is kind:
            return self.compress_ratios[layer]
        same_kind = [
            self.compress_ratios[i]
            for i in range(self.num_hidden_layers)
            if self._listed_kind(i) is kind
        ]
        return same_kind[0] if same_kind else {LayerKind.csa: 4, LayerKind.hca: 128}[kind]

    def router(self, layer: int) -> Router:
        """Router of main layer ``layer``."""
        if self.routers:
            return Router(self.routers[layer])
        return Router.hash if layer < self.num_hash_layers else Router.learned

    @property
    def num_indexers(self) -> int:
        """Layers with an indexer."""
        kinds = [self.kind(layer) for layer in range(self.num_hidden_layers)]
        return kinds.count(LayerKind.csa)

    @property
    def num_learned_gates(self) -> int:
        """Gates whose choice is learned, those of MTP blocks included."""
        routers = [self.router(layer) for layer in range(self.num_hidden_layers)]
        return routers.count(Router.learned) + self.num_nextn_predict_layers

    @property
    def num_streams(self) -> int:
        """Residual copies that travel between blocks."""
        return self.hc_mult if Residual(self.residual) is Residual.mhc else 1

    @property
    def split_counts(self) -> dict[str, int]:
        """Sizes by which a Muon split may cut the rows of a matrix."""
        return {
            "o_groups": self.o_groups,
            "num_attention_heads": self.num_attention_heads,
            "index_n_heads": self.index_n_heads,
        }

    @property
    def ratios(self) -> tuple[int, ...]:
        """Distinct compression ratios in use, ascending."""
        return tuple(sorted({self.ratio(i) for i in range(self.num_hidden_layers)} - {0}))

    def _listed_kind(self, layer: int) -> LayerKind:
        if self.layer_kinds:
            return LayerKind(self.layer_kinds[layer])
        return _KIND_OF_RATIO[self.compress_ratios[layer]]

    # ---- validation ------------------------------------------------------------------------------
    def validate(self, prefix: str = "model") -> None:
        """Refuse what cannot be built.

        Raises:
            ValueError: names the two keys in conflict and both values.
        """
        refuse(ConfigError, out_of_range(self, prefix) or self._problems(prefix))

    def _problems(self, p: str) -> list[str]:
        out: list[str] = []

        def need(ok: bool, message: str) -> None:
            if not ok:
                out.append(message)

        layers = self.num_hidden_layers
        need(
            len(self.compress_ratios) in (layers, layers + self.num_nextn_predict_layers),
            f"{p}.compress_ratios has {len(self.compress_ratios)} entries but"
            f" {p}.num_hidden_layers={layers} and {p}.num_nextn_predict_layers="
            f"{self.num_nextn_predict_layers}: one ratio a main layer, then one 0 a MTP block",
        )
        for name in ("layer_kinds", "routers"):
            given = getattr(self, name)
            need(
                len(given) in (0, layers),
                f"{p}.{name} has {len(given)} entries but {p}.num_hidden_layers={layers}",
            )
        if not out:
            self._layers(p, need)
        self._family(p, need)
        self._divisibility(p, need)
        self._released_only(p, need)
        self._plain(p, need)
        if not (self.deterministic or out):
            self._atomics(p, need)
        return out

    def _layers(self, p: str, need: Any) -> None:
        """Each layer has a ratio that fits its kind."""
        layers = self.num_hidden_layers
        for layer, ratio in enumerate(self.compress_ratios[:layers]):
            if not self.layer_kinds:
                need(
                    ratio in _KIND_OF_RATIO,
                    f"{p}.compress_ratios[{layer}]={ratio} has no default kind (0 swa, 4 csa,"
                    f" 128 hca): name it in {p}.layer_kinds (now {list(self.layer_kinds)})",
                )
                continue
            kind = LayerKind(self.layer_kinds[layer])
            compressed = kind in (LayerKind.csa, LayerKind.hca)
            need(
                (ratio > 0) == compressed,
                f"{p}.compress_ratios[{layer}]={ratio} does not fit"
                f" {p}.layer_kinds[{layer}]={kind.value}",
            )
        extra = self.compress_ratios[layers:]
        need(
            not any(extra),
            f"{p}.compress_ratios ends in {list(extra)}, but MTP blocks are window-only (ratio 0):"
            f" {p}.num_nextn_predict_layers={self.num_nextn_predict_layers}",
        )

    def _family(self, p: str, need: Any) -> None:
        """A scale says something of the shape, or nothing: other sizes are of no family."""
        shape = scaled_shape(self.scale) if self.scale else {}
        for key in ("num_hidden_layers", "hidden_size"):
            need(
                not shape or getattr(self, key) == shape[key],
                f"{p}.scale={self.scale} is a place in the family model=v4_scaled, where"
                f" {p}.{key}={shape.get(key)}, but {p}.{key}={getattr(self, key)}",
            )

    def _atomics(self, p: str, need: Any) -> None:
        """Sums in no order are Triton's, of entries that an indexer chooses."""
        kernels, asked = Kernels(self.kernels), f"{p}.deterministic=false"
        need(
            kernels is Kernels.triton,
            f"{asked} is for {p}.kernels=triton, not for {p}.kernels={kernels.value}: say"
            f" {p}.kernels=triton, or {p}.deterministic=true",
        )
        need(
            self.num_indexers > 0,
            f"{asked} acts where entries are chosen, and {p} has no csa layer: say"
            f" {p}.deterministic=true",
        )

    def _divisibility(self, p: str, need: Any) -> None:
        heads, groups = self.num_attention_heads, self.o_groups
        need(
            heads % groups == 0,
            f"{p}.num_attention_heads={heads} must be a multiple of {p}.o_groups={groups}",
        )
        rope = self.qk_rope_head_dim
        need(
            rope % 2 == 0,
            f"{p}.qk_rope_head_dim={rope} must be even ({p}.head_dim={self.head_dim})",
        )
        for key in ("head_dim", "index_head_dim"):
            dim = getattr(self, key)
            need(rope <= dim, f"{p}.qk_rope_head_dim={rope} must not exceed {p}.{key}={dim}")
        index_dim = self.index_head_dim
        need(
            index_dim & (index_dim - 1) == 0,
            f"{p}.index_head_dim={index_dim} must be a power of two (Hadamard transform,"
            f" {p}.index_n_heads={self.index_n_heads})",
        )
        need(
            self.num_experts_per_tok <= self.n_routed_experts,
            f"{p}.num_experts_per_tok={self.num_experts_per_tok} must not exceed"
            f" {p}.n_routed_experts={self.n_routed_experts}",
        )
        need(
            self.num_hash_layers <= self.num_hidden_layers,
            f"{p}.num_hash_layers={self.num_hash_layers} must not exceed"
            f" {p}.num_hidden_layers={self.num_hidden_layers}",
        )

    def _plain(self, p: str, need: Any) -> None:
        """Plain residuals have no mixes whose start or norm could be chosen."""
        for key in ("hc_gamma", "hc_identity_base", "hc_fn_gain"):
            value = getattr(self, key)
            need(
                not value or Residual(self.residual) is Residual.mhc,
                f"{p}.{key}={value} acts on {p}.residual=mhc, not on {p}.residual=plain",
            )

    def _released_only(self, p: str, need: Any) -> None:
        for key, only in ONE_VALUE.items():
            value = getattr(self, key)
            need(
                value == only,
                f"{p}.{key}={value!s:.80} is not part of DeepSeek-V4, which has {key}={only}",
            )


_KIND_OF_RATIO = {0: LayerKind.swa, 4: LayerKind.csa, 128: LayerKind.hca}
ONE_VALUE = {
    "num_key_value_heads": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
