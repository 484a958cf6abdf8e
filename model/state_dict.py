"""Names: ours <-> official (reference E.1) <-> transformers (reference E.2); values are kept.

Ours differ from the official ones where the official name has an underscore group (``hc_attn_fn``
is ``hc_attn.fn`` here) and in the experts, which are stacked here and one by one there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from model.errors import ConfigError

_EXPERT = re.compile(r"(.*\.ffn\.experts)\.(\d+)\.(w[123])\.weight")
_STACK = re.compile(r"(.*\.ffn\.experts)\.(w[123])\.weight")
_HC = re.compile(r"(.*\.)?hc_(attn|ffn|head)([._])(fn|base|scale)")


def official_name(name: str) -> str:
    """Official name of one of ours (experts excepted: they are split)."""
    return _HC.sub(r"\1hc_\2_\4", name)


def to_official(model: nn.Module) -> dict[str, Tensor]:
    """All weights and tables under the official names, detached; gamma is folded into fn.

    Expert tensors are views of the stacks. ``tid2eid`` is int64, as on disk.
    """
    return dict(official_items(model.state_dict()))


def official_items(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The pairs of :func:`to_official`, one at a time, from our state dict."""
    for name, value in state.items():
        value = value.detach()
        if name.endswith(".gamma"):
            continue
        stacked = _STACK.fullmatch(name)
        if stacked:
            for expert, matrix in enumerate(value.unbind(0)):
                yield f"{stacked[1]}.{expert}.{stacked[2]}.weight", matrix
            continue
        gamma = state.get(name.removesuffix(".fn") + ".gamma") if name.endswith(".fn") else None
        if gamma is not None:
            value = value * gamma.detach()
        if name.endswith(".tid2eid"):
            value = value.long()
        yield official_name(name), value


@torch.no_grad()
def load_official(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy official tensors into the model; a gamma becomes 1.

    Raises:
        ValueError: names are missing or left over, or a shape differs.
    """
    state = model.state_dict()
    wanted = {name: value.shape for name, value in official_items(state)}
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        raise ConfigError(
            f"checkpoint does not fit the model: {len(missing)} tensors missing"
            f" (first {missing[:3]}), {len(extra)} not known (first {extra[:3]})"
        )
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise ConfigError(
                f"tensor {name} has shape {tuple(tensors[name].shape)},"
                f" the model wants {tuple(shape)}"
            )
    for name, target in state.items():
        if name.endswith(".gamma"):
            target.fill_(1.0)
            continue
        stacked = _STACK.fullmatch(name)
        if stacked:
            for expert in range(target.shape[0]):
                target[expert].copy_(tensors[f"{stacked[1]}.{expert}.{stacked[2]}.weight"])
        else:
            target.copy_(tensors[official_name(name)])


# Official module path -> transformers' module path, first match wins (reference E.2).
_TO_TRANSFORMERS: list[tuple[str, str]] = [
    (r"^embed\.weight$", "model.embed_tokens.weight"),
    (r"^head\.weight$", "lm_head.weight"),
    (r"^norm\.weight$", "model.norm.weight"),
    (r"^hc_head_(fn|base|scale)$", r"model.hc_head.hc_\1"),
    (r"^layers\.(\d+)\.hc_(attn|ffn)_(fn|base|scale)$", r"model.layers.\1.\2_hc.\3"),
    (r"^layers\.(\d+)\.attn_norm\.", r"model.layers.\1.input_layernorm."),
    (r"^layers\.(\d+)\.ffn_norm\.", r"model.layers.\1.post_attention_layernorm."),
    (r"^layers\.(\d+)\.attn\.attn_sink$", r"model.layers.\1.self_attn.sinks"),
    (r"^layers\.(\d+)\.attn\.wq_a\.", r"model.layers.\1.self_attn.q_a_proj."),
    (r"^layers\.(\d+)\.attn\.wq_b\.", r"model.layers.\1.self_attn.q_b_proj."),
    (r"^layers\.(\d+)\.attn\.q_norm\.", r"model.layers.\1.self_attn.q_a_norm."),
    (r"^layers\.(\d+)\.attn\.wkv\.", r"model.layers.\1.self_attn.kv_proj."),
    (r"^layers\.(\d+)\.attn\.kv_norm\.", r"model.layers.\1.self_attn.kv_norm."),
    (r"^layers\.(\d+)\.attn\.wo_([ab])\.", r"model.layers.\1.self_attn.o_\2_proj."),
    (
        r"^layers\.(\d+)\.attn\.indexer\.wq_b\.",
        r"model.layers.\1.self_attn.compressor.indexer.q_b_proj.",
    ),
    (
        r"^layers\.(\d+)\.attn\.indexer\.weights_proj\.",
        r"model.layers.\1.self_attn.compressor.indexer.scorer.weights_proj.",
    ),
    (
        r"^layers\.(\d+)\.attn\.indexer\.compressor\.",
        r"model.layers.\1.self_attn.compressor.indexer.",
    ),
    (r"^layers\.(\d+)\.attn\.compressor\.", r"model.layers.\1.self_attn.compressor."),
    (r"^layers\.(\d+)\.ffn\.gate\.bias$", r"model.layers.\1.mlp.gate.e_score_correction_bias"),
    (r"^layers\.(\d+)\.ffn\.gate\.", r"model.layers.\1.mlp.gate."),
    (
        r"^layers\.(\d+)\.ffn\.shared_experts\.w1\.",
        r"model.layers.\1.mlp.shared_experts.gate_proj.",
    ),
    (
        r"^layers\.(\d+)\.ffn\.shared_experts\.w2\.",
        r"model.layers.\1.mlp.shared_experts.down_proj.",
    ),
    (r"^layers\.(\d+)\.ffn\.shared_experts\.w3\.", r"model.layers.\1.mlp.shared_experts.up_proj."),
]
_COMPRESSOR_TAIL = [
    (r"(\.compressor(?:\.indexer)?)\.wkv\.weight$", r"\1.kv_proj.weight"),
    (r"(\.compressor(?:\.indexer)?)\.wgate\.weight$", r"\1.gate_proj.weight"),
    (r"(\.compressor(?:\.indexer)?)\.ape$", r"\1.position_bias"),
    (r"(\.compressor(?:\.indexer)?)\.norm\.weight$", r"\1.kv_norm.weight"),
]


def transformers_name(official: str) -> str:
    """Name in ``transformers``' DeepseekV4 of an official tensor (experts and MTP excepted).

    Raises:
        ValueError: the name has no counterpart.
    """
    for pattern, replacement in _TO_TRANSFORMERS:
        renamed, count = re.subn(pattern, replacement, official)
        if count:
            for tail, tail_replacement in _COMPRESSOR_TAIL:
                renamed = re.sub(tail, tail_replacement, renamed)
            return renamed
    raise ConfigError(f"tensor {official} has no name in transformers")


def to_transformers(model: nn.Module) -> dict[str, Tensor]:
    """All weights under ``transformers``' names: gate and up fused, MTP left out (it has none)."""
    state = model.state_dict()
    result: dict[str, Tensor] = {}
    for name, value in official_items({k: v for k, v in state.items() if not _STACK.fullmatch(k)}):
        if not name.startswith("mtp."):
            result[transformers_name(name)] = value
    for name, value in state.items():
        stacked = _STACK.fullmatch(name)
        if stacked is None or name.startswith("mtp.") or stacked[2] == "w3":
            continue
        prefix = "model." + stacked[1].replace(".ffn.", ".mlp.")
        if stacked[2] == "w2":
            result[f"{prefix}.down_proj"] = value.detach()
        else:
            up = state[name.replace(".w1.", ".w3.")]
            result[f"{prefix}.gate_up_proj"] = torch.cat((value, up), dim=1).detach()
    return result


@torch.no_grad()
def load_transformers(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy ``transformers``' tensors into the model; MTP blocks, which it lacks, keep their values.

    Raises:
        ValueError: names are missing or left over.
    """
    names = {transformers_name(n): n for n, _ in _main_items(model)}
    official: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            prefix = name.removeprefix("model.").replace(".mlp.", ".ffn.").rsplit(".", 1)[0]
            for expert, matrix in enumerate(value.unbind(0)):
                if name.endswith("down_proj"):
                    official[f"{prefix}.{expert}.w2.weight"] = matrix
                else:
                    gate, up = matrix.chunk(2, dim=0)
                    (
                        official[f"{prefix}.{expert}.w1.weight"],
                        official[f"{prefix}.{expert}.w3.weight"],
                    ) = gate, up
        elif name in names:
            official[names[name]] = value
        else:
            raise ConfigError(f"tensor {name} is not known to the model")
    official |= {n: v for n, v in official_items(model.state_dict()) if n.startswith("mtp.")}
    load_official(model, official)


def _main_items(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, value in official_items(model.state_dict()):
        if not name.startswith("mtp.") and not _EXPERT.fullmatch(name):
            yield name, value
