"""``config.json`` of ``transformers``' DeepseekV4, from our config and back (reference E.2)."""

from __future__ import annotations

from typing import Any

from model.config import ONE_VALUE, LayerKind, ModelConfig, Residual, RopeScaling, Router
from model.config_json import SCALING, refuse_foreign, take, typed, yarn
from train.errors import UserError

_KINDS = {
    LayerKind.swa: "sliding_attention",
    LayerKind.csa: "compressed_sparse_attention",
    LayerKind.hca: "heavily_compressed_attention",
}
_DEFAULT_RATES = {_KINDS[LayerKind.csa]: 4, _KINDS[LayerKind.hca]: 128}
_ROUTERS = {Router.learned: "moe", Router.hash: "hash_moe"}
# Keys that mean the same in both.
_SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "sliding_window", "index_n_heads",
    "index_head_dim", "index_topk", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
    "moe_intermediate_size", "scoring_func", "norm_topk_prob", "routed_scaling_factor",
    "swiglu_limit", "hc_mult", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps", "rope_theta",
    "compress_rope_theta", "max_position_embeddings", "tie_word_embeddings", "attention_bias",
    "num_nextn_predict_layers", "initializer_range",
)  # fmt: skip
_OPTIONAL = {*ONE_VALUE, "initializer_range"}
# Bases, and the part of their rope_parameters in which each stands too.
_ROPE = {"rope_theta": "main", "compress_rope_theta": "compress"}


def transformers_config(config: ModelConfig) -> dict[str, Any]:
    """Keys of ``DeepseekV4Config``.

    Raises:
        UserError: a part of the model that ``transformers`` does not have.
    """
    kinds = [config.kind(layer) for layer in range(config.num_hidden_layers)]
    _refuse(config, kinds)
    rates = dict(_DEFAULT_RATES)
    for layer, kind in enumerate(kinds):
        if ratio := config.ratio(layer):
            rates[_KINDS[kind]] = ratio
    rotary = config.qk_rope_head_dim / config.head_dim
    compress: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling.factor != 1:
        compress = {"rope_type": "yarn", "attention_factor": 1.0}
        compress |= {key: getattr(config.rope_scaling, key) for key in SCALING}
    compress |= {"rope_theta": config.compress_rope_theta, "partial_rotary_factor": rotary}
    main = {
        "rope_type": "default",
        "rope_theta": config.rope_theta,
        "partial_rotary_factor": rotary,
    }
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "name": config.name,
        **{key: getattr(config, key) for key in _SHARED},
        "layer_types": [_KINDS[kind] for kind in kinds],
        "compress_rates": rates,
        "mlp_layer_types": [_ROUTERS[config.router(n)] for n in range(config.num_hidden_layers)],
        "partial_rotary_factor": rotary,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "rope_parameters": {"main": main, "compress": compress},
    }


def _refuse(config: ModelConfig, kinds: list[LayerKind]) -> None:
    def refuse(what: str) -> None:
        raise UserError(f"transformers cannot hold this model: {what}; export --to official")

    for other in (LayerKind.dense, LayerKind.mha):
        if other in kinds:
            refuse(f"layer {kinds.index(other)} is {other.value}")
    if Residual(config.residual) is not Residual.mhc:
        refuse(f"model.residual={config.residual}")
    if config.n_shared_experts != 1:
        refuse(f"model.n_shared_experts={config.n_shared_experts}, it has 1")
    for kind in (LayerKind.csa, LayerKind.hca):
        ratios = sorted({config.ratio(layer) for layer, k in enumerate(kinds) if k is kind})
        if len(ratios) > 1:
            refuse(f"{kind.value} layers use the ratios {ratios}, it has one a kind")


def is_transformers_config(values: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is theirs and not an official one."""
    return "layer_types" in values and "compress_ratios" not in values


def from_transformers_config(values: dict[str, Any]) -> ModelConfig:
    """Our config of theirs.

    Raises:
        ValueError: a key is missing or of another type, or the values cannot be.
    """
    shared = take(values, (k for k in _SHARED if k not in _ROPE), _OPTIONAL)
    bases: dict[str, Any] = {key: _base(values, key, part) for key, part in _ROPE.items()}
    layers = shared["num_hidden_layers"]
    kinds = [_of(_KINDS, name, "layer_types") for name in _listed(values, "layer_types", layers)]
    routers = [
        _of(_ROUTERS, name, "mlp_layer_types")
        for name in _listed(values, "mlp_layer_types", layers)
    ]
    ratios = [_rate(values, kind) if kind is not LayerKind.swa else 0 for kind in kinds]
    rotary = typed(values.get("partial_rotary_factor"), float, "partial_rotary_factor")
    if not 0 < rotary <= 1:
        raise UserError(f"config.json: partial_rotary_factor={rotary} must be in (0, 1]")
    refuse_foreign(values)
    config = ModelConfig(
        **shared,
        **bases,
        name=str(values.get("name", values.get("model_type", "transformers"))),
        layer_kinds=kinds,
        compress_ratios=ratios,
        routers=routers,
        num_hash_layers=routers.count(Router.hash),
        qk_rope_head_dim=round(shared["head_dim"] * rotary),
        rope_scaling=_scaling(values),
    )
    config.validate()
    config.compress_ratios = ratios + [0] * config.num_nextn_predict_layers
    return config


def _listed(values: dict[str, Any], key: str, layers: int) -> list[Any]:
    found = values.get(key)
    if not isinstance(found, list):
        raise UserError(f"config.json: {key}={found!r} must be a list")
    return found[:layers]


def _rate(values: dict[str, Any], kind: LayerKind) -> int:
    return typed(_section(values, "compress_rates").get(_KINDS[kind]), int,
                 f"compress_rates.{_KINDS[kind]}")  # fmt: skip


def _section(values: dict[str, Any], *path: str) -> dict[str, Any]:
    for depth, key in enumerate(path):
        found = values.get(key)
        if not isinstance(found, dict):
            raise UserError(f"config.json: {'.'.join(path[: depth + 1])} must hold keys")
        values = found
    return values


def _base(values: dict[str, Any], key: str, part: str) -> float:
    """A base; what stands in ``rope_parameters`` is what they read."""
    where = f"rope_parameters.{part}.rope_theta"
    base = typed(_section(values, "rope_parameters", part).get("rope_theta"), float, where)
    if values.get(key) not in (None, base):
        raise UserError(f"config.json: {key}={values[key]!r}, but {where}={base}")
    return base


def _scaling(values: dict[str, Any]) -> RopeScaling:
    rope = _section(values, "rope_parameters", "compress")
    kinds = {part: _section(values, "rope_parameters", part).get("rope_type") for part in _PARTS}
    for part, known in _PARTS.items():
        if kinds[part] not in known:
            raise UserError(
                f"config.json: rope_parameters.{part}.rope_type={kinds[part]!r}, but DeepSeek-V4"
                f" has {' or '.join(known)}"
            )
    if kinds["compress"] == "default":
        return RopeScaling(factor=1.0)
    if rope.get("attention_factor", 1.0) != 1:
        raise UserError(
            "config.json: rope_parameters.compress.attention_factor="
            f"{rope['attention_factor']!r}, but DeepSeek-V4 has 1"
        )
    return yarn(rope, "rope_parameters.compress")


_PARTS = {"main": ("default",), "compress": ("default", "yarn")}


def _of(table: dict[Any, str], name: str, key: str) -> Any:
    for ours, theirs in table.items():
        if theirs == name:
            return ours
    raise UserError(f"config.json: {key} has {name!r}, known are {sorted(table.values())}")
