"""Names and stacking: round trips are bitwise; the transformers side is proven in tests/parity."""

import pytest
import torch

from model.config import ModelConfig
from model.init import init_weights
from model.state_dict import (
    load_official,
    load_transformers,
    to_official,
    to_transformers,
)
from model.transformer import DeepSeekV4


def small(**changes):
    keys = {
        "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
        "head_dim": 16, "qk_rope_head_dim": 4, "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8,
        "compress_ratios": [0, 4, 128, 0], "index_n_heads": 4, "index_head_dim": 8, "index_topk": 2,
        "n_routed_experts": 4, "moe_intermediate_size": 16, "sliding_window": 4,
    }  # fmt: skip
    return ModelConfig(**(keys | changes))


def model(seed=0, **changes):
    built = DeepSeekV4(small(**changes))
    init_weights(built, seed)
    return built


@pytest.mark.core
def test_official_round_trip_is_bitwise():
    source, target = model(0), model(1)
    load_official(target, to_official(source))
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_official_names_follow_the_release():
    names = to_official(model()).keys()
    expected = {
        "embed.weight", "head.weight", "norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale",
        "layers.0.hc_attn_fn", "layers.0.ffn.gate.tid2eid", "layers.1.ffn.gate.bias",
        "layers.1.attn.attn_sink",
        "layers.1.attn.indexer.compressor.ape", "layers.1.attn.indexer.weights_proj.weight",
        "layers.2.attn.compressor.norm.weight", "layers.2.ffn.experts.3.w2.weight",
        "layers.2.ffn.shared_experts.w3.weight", "mtp.0.e_proj.weight", "mtp.0.hc_head_fn",
        "mtp.0.hc_ffn_scale", "mtp.0.ffn.gate.bias", "mtp.0.enorm.weight",
    }  # fmt: skip
    assert expected <= names
    assert not any(".hc_attn." in n or n.startswith("hc_head.") or ".experts.w" in n for n in names)


def test_transformers_round_trip_is_bitwise_without_mtp():
    source, target = model(0), model(1)
    kept = {n: v.clone() for n, v in target.state_dict().items() if n.startswith("mtp.")}
    load_transformers(target, to_transformers(source))
    for name, value in target.state_dict().items():
        assert torch.equal(value, kept.get(name, source.state_dict()[name])), name


def test_gamma_is_folded_on_export():
    source, target = model(0, hc_gamma=True), model(1)
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.5, 1.5)
    load_official(target, to_official(source))
    ids = torch.randint(0, 50, (1, 20))
    assert torch.allclose(source.logits(ids), target.logits(ids), atol=1e-5)


def test_load_refuses_missing_extra_and_misshapen_tensors():
    tensors = to_official(model())
    with pytest.raises(ValueError, match="1 tensors missing"):
        load_official(model(), {n: v for n, v in tensors.items() if n != "norm.weight"})
    with pytest.raises(ValueError, match="1 not known"):
        load_official(model(), tensors | {"surplus": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"norm.weight has shape \(3,\)"):
        load_official(model(), tensors | {"norm.weight": torch.zeros(3)})
