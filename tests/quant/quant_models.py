"""A tiny model of every layer kind whose linears straddle FP8 blocks, and batches for it."""

import torch

from model.config import LayerKind, ModelConfig
from model.init import init_weights
from model.loss import Objective
from model.transformer import DeepSeekV4


def tiny_config(**overrides):
    values = {
        "name": "quant",
        "vocab_size": 96,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "head_dim": 80,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 40,
        "o_groups": 2,
        "o_lora_rank": 96,
        "layer_kinds": [LayerKind(kind) for kind in ("swa", "csa", "hca")],
        "compress_ratios": [0, 4, 8, 0],
        "sliding_window": 8,
        "index_n_heads": 16,
        "index_head_dim": 32,
        "index_topk": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "num_hash_layers": 1,
        "num_nextn_predict_layers": 1,
        "loss_chunk_tokens": 64,
    }
    return ModelConfig(**(values | overrides))


def tiny_model(seed=0, **overrides):
    model = DeepSeekV4(tiny_config(**overrides))
    init_weights(model, seed)
    with torch.no_grad():  # nothing at a special value: norms at 1 and sinks at 0 hide mistakes
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        # E4M3 holds 2**15 of range, so a wrong block shows only where magnitudes differ as much:
        # the second group of wo_a shares a block of 128 rows with the first one's.
        for name, parameter in model.named_parameters():
            if name.endswith("wo_a.weight"):
                parameter[parameter.shape[0] // 2 :] *= 1e-4
    return model


def tiny_ids(rows=2, tokens=40, seed=0):
    return torch.randint(0, 96, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def run_step(model, ids=None, **objective):
    """Forward and backward of one batch; returns the output."""
    ids = tiny_ids() if ids is None else ids
    documents = torch.zeros_like(ids)
    pad = torch.full_like(ids[:, :2], -1)
    ahead = torch.cat((ids, pad), dim=1)
    tokens = ids.shape[1]
    labels = torch.stack((ahead[:, 1 : tokens + 1], ahead[:, 2 : tokens + 2]), dim=-1)
    targets = tuple(float((labels[..., k] >= 0).sum()) for k in range(2))
    output = model(ids, documents, labels, Objective(targets, float(ids.numel()), **objective))
    output.total.backward()
    return output
