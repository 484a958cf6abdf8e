"""A released ``config.json``: what it says is what is built, and what it lacks is not made up."""

import pytest

from model.config import LayerKind, RopeScaling, Router
from model.config_json import from_official, official_config
from model.errors import ConfigError
from tests.parity.configs import tiny_config

RELEASED = {
    "model_type": "deepseek_v4", "vocab_size": 129280, "hidden_size": 4096, "num_hidden_layers": 4,
    "num_attention_heads": 64, "num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64,
    "q_lora_rank": 1024, "o_groups": 8, "o_lora_rank": 1024, "sliding_window": 128,
    "index_n_heads": 64, "index_head_dim": 128, "index_topk": 512, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 6, "moe_intermediate_size": 2048,
    "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True,
    "routed_scaling_factor": 1.5, "num_hash_layers": 3, "swiglu_limit": 10.0, "hc_mult": 4,
    "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "compress_rope_theta": 160000, "max_position_embeddings": 1048576, "initializer_range": 0.02,
    "tie_word_embeddings": False, "attention_bias": False, "hidden_act": "silu",
    "compress_ratios": [0, 128, 4, 128, 0], "num_nextn_predict_layers": 1,
    "rope_scaling": {
        "type": "yarn", "factor": 16, "original_max_position_embeddings": 65536,
        "beta_fast": 32, "beta_slow": 1,
    },
    "torch_dtype": "bfloat16", "quantization_config": {"fmt": "e4m3"},
}  # fmt: skip
ONE_VALUE = {
    "num_key_value_heads", "scoring_func", "topk_method", "norm_topk_prob", "tie_word_embeddings",
    "attention_bias",
}  # fmt: skip
NOT_OF_THE_MODEL = {
    "model_type", "initializer_range", "hidden_act", "torch_dtype", "quantization_config",
}  # fmt: skip


@pytest.mark.core
def test_every_released_value_is_taken():
    config = from_official(RELEASED)
    assert [config.kind(i).value for i in range(4)] == ["swa", "hca", "csa", "hca"]
    assert [config.ratio(i) for i in range(4)] == [0, 128, 4, 128]
    assert [config.router(i) for i in range(4)] == [Router.hash] * 3 + [Router.learned]
    assert config.rope_scaling == RopeScaling(16.0, 65536, 32.0, 1.0)
    own = RELEASED.keys() - NOT_OF_THE_MODEL - {"rope_scaling"}
    assert {key: getattr(config, key) for key in own} == {key: RELEASED[key] for key in own}


@pytest.mark.core
@pytest.mark.parametrize("key", sorted(RELEASED.keys() - ONE_VALUE - NOT_OF_THE_MODEL))
@pytest.mark.parametrize("how", ["absent", "null"])
def test_no_default_of_ours_fills_in(key, how):
    values = {k: v for k, v in RELEASED.items() if k != key}
    if how == "null":
        if key == "rope_scaling":
            assert from_official(values | {key: None}).rope_scaling.factor == 1.0
            return
        values[key] = None
    with pytest.raises(ValueError, match=f"config.json: key {key} is missing"):
        from_official(values)


@pytest.mark.parametrize("key", ["factor", "original_max_position_embeddings", "beta_fast"])
def test_no_default_of_ours_fills_in_yarn(key):
    scaling = {k: v for k, v in RELEASED["rope_scaling"].items() if k != key}
    with pytest.raises(ValueError, match=rf"config.json: key rope_scaling.{key} is missing"):
        from_official(RELEASED | {"rope_scaling": scaling})


def test_keys_with_a_single_value_may_be_absent():
    short = {key: value for key, value in RELEASED.items() if key not in ONE_VALUE}
    assert from_official(short) == from_official(RELEASED)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": "4096"}, "hidden_size='4096' must be of type int"),
        ({"hidden_size": 4096.5}, "hidden_size=4096.5 must be of type int"),
        ({"hidden_size": True}, "hidden_size=True must be of type int"),
        ({"hc_eps": "1e-6"}, "hc_eps='1e-6' must be of type float"),
        ({"compress_ratios": 4}, "compress_ratios=4 must be a list"),
        ({"compress_ratios": [0, None, 4, 128]}, r"compress_ratios\[1\] is missing"),
        ({"layer_kinds": ["swa", "hca", "csa", "ssm"]}, r"layer_kinds\[3\]='ssm' is none of swa"),
        ({"residual": ["mhc"]}, r"residual=\['mhc'\] is none of mhc, plain"),
        ({"rope_scaling": 16}, "rope_scaling=16 must hold keys"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type='linear'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', but DeepSeek-V4 has 'silu'"),
        ({"scoring_func": "sigmoid"}, "scoring_func=sigmoid is not part of DeepSeek-V4"),
    ],
)
def test_a_value_that_cannot_be_is_named(changes, named):
    with pytest.raises(ValueError, match=named):
        from_official(RELEASED | changes)


def test_ours_says_nothing_of_how_it_computes():
    """Keys that a stranger's file cannot mean, and the ablation switch, are not read."""
    config = from_official(RELEASED | {"kernels": "reference", "attention": "swa"})
    assert config.kernels.value == "auto"
    assert config.kind(2) is LayerKind.csa


def test_official_config_round_trips():
    config = tiny_config(num_nextn_predict_layers=1, num_hash_layers=2)
    again = from_official(official_config(config))
    for layer in range(config.num_hidden_layers):
        assert (again.kind(layer), again.ratio(layer)) == (config.kind(layer), config.ratio(layer))
        assert again.router(layer) == config.router(layer)
    assert again.rope_scaling == config.rope_scaling
    assert again.num_nextn_predict_layers == 1


@pytest.mark.core
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("routed_scaling_factor", 10**400),
        ("vocab_size", 2**70),
        ("num_nextn_predict_layers", 2**50),
    ],
)  # fmt: skip
def test_a_number_that_no_field_holds_is_refused(key, value):
    with pytest.raises(ConfigError, match=key):
        from_official(RELEASED | {key: value})
