"""The tiny config that the proofs vary."""

from __future__ import annotations

from typing import Any

from model.config import LayerKind, ModelConfig, RopeScaling


def tiny_config(**overrides: Any) -> ModelConfig:
    """Five layers of every kind, hash and learned gates; YaRN starts early enough to matter."""
    values: dict[str, Any] = {
        "name": "parity",
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "head_dim": 16,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "layer_kinds": [LayerKind(k) for k in ("swa", "hca", "csa", "hca", "csa")],
        "compress_ratios": [0, 8, 4, 8, 4],
        "sliding_window": 8,
        "index_n_heads": 64,
        "index_head_dim": 16,
        "index_topk": 3,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_hash_layers": 1,
        "swiglu_limit": 1.5,
        "rope_scaling": RopeScaling(
            factor=4.0, original_max_position_embeddings=64, beta_fast=16.0, beta_slow=1.0
        ),
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 256,
        "kernels": "reference",
        "loss_chunk_tokens": 32,
    }
    config = ModelConfig(**(values | overrides))
    config.validate()
    return config
