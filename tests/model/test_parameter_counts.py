"""Names, shapes and totals: the closed forms of model/parameter_counts.py against the real modules.

The real modules are built on the meta device. Published totals (reference A.3) count the selection
biases, which are buffers here, and leave out the hash tables.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from model.config import LayerKind, ModelConfig, Residual, Router
from model.parameter_counts import buffer_shapes, kind_of, parameter_counts, parameter_shapes
from model.transformer import DeepSeekV4

CONF = Path(__file__).parents[2] / "conf" / "model"

# Every switch that changes names or shapes, each against the default small model.
VARIANTS = {
    "default": {},
    "csa": {"attention": "csa"},
    "hca": {"attention": "hca"},
    "swa": {"attention": "swa"},
    "dense": {"attention": "dense"},
    "plain": {"residual": Residual.plain},
    "gamma": {"hc_gamma": True},
    "two_streams": {"hc_mult": 2},
    "no_shared": {"n_shared_experts": 0},
    "three_shared": {"n_shared_experts": 3},
    "no_mtp": {"num_nextn_predict_layers": 0, "compress_ratios": [0, 0, 4, 128, 4, 128]},
    "three_mtp": {"num_nextn_predict_layers": 3, "compress_ratios": [0, 0, 4, 128, 4, 128]},
    "all_hash": {"routers": [Router.hash] * 6},
    "odd_ratios": {
        "layer_kinds": [
            LayerKind.dense,
            LayerKind.swa,
            LayerKind.csa,
            LayerKind.hca,
            LayerKind.csa,
            LayerKind.hca,
        ],
        "compress_ratios": [0, 0, 3, 5, 8, 6, 0],
    },
}


def shipped(name: str) -> ModelConfig:
    merged = OmegaConf.merge(
        OmegaConf.structured(ModelConfig), OmegaConf.load(CONF / f"{name}.yaml")
    )
    config = OmegaConf.to_object(merged)
    assert isinstance(config, ModelConfig)
    return config


def variant_config(variant: str) -> ModelConfig:
    return ModelConfig(**({"compress_ratios": [0, 0, 4, 128, 4, 128]} | VARIANTS[variant]))


def on_meta(config: ModelConfig) -> DeepSeekV4:
    with torch.device("meta"):
        return DeepSeekV4(config)


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "total", "main"),
    [
        ("v4_flash", 290_942_289_362, 284_332_240_471),
        ("v4_pro", 1_598_837_347_742, 1_572_997_201_763),
    ],
)
def test_released_totals_to_the_last_digit(name, total, main):
    config = shipped(name)
    model = on_meta(config)
    counted = {fqn: p.numel() for fqn, p in model.named_parameters()}
    counted |= {fqn: b.numel() for fqn, b in model.named_buffers() if fqn.endswith("gate.bias")}
    assert sum(counted.values()) == total
    assert sum(n for fqn, n in counted.items() if not fqn.startswith("mtp.")) == main
    assert (parameter_counts(config).total, parameter_counts(config).main) == (total, main)


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "active", "without_embedding", "mtp"),
    [("v4_flash", 13.800, 13.270, 0.319), ("v4_pro", 49.779, 48.852, 0.869)],
)
def test_released_active_counts(name, active, without_embedding, mtp):
    counts = parameter_counts(shipped(name))
    assert round(counts.active / 1e9, 3) == active
    assert round(counts.active_without_embedding / 1e9, 3) == without_embedding
    assert round(counts.active_by_kind["mtp"] / 1e9, 3) == mtp


@pytest.mark.parametrize("variant", VARIANTS)
def test_closed_form_equals_the_real_modules(variant):
    config = variant_config(variant)
    model = on_meta(config)
    real = {fqn: tuple(p.shape) for fqn, p in model.named_parameters()}
    assert parameter_shapes(config) == real
    saved = {fqn: tuple(t.shape) for fqn, t in model.state_dict().items() if fqn not in real}
    assert buffer_shapes(config) == saved


SHIPPED = {path.stem for path in CONF.glob("*.yaml")} - {"v4_scaled"}  # a family, by model.scale


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_models_equal_their_closed_form(name):
    config = shipped(name)
    real = {fqn: tuple(p.shape) for fqn, p in on_meta(config).named_parameters()}
    assert parameter_shapes(config) == real


def test_counts_do_not_depend_on_sequence_or_top_k():
    base = variant_config("default")
    other = replace(base, index_topk=999, sliding_window=7, hc_sinkhorn_iters=3)
    assert parameter_counts(base) == parameter_counts(other)


@pytest.mark.core
@pytest.mark.parametrize(
    ("fqn", "kind"),
    [
        ("embed.weight", "embedding"),
        ("head.weight", "head"),
        ("hc_head.fn", "mhc"),
        ("norm.weight", "norms"),
        ("layers.0.attn_norm.weight", "norms"),
        ("layers.0.attn.q_norm.weight", "norms"),
        ("layers.0.attn.attn_sink", "attention"),
        ("layers.0.attn.wo_a.weight", "attention"),
        ("layers.2.attn.compressor.norm.weight", "compressor"),
        ("layers.2.attn.indexer.compressor.ape", "indexer"),
        ("layers.0.hc_ffn.scale", "mhc"),
        ("layers.0.ffn.gate.weight", "gate"),
        ("layers.0.ffn.gate.bias", "gate_bias"),
        ("layers.0.ffn.experts.w1.weight", "experts"),
        ("layers.0.ffn.shared_experts.w1.weight", "shared"),
        ("mtp.0.ffn.experts.w1.weight", "mtp"),
    ],
)
def test_kind_of_a_parameter(fqn, kind):
    assert kind_of(fqn) == kind


def test_a_name_of_no_kind_is_refused():
    with pytest.raises(ValueError, match=r"layers\.0\.mystery"):
        kind_of("layers.0.mystery")
