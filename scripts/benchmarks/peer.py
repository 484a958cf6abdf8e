"""The contestant ``hf`` of ``bench_step.py``: transformers' DeepseekV4 with our weights.

A file of its own, so that the other contestants don't carry its import in their peak memory.
"""

# Legend: B rows, T tokens
from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from model.config import LayerKind, ModelConfig, Residual, Router
from model.flops import training_flops
from model.init import init_weights
from model.parameter_counts import parameter_counts
from model.state_dict import to_transformers
from model.transformer import DeepSeekV4
from scripts.benchmarks.models import Contestant

_HF_KINDS = {
    LayerKind.swa: "sliding_attention",
    LayerKind.csa: "compressed_sparse_attention",
    LayerKind.hca: "heavily_compressed_attention",
}


def build_hf(
    config: ModelConfig, ids_BT: Tensor, dtype: torch.dtype, experts: str, checkpointing: bool
) -> Contestant:
    """The model of transformers with our weights: eager attention, the only kind it has.

    Args:
        config: sizes.
        ids_BT: tokens.
        dtype: of weights and compute; what transformers keeps in fp32 stays there.
        experts: its experts implementation (``grouped_mm``, ``batched_mm`` or ``eager``).
        checkpointing: recompute every layer in the backward pass.

    Raises:
        ValueError: the model has a part that transformers lacks.
    """
    hf_model = DeepseekV4ForCausalLM(_hf_config(config, experts))
    if checkpointing:
        hf_model.gradient_checkpointing_enable()
    model = cast(nn.Module, hf_model)
    model.load_state_dict(_our_weights(config))
    model.to(dtype)
    keep = set(hf_model._keep_in_fp32_modules_strict or ())
    for name, parameter in model.named_parameters():
        if keep & set(name.split(".")):
            parameter.data = parameter.data.float()
    model.to(ids_BT.device)
    model.train()

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        return loss.detach()

    flops = training_flops(config, ids_BT.shape[1], indexer_loss=False).total * ids_BT.numel()
    counts = parameter_counts(config)
    return Contestant(step, {dtype: flops}, (counts.total, counts.active))


def _our_weights(config: ModelConfig) -> dict[str, Tensor]:
    model = DeepSeekV4(config)
    init_weights(model, seed=0)
    return to_transformers(model)


def _hf_config(config: ModelConfig, experts: str) -> DeepseekV4Config:
    layers = range(config.num_hidden_layers)
    kinds = [config.kind(i) for i in layers]
    rates = {kind: {config.ratio(i) for i in layers if kinds[i] is kind} for kind in kinds}
    lacks = [kind for kind, ratios in rates.items() if kind not in _HF_KINDS or len(ratios) > 1]
    plain = config.residual is not Residual.mhc
    if lacks or plain or config.num_nextn_predict_layers or config.n_shared_experts != 1:
        raise ValueError(
            f"model={config.name} has no twin in transformers, which lacks MTP, dense attention,"
            " the plain residual, a second ratio of a kind, and other than one shared expert"
        )
    same = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim q_lora_rank o_groups"
        " o_lora_rank sliding_window index_n_heads index_head_dim index_topk n_routed_experts"
        " n_shared_experts num_experts_per_tok moe_intermediate_size routed_scaling_factor"
        " swiglu_limit hc_mult hc_sinkhorn_iters hc_eps rms_norm_eps rope_theta compress_rope_theta"
        " max_position_embeddings initializer_range"
    )
    scaling = config.rope_scaling
    values: dict[str, Any] = dict(
        **{key: getattr(config, key) for key in same.split()},
        layer_types=[_HF_KINDS[kind] for kind in kinds],
        compress_rates=dict(DeepseekV4Config.default_compress_rates)
        | {_HF_KINDS[kind]: ratios.pop() for kind, ratios in rates.items() if max(ratios)},
        mlp_layer_types=["hash_moe" if config.router(i) is Router.hash else "moe" for i in layers],
        partial_rotary_factor=config.qk_rope_head_dim / config.head_dim,
        rope_parameters={
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
        },
        use_cache=False,
        attn_implementation="eager",
        experts_implementation=experts,
    )
    return DeepseekV4Config(**values)
