"""Closed forms of cost: against torch's FLOP counter, brute force and the published ratios.

torch's counter sees matmuls only. The reference kernels leave out of its sight, and the test adds:
the collapse and spread of the streams and the compressor's weighted sums (elementwise there). They
multiply masked scores too, so the closed form is given the number of keys they really multiply.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from model.config import Attention, IndexerPhase, Kernels, LayerKind, ModelConfig, Residual
from model.decoding_costs import (
    decoding_flops,
    gqa8_kv_cache_bytes,
    kv_cache_bytes,
    v32_decoding_flops,
    v32_kv_cache_bytes,
)
from model.flops import (
    Keys,
    mean_entries,
    mean_keys,
    mean_min,
    training_flops,
    training_flops_by_block,
)
from model.init import init_weights
from model.loss import Objective
from model.transformer import DeepSeekV4

CONF = Path(__file__).parents[2] / "conf" / "model"
MILLION = 10**6

SMALL = ModelConfig(
    kernels=Kernels.reference, vocab_size=96, hidden_size=32, num_attention_heads=4, head_dim=16,
    qk_rope_head_dim=8, q_lora_rank=24, o_lora_rank=12, compress_ratios=[0, 0, 4, 8, 3, 6, 0],
    layer_kinds=[LayerKind(k) for k in ("swa", "dense", "csa", "hca", "csa", "hca")],
    index_n_heads=4, index_head_dim=8, index_topk=3, sliding_window=8, n_routed_experts=4,
    moe_intermediate_size=20,
)  # fmt: skip


def shipped(name: str) -> ModelConfig:
    merged = OmegaConf.merge(
        OmegaConf.structured(ModelConfig), OmegaConf.load(CONF / f"{name}.yaml")
    )
    config = OmegaConf.to_object(merged)
    assert isinstance(config, ModelConfig)
    return config


# ---- against torch's counter ------------------------------------------------------------------


def reference_keys(
    config: ModelConfig, kind: LayerKind, ratio: int, seq_len: int, phase: str, indexer_loss: bool
) -> Keys:
    """Keys the reference kernels multiply: every token and entry of the row, masked or not."""
    entries = seq_len // ratio if ratio else 0
    runs = kind is LayerKind.csa and (phase == "sparse" or indexer_loss)
    taught = entries if runs and indexer_loss else 0
    return Keys(seq_len + entries, entries if runs else 0, taught)


def unseen(config: ModelConfig, indexer_runs: bool, indexer_loss: bool) -> tuple[float, float]:
    """Contractions per token, forward and backward, that the reference does elementwise."""
    depths, wide = config.num_nextn_predict_layers, 2.0 * config.num_streams * config.hidden_size
    mhc = config.residual is Residual.mhc
    # A sublayer collapses and spreads, a head collapses only.
    forward = wide * (4 * (config.num_hidden_layers + depths) + 1 + depths) if mhc else 0.0
    indexers = 0.0
    for layer in range(config.num_hidden_layers):
        if config.kind(layer) is LayerKind.csa:
            forward += 2.0 * 2 * config.head_dim
            indexers += 2.0 * 2 * config.index_head_dim
        elif config.kind(layer) is LayerKind.hca:
            forward += 2.0 * config.head_dim
    return (
        forward + (indexers if indexer_runs else 0),
        2 * (forward + (indexers if indexer_loss else 0)),
    )


def computed_twice(config: ModelConfig, seq_len: int, phase: str) -> float:
    """Per token, with the indexer's loss on: the teacher's scores, and scores after a top-k."""
    total = 0.0
    for layer in range(config.num_hidden_layers):
        if config.kind(layer) is LayerKind.csa:
            entries = seq_len // config.ratio(layer)
            total += 2.0 * config.num_attention_heads * config.head_dim * entries
            if phase == "sparse":
                total += 2.0 * config.index_n_heads * (config.index_head_dim + 1) * entries
    return total


def counted(config: ModelConfig, seq_len: int, phase: str, indexer_loss: bool) -> float:
    """FLOPs per token that torch sees in one step of the real model."""
    model = DeepSeekV4(config)
    init_weights(model, seed=0)
    if phase == "warmup":
        for fqn, parameter in model.named_parameters():
            parameter.requires_grad_(".indexer." in fqn)
    generator = torch.Generator().manual_seed(0)
    depths = 1 + config.num_nextn_predict_layers
    tokens = 2 * seq_len
    ids = torch.randint(config.vocab_size, (2, seq_len), generator=generator)
    labels = torch.randint(config.vocab_size, (2, seq_len, depths), generator=generator)
    objective = Objective(
        targets_K=(tokens,) * depths,
        tokens=tokens,
        indexer_weight=0.01 if indexer_loss else 0.0,
        indexer_phase=IndexerPhase(phase),
    )

    def addmm_in_place(_: Any, a: Any, b: Any, *__: Any, **___: Any) -> int:
        return 2 * a[0] * a[1] * b[1]  # the chunked loss adds the head's gradient up with it

    mapping: dict[Any, Any] = {torch.ops.aten.addmm_: addmm_in_place}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(ids, torch.zeros_like(ids), labels, objective).total.backward()
    return counter.get_total_flops() / tokens


VARIANTS: dict[str, dict[str, Any]] = {
    "every_kind": {},
    "swa": {"attention": Attention.swa},
    "csa": {"attention": Attention.csa},
    "plain": {"residual": Residual.plain},
    "two_streams_no_shared": {"hc_mult": 2, "n_shared_experts": 0},
    "two_mtp_two_shared": {
        "num_nextn_predict_layers": 2,
        "n_shared_experts": 2,
        "compress_ratios": [0, 0, 4, 8, 3, 6, 0, 0],
    },
    "no_mtp": {"num_nextn_predict_layers": 0, "compress_ratios": [0, 0, 4, 8, 3, 6]},
}


@pytest.mark.parametrize(
    ("variant", "indexer_loss"), [*((name, True) for name in VARIANTS), ("every_kind", False)]
)
def test_training_flops_equal_torchs_counter(variant, indexer_loss):
    config = replace(SMALL, **VARIANTS[variant])
    closed = training_flops(config, 24, "sparse", indexer_loss, reference_keys).total
    closed -= sum(unseen(config, True, indexer_loss))
    closed += computed_twice(config, 24, "sparse") if indexer_loss else 0.0
    assert counted(config, 24, "sparse", indexer_loss) == pytest.approx(closed, rel=1e-12)


@pytest.mark.parametrize("indexer_loss", [True, False])
def test_full_phase_equals_torchs_counter(indexer_loss):
    closed = training_flops(SMALL, 24, "full", indexer_loss, reference_keys).total
    closed -= sum(unseen(SMALL, indexer_loss, indexer_loss))
    closed += computed_twice(SMALL, 24, "full") if indexer_loss else 0.0
    assert counted(SMALL, 24, "full", indexer_loss) == pytest.approx(closed, rel=1e-12)


def test_warmup_phase_trains_the_indexer_alone():
    flops = training_flops(SMALL, 24, "warmup", True, reference_keys)
    assert {part for part, cost in flops.backward.items() if cost} == {"indexer"}
    indexer_sums = 2 * 2.0 * 2 * SMALL.index_head_dim  # two layers' pooling, elementwise
    closed = flops.total - unseen(SMALL, True, True)[0] - 2 * indexer_sums
    closed += computed_twice(SMALL, 24, "warmup")
    assert counted(SMALL, 24, "warmup", True) == pytest.approx(closed, rel=1e-12)


# ---- keys and sums ----------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("seq_len", [1, 3, 7, 16, 100])
def test_mean_keys_equal_brute_force(seq_len):
    config = replace(SMALL, sliding_window=5, index_topk=3)
    queries = range(1, seq_len + 1)
    window = sum(min(t, 5) for t in queries) / seq_len
    assert mean_min(5, seq_len) == pytest.approx(window)
    for ratio in (1, 3, 4):
        visible = sum(t // ratio for t in queries) / seq_len
        chosen = sum(min(t // ratio, 3) for t in queries) / seq_len
        assert mean_entries(ratio, seq_len) == pytest.approx(visible)
        assert mean_entries(ratio, seq_len, 3) == pytest.approx(chosen)
        found = mean_keys(config, LayerKind.csa, ratio, seq_len, "sparse", True)
        assert (found.core, found.scored, found.taught) == pytest.approx(
            (window + chosen, visible, chosen)
        )
        found = mean_keys(config, LayerKind.csa, ratio, seq_len, "full", True)
        assert (found.core, found.scored, found.taught) == pytest.approx(
            (window + visible, visible, visible)
        )
        found = mean_keys(config, LayerKind.hca, ratio, seq_len, "sparse", True)
        assert (found.core, found.scored, found.taught) == pytest.approx((window + visible, 0, 0))
    dense = mean_keys(config, LayerKind.dense, 0, seq_len, "sparse", True)
    assert dense.core == pytest.approx((seq_len + 1) / 2)


@pytest.mark.core
def test_blocks_and_parts_add_up_to_the_same_total():
    blocks = training_flops_by_block(SMALL, 1000)
    assert list(blocks) == [*(f"layers.{i}" for i in range(6)), "head", "mtp.0"]
    assert sum(blocks.values()) == pytest.approx(training_flops(SMALL, 1000).total, rel=1e-12)


@pytest.mark.core
def test_a_trained_token_of_flash_costs_about_six_flops_per_active_parameter():
    # 6 x 13.3 B without attention scores; MTP, streams and 4K of attention come on top.
    total = training_flops(shipped("v4_flash"), 4096).total
    assert 6 * 13.27e9 < total < 1.2 * 6 * 13.27e9


def test_impossible_phases_are_refused():
    with pytest.raises(ValueError, match="'dense' is none of"):
        training_flops(SMALL, 16, phase="dense")
    with pytest.raises(ValueError, match="indexer_loss=False"):
        training_flops(SMALL, 16, phase="warmup", indexer_loss=False)


# ---- published ratios (reference F) -------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "gigabytes", "of_v32", "of_gqa8"),
    [("v4_flash", 3.517, 0.073, 0.0200), ("v4_pro", 5.036, 0.105, 0.0202)],
)
def test_kv_cache_at_a_million_tokens(name, gigabytes, of_v32, of_gqa8):
    config = shipped(name)
    size = kv_cache_bytes(config, MILLION)
    assert round(size / 1e9, 3) == gigabytes
    assert round(size / v32_kv_cache_bytes(MILLION), 3) == of_v32
    assert round(size / gqa8_kv_cache_bytes(config.num_hidden_layers, MILLION), 4) == of_gqa8


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "gemm", "core", "index", "total", "of_v32", "of_v32_at_128k"),
    [
        ("v4_flash", 26.5, 22.6, 86.0, 114.8, 0.100, 0.15),
        ("v4_pro", 97.7, 73.6, 122.9, 306.3, 0.268, 0.52),
    ],
)
def test_decoding_flops_at_a_million_tokens(name, gemm, core, index, total, of_v32, of_v32_at_128k):
    config = shipped(name)
    flops = decoding_flops(config, MILLION)
    parts = (flops.gemm, flops.core, flops.index, flops.fp8_equivalent)
    assert tuple(round(part / 1e9, 1) for part in parts) == (gemm, core, index, total)
    assert flops.raw == flops.gemm + flops.core + flops.index
    ratio = flops.fp8_equivalent / v32_decoding_flops(MILLION).fp8_equivalent
    assert round(ratio, 3) == of_v32
    at_128k = decoding_flops(config, 131072), v32_decoding_flops(131072)
    assert round(at_128k[0].fp8_equivalent / at_128k[1].fp8_equivalent, 2) == of_v32_at_128k


@pytest.mark.core
def test_v32_decoding_flops():
    flops = v32_decoding_flops(MILLION)
    assert round(flops.fp8_equivalent / 1e9, 1) == 1143.0
    assert round(2 * flops.core / 1e9, 1) == 69.6
    assert round(flops.index / 1e9, 1) == 999.4


def test_short_contexts_hold_no_more_than_there_is():
    config = shipped("v4_flash")
    rows = 3 * config.num_hidden_layers  # 3 tokens: no entry yet, 3 window rows a layer
    assert kv_cache_bytes(config, 3) == 584 * rows
    assert decoding_flops(config, 3).index == 0
    assert decoding_flops(config, 3).core == 4.0 * 64 * 512 * rows


def test_dense_attention_keeps_every_token():
    config = replace(SMALL, attention=Attention.dense)
    per_token = kv_cache_bytes(config, 2001) - kv_cache_bytes(config, 2000)
    row = 8 + 2 * 8 + 8  # 8 FP8 channels, 8 bf16 RoPE channels, scales padded to 8 bytes
    assert per_token == 5 * row  # layer 0 stays window-only
    assert decoding_flops(config, 2000).index == 0
