"""transformers' DeepseekV4 with our config and official weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from model.config import LayerKind, ModelConfig, Router
from tests.parity.weights import Weights, hf_view

_HF_KIND = {
    LayerKind.swa: "sliding_attention",
    LayerKind.csa: "compressed_sparse_attention",
    LayerKind.hca: "heavily_compressed_attention",
}
# Plain PyTorch everywhere, so that nothing hides behind a kernel.
_EAGER: dict[str, Any] = {
    "attn_implementation": "eager",
    "experts_implementation": "eager",
    "dtype": "float32",
}


def build_hf(config: ModelConfig, weights: Weights) -> nn.Module:
    """transformers' model in fp32 with these official weights; every tensor must find its place."""
    kinds = [config.kind(n) for n in range(config.num_hidden_layers)]
    rates = {_HF_KIND[kind]: config.ratio(n) for n, kind in enumerate(kinds) if config.ratio(n)}
    scaling = config.rope_scaling
    hf_config = DeepseekV4Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        moe_intermediate_size=config.moe_intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        q_lora_rank=config.q_lora_rank,
        num_experts_per_tok=config.num_experts_per_tok,
        n_routed_experts=config.n_routed_experts,
        routed_scaling_factor=config.routed_scaling_factor,
        max_position_embeddings=config.max_position_embeddings,
        rope_theta=config.rope_theta,
        compress_rope_theta=config.compress_rope_theta,
        partial_rotary_factor=config.qk_rope_head_dim / config.head_dim,
        rope_parameters={
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
        },
        layer_types=[_HF_KIND[kind] for kind in kinds],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
        | rates,
        hc_mult=config.hc_mult,
        hc_sinkhorn_iters=config.hc_sinkhorn_iters,
        hc_eps=config.hc_eps,
        mlp_layer_types=[
            "hash_moe" if config.router(n) is Router.hash else "moe"
            for n in range(config.num_hidden_layers)
        ],
        swiglu_limit=config.swiglu_limit,
        sliding_window=config.sliding_window,
        o_groups=config.o_groups,
        o_lora_rank=config.o_lora_rank,
        index_n_heads=config.index_n_heads,
        index_head_dim=config.index_head_dim,
        index_topk=config.index_topk,
        rms_norm_eps=config.rms_norm_eps,
        use_cache=False,
        **_EAGER,
    )
    model = DeepseekV4ForCausalLM(hf_config).float()
    model.load_state_dict(hf_view(weights), strict=True)
    return model.train()


def hf_index_scores(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Dicts that later forwards fill: scores [B, T, E] and choices [B, T, k] of CSA layers.

    The scores hold invisible entries too; a choice of -1 is none. Keys are our names of the layers.
    """
    scores: dict[str, Tensor] = {}
    chosen: dict[str, Tensor] = {}

    def keep(into: dict[str, Tensor], key: str) -> Any:
        return lambda module, inputs, output: into.__setitem__(key, output.detach())

    for name, module in model.named_modules():
        if name.endswith(".indexer"):
            module.register_forward_hook(keep(chosen, f"layers.{name.split('.')[2]}.attn"))
        if name.endswith(".indexer.scorer"):
            module.register_forward_hook(keep(scores, f"layers.{name.split('.')[2]}.attn"))
    return scores, chosen
