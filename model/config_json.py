"""A released ``config.json`` as a :class:`ModelConfig`, and back (reference A.1).

A key that shapes the model or its maths must be there: the defaults of ``ModelConfig`` are those of
a small model of ours, and the released files leave nothing out. Only keys for which DeepSeek-V4 has
a single value may be missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints

from conf.problems import refuse
from conf.ranges import out_of_range
from model.config import ONE_VALUE, ModelConfig, RopeScaling
from model.errors import ConfigError

# Ours alone: how the model is computed or starts, not what it is.
_OURS = {
    "scale", "kernels", "deterministic", "loss_chunk_tokens", "attention", "hc_gamma",
    "hc_identity_base", "hc_fn_gain",
}  # fmt: skip
# Of the rest, what a released file does not say (layers follow from ratios and num_hash_layers) or
# what does not touch a finished model.
_OPTIONAL = {
    "name", "layer_kinds", "routers", "residual", "yarn_from_seq_len", "initializer_range",
    *ONE_VALUE,
}  # fmt: skip
SCALING = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
# Keys that are not ours, and the only value with which the model is DeepSeek-V4.
_FOREIGN = {"hidden_act": "silu", "mlp_bias": False}


_MOST = 2**53  # of a whole number: what a float holds


def official_keys() -> list[str]:
    """Keys of ``ModelConfig`` that a ``config.json`` may hold."""
    return [key for key in ModelConfig.__dataclass_fields__ if key not in _OURS]


def from_official(values: Mapping[str, Any]) -> ModelConfig:
    """Our config of an official one; keys that do not shape the model are passed over.

    Raises:
        ConfigError: a key is missing, of another type, or its value cannot be.
    """
    keys = [key for key in official_keys() if key != "rope_scaling"]
    given = take(values, keys, _OPTIONAL)
    given["name"] = str(values.get("name", values.get("model_type", "official")))
    config = ModelConfig(**given, rope_scaling=_scaling(values))
    refuse_foreign(values)
    refuse(ConfigError, out_of_range(config, "config.json"))
    missing = config.num_hidden_layers + config.num_nextn_predict_layers
    missing -= len(config.compress_ratios)
    if 0 < missing <= config.num_nextn_predict_layers:
        config.compress_ratios = config.compress_ratios + [0] * missing
    config.validate()
    return config


def official_config(config: ModelConfig) -> dict[str, Any]:
    """A ``config.json`` of this model in the released keys, with layer kinds beside the ratios."""
    values: dict[str, Any] = {key: getattr(config, key) for key in official_keys()}
    layers = range(config.num_hidden_layers)
    extra = [0] * config.num_nextn_predict_layers
    values["compress_ratios"] = [config.ratio(i) for i in layers] + extra
    values["layer_kinds"] = [config.kind(i).value for i in layers]
    values["routers"] = [config.router(i).value for i in layers]
    scaling = {key: getattr(config.rope_scaling, key) for key in SCALING}
    values["rope_scaling"] = {"type": "yarn", **scaling}
    return {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", **values}


def take(
    values: Mapping[str, Any], keys: Iterable[str], optional: Iterable[str] = ()
) -> dict[str, Any]:
    """The values of some keys of ``ModelConfig``, each of its type; null counts as missing.

    Raises:
        ConfigError: one that is not optional is missing, or one is of another type.
    """
    types, found = get_type_hints(ModelConfig), {}
    for key in keys:
        if key not in optional or values.get(key) is not None:
            found[key] = typed(values.get(key), types[key], key)
    return found


def typed(value: Any, wanted: Any, key: str) -> Any:
    """A JSON value as a field holds it.

    Args:
        value: as parsed.
        wanted: the field's type: int, float, bool, str, an Enum, or a list of one of them.
        key: for the message.

    Raises:
        ConfigError: it is null (or missing), or of another type.
    """
    if value is None:
        raise ConfigError(f"config.json: key {key} is missing (needed to build the model)")
    if get_origin(wanted) is list:
        if isinstance(value, list | tuple):
            return [typed(v, get_args(wanted)[0], f"{key}[{i}]") for i, v in enumerate(value)]
        raise ConfigError(f"config.json: {key}={value!r} must be a list")
    if issubclass(wanted, Enum):
        if value in [member.value for member in wanted]:
            return wanted(value)
        known = ", ".join(str(member.value) for member in wanted)
        raise ConfigError(f"config.json: {key}={value!r} is none of {known}")
    if type(value) is int and abs(value) > _MOST:
        raise ConfigError(f"config.json: {key} is a number of {len(str(abs(value)))} digits")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is float and is_number:
        return float(value)
    if type(value) is not wanted:
        raise ConfigError(f"config.json: {key}={value!r} must be of type {wanted.__name__}")
    return value


def refuse_foreign(values: Mapping[str, Any]) -> None:
    """Refuse a value that would make it another model.

    Raises:
        ConfigError: names key and value.
    """
    for key, only in _FOREIGN.items():
        if values.get(key, only) != only:
            raise ConfigError(f"config.json: {key}={values[key]!r}, but DeepSeek-V4 has {only!r}")


def yarn(values: Mapping[str, Any], key: str) -> RopeScaling:
    """YaRN from the keys that both kinds of ``config.json`` share.

    Args:
        values: they.
        key: where they stand, for messages.

    Raises:
        ConfigError: one is missing or of another type.
    """
    types, found = get_type_hints(RopeScaling), {}
    for name in SCALING:
        found[name] = typed(values.get(name), types[name], f"{key}.{name}")
    return RopeScaling(**found)


def _scaling(values: Mapping[str, Any]) -> RopeScaling:
    if "rope_scaling" not in values:
        raise ConfigError("config.json: key rope_scaling is missing (null: no YaRN)")
    scaling = values["rope_scaling"]
    if scaling is None:
        return RopeScaling(factor=1.0)
    if not isinstance(scaling, dict):
        raise ConfigError(f"config.json: rope_scaling={scaling!r} must hold keys")
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind != "yarn":
        raise ConfigError(f"config.json: rope_scaling.type={kind!r}, but DeepSeek-V4 has 'yarn'")
    return yarn(scaling, "rope_scaling")
