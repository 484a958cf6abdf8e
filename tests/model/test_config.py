"""ModelConfig: ablation switches, refusals that name both values."""

import pytest

from model.config import Attention, Kernels, LayerKind, ModelConfig, Residual


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        ("hybrid", [("swa", 0), ("csa", 4), ("hca", 32)]),
        ("csa", [("swa", 0), ("csa", 4), ("csa", 4)]),
        ("hca", [("swa", 0), ("hca", 32), ("hca", 32)]),
        ("swa", [("swa", 0), ("swa", 0), ("swa", 0)]),
        ("dense", [("swa", 0), ("dense", 0), ("dense", 0)]),
    ],
)
def test_attention_switch_turns_every_compressed_layer(attention, expected):
    config = ModelConfig(
        num_hidden_layers=3,
        compress_ratios=[0, 4, 32, 0],
        layer_kinds=["swa", "csa", "hca"],
        attention=attention,
    )
    assert [(config.kind(i), config.ratio(i)) for i in range(3)] == [
        (LayerKind(k), r) for k, r in expected
    ]


@pytest.mark.core
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"compress_ratios": [0, 4]}, ["compress_ratios has 2", "num_hidden_layers=6"]),
        ({"compress_ratios": [0, 0, 4, 7, 4, 128, 0]}, ["compress_ratios[3]=7", "layer_kinds"]),
        (
            {"compress_ratios": [0, 0, 4, 128, 4, 128, 4]},
            ["compress_ratios ends in [4]", "num_nextn_predict_layers=1"],
        ),
        ({"num_attention_heads": 6, "o_groups": 4}, ["num_attention_heads=6", "o_groups=4"]),
        ({"num_experts_per_tok": 17}, ["num_experts_per_tok=17", "n_routed_experts=16"]),
        ({"qk_rope_head_dim": 15}, ["qk_rope_head_dim=15", "head_dim=64"]),
        ({"qk_rope_head_dim": 48}, ["qk_rope_head_dim=48", "index_head_dim=32"]),
        ({"index_head_dim": 48}, ["index_head_dim=48", "index_n_heads=16"]),
        ({"num_hash_layers": 9}, ["num_hash_layers=9", "num_hidden_layers=6"]),
        ({"layer_kinds": ["swa"]}, ["layer_kinds has 1", "num_hidden_layers=6"]),
        ({"hidden_size": 0}, ["hidden_size=0"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings=True", "False"]),
        ({"scoring_func": "softmax"}, ["scoring_func=softmax", "sqrtsoftplus"]),
        *(
            ({"residual": Residual.plain, key: on}, [f"{key}={on}", "residual=plain"])
            for key, on in (("hc_gamma", True), ("hc_identity_base", -1.0), ("hc_fn_gain", 0.5))
        ),
        ({"deterministic": False}, ["deterministic=false", "kernels=auto"]),
        (
            {"deterministic": False, "kernels": Kernels.triton, "attention": Attention.hca},
            ["deterministic=false", "no csa layer"],
        ),
    ],
)
def test_impossible_config_names_key_and_values(changes, named):
    with pytest.raises(ValueError, match="model") as error:
        ModelConfig(**changes).validate()
    assert all(part in str(error.value) for part in named)
    assert "\n" not in str(error.value)
