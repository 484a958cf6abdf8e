"""Random weights by official name (reference E.1), and the names that others use for them.

Shapes and names are written from the specification, not taken from ``model/``, so that a wrong
shape or name there shows. Every tensor is far from its initial value (norm weights are not 1, sinks
and position tables not 0), or a bug that ignores it would not show.
"""

# Legend: D hidden, H heads, K head dim, S streams, E experts, V vocab, M tokens of an entry
from __future__ import annotations

import re

import torch
from torch import Tensor

from model.config import LayerKind, ModelConfig, Residual, Router

Weights = dict[str, Tensor]


def official_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, buffers included; MTP blocks too."""
    D, V = config.hidden_size, config.vocab_size
    out: dict[str, tuple[int, ...]] = {
        "embed.weight": (V, D),
        "head.weight": (V, D),
        "norm.weight": (D,),
    }
    out |= _head(config, "hc_head")
    for n in range(config.num_hidden_layers):
        name = f"layers.{n}"
        out |= _block(config, name, config.kind(n), config.ratio(n), config.router(n))
    for n in range(config.num_nextn_predict_layers):
        name = f"mtp.{n}"
        out |= _block(config, name, LayerKind.swa, 0, Router.learned)
        out |= {f"{name}.{p}.weight": (D, D) for p in ("e_proj", "h_proj")}
        out |= {f"{name}.{p}.weight": (D,) for p in ("enorm", "hnorm", "norm")}
        out |= _head(config, f"{name}.hc_head")
    return out


def _head(config: ModelConfig, name: str) -> dict[str, tuple[int, ...]]:
    if config.residual == Residual.plain:
        return {}
    S = config.hc_mult
    return {f"{name}_fn": (S, S * config.hidden_size), f"{name}_base": (S,), f"{name}_scale": (1,)}


def _block(
    config: ModelConfig, name: str, kind: LayerKind, ratio: int, router: Router
) -> dict[str, tuple[int, ...]]:
    D, S, E = config.hidden_size, config.hc_mult, config.n_routed_experts
    width = config.moe_intermediate_size
    H, K, R = config.num_attention_heads, config.head_dim, config.q_lora_rank
    out: dict[str, tuple[int, ...]] = {
        f"{name}.attn_norm.weight": (D,),
        f"{name}.ffn_norm.weight": (D,),
    }
    if config.residual == Residual.mhc:
        mixes = 2 * S + S * S
        for sub in ("attn", "ffn"):
            out[f"{name}.hc_{sub}_fn"] = (mixes, S * D)
            out[f"{name}.hc_{sub}_base"] = (mixes,)
            out[f"{name}.hc_{sub}_scale"] = (3,)
    a = f"{name}.attn"
    groups, rank = config.o_groups, config.o_lora_rank
    if kind is LayerKind.mha:
        own = {f"{a}.{part}.weight": (H * K, D) for part in ("wq", "wk", "wv")}
        own[f"{a}.wo.weight"] = (D, H * K)
    else:
        own = {
            f"{a}.wq_a.weight": (R, D),
            f"{a}.wq_b.weight": (H * K, R),
            f"{a}.wkv.weight": (K, D),
            f"{a}.wo_a.weight": (groups * rank, H * K // groups),
            f"{a}.wo_b.weight": (D, groups * rank),
            f"{a}.q_norm.weight": (R,),
            f"{a}.kv_norm.weight": (K,),
            f"{a}.attn_sink": (H,),
        }
    out |= own
    if kind in (LayerKind.csa, LayerKind.hca):
        out |= _compressor(f"{a}.compressor", D, K, ratio, kind is LayerKind.csa)
    if kind is LayerKind.csa:
        J, L = config.index_n_heads, config.index_head_dim
        out |= {f"{a}.indexer.wq_b.weight": (J * L, R), f"{a}.indexer.weights_proj.weight": (J, D)}
        out |= _compressor(f"{a}.indexer.compressor", D, L, ratio, True)
    out[f"{name}.ffn.gate.weight"] = (E, D)
    if router is Router.hash:
        out[f"{name}.ffn.gate.tid2eid"] = (config.vocab_size, config.num_experts_per_tok)
    else:
        out[f"{name}.ffn.gate.bias"] = (E,)
    for e in range(E):
        out |= _expert(f"{name}.ffn.experts.{e}", D, width)
    if config.n_shared_experts:
        out |= _expert(f"{name}.ffn.shared_experts", D, width * config.n_shared_experts)
    return out


def _compressor(
    name: str, D: int, dim: int, ratio: int, overlap: bool
) -> dict[str, tuple[int, ...]]:
    width = 2 * dim if overlap else dim
    return {
        f"{name}.wkv.weight": (width, D),
        f"{name}.wgate.weight": (width, D),
        f"{name}.ape": (ratio, width),
        f"{name}.norm.weight": (dim,),
    }


def _expert(name: str, D: int, I: int) -> dict[str, tuple[int, ...]]:  # noqa: E741
    return {f"{name}.w1.weight": (I, D), f"{name}.w2.weight": (D, I), f"{name}.w3.weight": (I, D)}


def random_weights(config: ModelConfig, seed: int) -> Weights:
    """fp32 weights for which activations and logits are of order 1 and every part matters."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in official_shapes(config).items():
        out[name] = _draw(name, shape, config, generator)
    return out


def _draw(
    name: str, shape: tuple[int, ...], config: ModelConfig, generator: torch.Generator
) -> Tensor:
    def normal(std: float, mean: float = 0.0) -> Tensor:
        return mean + std * torch.randn(shape, generator=generator)

    if name.endswith("tid2eid"):
        order = torch.rand(shape[0], config.n_routed_experts, generator=generator).argsort(dim=1)
        return order[:, : shape[1]].contiguous()
    if re.search(r"hc_\w+_scale$", name):
        return normal(0.1, 0.7)
    if re.search(r"(hc_\w+_base|ape|attn_sink)$", name):
        return normal(0.5)
    if name.endswith("gate.bias"):
        return normal(0.2)
    if len(shape) == 1:
        return normal(0.2, 1.0)
    if name == "embed.weight":
        return normal(1.0)
    return normal(shape[-1] ** -0.5)


def as_leaves(weights: Weights) -> Weights:
    """float64 leaves that collect gradients; integer tables and biases that only select do not."""
    return {
        name: w.clone()
        if not w.is_floating_point()
        else w.double().requires_grad_(not name.endswith("gate.bias"))
        for name, w in weights.items()
    }


def official_view(ours: dict[str, Tensor]) -> Weights:
    """Values or gradients under our parameter names (ARCHITECTURE.md), by official name."""
    out: Weights = {}
    for fqn, tensor in ours.items():
        name = re.sub(r"(hc_\w+)\.(fn|base|scale|gamma)$", r"\1_\2", fqn)
        stacked = re.fullmatch(r"(.*\.ffn\.experts)\.(w[123])\.weight", name)
        if stacked:
            parts = {
                f"{stacked[1]}.{e}.{stacked[2]}.weight": t for e, t in enumerate(tensor.unbind(0))
            }
            out |= parts
        else:
            out[name] = tensor
    return out


# ---- transformers -------------------------------------------------------------------------------
_HF_RULES = (
    (r"^embed\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^norm\.", "model.norm."),
    (r"^hc_head_(\w+)$", r"model.hc_head.hc_\1"),
    (r"^layers\.", "model.layers."),
    (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attn\.indexer\.compressor\.", ".attn.indexer."),
    (r"\.indexer\.weights_proj\.", ".indexer.scorer.weights_proj."),
    (r"\.attn\.indexer\.", ".attn.compressor.indexer."),
    (r"(compressor(?:\.indexer)?)\.wkv\.", r"\1.kv_proj."),
    (r"(compressor(?:\.indexer)?)\.wgate\.", r"\1.gate_proj."),
    (r"(compressor(?:\.indexer)?)\.ape$", r"\1.position_bias"),
    (r"(compressor(?:\.indexer)?)\.norm\.", r"\1.kv_norm."),
    (r"\.attn_sink$", ".sinks"),
    (r"\.wq_a\.", ".q_a_proj."),
    (r"\.wq_b\.", ".q_b_proj."),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"\.attn\.wkv\.", ".attn.kv_proj."),
    (r"\.wo_a\.", ".o_a_proj."),
    (r"\.wo_b\.", ".o_b_proj."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
    (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
    (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
)


def hf_view(weights: Weights) -> Weights:
    """Official values or gradients by transformers name (reference E.2), without MTP."""
    out: Weights = {}
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in weights.items():
        if name.startswith("mtp."):
            continue
        one = re.fullmatch(r"layers\.(\d+)\.ffn\.experts\.(\d+)\.(w[123])\.weight", name)
        if one:
            prefix = f"model.layers.{one[1]}.mlp.experts"
            experts.setdefault(prefix, {}).setdefault(int(one[2]), {})[one[3]] = tensor
            continue
        for pattern, replacement in _HF_RULES:
            name = re.sub(pattern, replacement, name)
        out[name] = tensor
    for prefix, parts in experts.items():
        rows = [parts[e] for e in range(len(parts))]
        out[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([p["w1"], p["w3"]]) for p in rows])
        out[f"{prefix}.down_proj"] = torch.stack([p["w2"] for p in rows])
    return out
