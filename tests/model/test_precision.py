"""The precision table: each parameter matches one line; what V4 keeps in fp32 stays fp32."""

import re

import pytest
import torch

from model.config import ModelConfig
from model.parameter_counts import parameter_shapes
from model.precision import TABLE, precision_of

pytestmark = pytest.mark.core

CONFIG = ModelConfig(
    hc_gamma=True, num_nextn_predict_layers=2, compress_ratios=[0, 0, 4, 128, 4, 128]
)


@pytest.mark.parametrize(
    ("name", "compute"),
    [
        ("embed.weight", torch.bfloat16),
        ("layers.2.attn.wq_a.weight", torch.bfloat16),
        ("layers.2.attn.wq_b.weight", torch.bfloat16),
        ("layers.2.attn.wkv.weight", torch.bfloat16),
        ("layers.2.attn.wo_a.weight", torch.bfloat16),
        ("layers.2.attn.wo_b.weight", torch.bfloat16),
        ("layers.2.attn.indexer.wq_b.weight", torch.bfloat16),
        ("layers.2.attn.indexer.weights_proj.weight", torch.bfloat16),
        ("layers.2.ffn.experts.w2.weight", torch.bfloat16),
        ("layers.2.ffn.shared_experts.w3.weight", torch.bfloat16),
        ("mtp.1.e_proj.weight", torch.bfloat16),
        ("mtp.0.attn.wkv.weight", torch.bfloat16),
        ("head.weight", torch.float32),
        ("norm.weight", torch.float32),
        ("hc_head.fn", torch.float32),
        ("layers.2.hc_attn.base", torch.float32),
        ("layers.2.hc_ffn.gamma", torch.float32),
        ("layers.2.attn.attn_sink", torch.float32),
        ("layers.2.attn.q_norm.weight", torch.float32),
        ("layers.2.attn.compressor.wkv.weight", torch.float32),
        ("layers.2.attn.compressor.ape", torch.float32),
        ("layers.2.attn.indexer.compressor.wgate.weight", torch.float32),
        ("layers.2.ffn.gate.weight", torch.float32),
        ("mtp.1.enorm.weight", torch.float32),
    ],
)
def test_compute_dtype_under_bf16(name, compute):
    assert name in parameter_shapes(CONFIG)
    dtypes = precision_of(name, "bf16")
    assert (dtypes.storage, dtypes.compute, dtypes.reduce) == (
        torch.float32,
        compute,
        torch.float32,
    )


def test_every_parameter_matches_and_no_line_is_dead():
    used = {precision_line(fqn) for fqn in parameter_shapes(CONFIG)}
    assert used == {pattern for pattern, _ in TABLE}


def precision_line(fqn: str) -> str:
    precision_of(fqn, "bf16")  # raises unless exactly one line matches
    return next(pattern for pattern, _ in TABLE if re.fullmatch(pattern, fqn))


def test_fp32_runs_compute_everything_in_fp32():
    for fqn in parameter_shapes(CONFIG):
        dtypes = precision_of(fqn, "fp32")
        assert {dtypes.storage, dtypes.compute, dtypes.reduce} == {torch.float32}


def test_vectors_and_tables_never_leave_fp32():
    for fqn, shape in parameter_shapes(CONFIG).items():
        if len(shape) == 1:
            assert precision_of(fqn, "bf16").compute is torch.float32


def test_unknown_names_and_precisions_are_refused():
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.wz\.weight matches 0 lines"):
        precision_of("layers.0.attn.wz.weight", "bf16")
    with pytest.raises(ValueError, match=r"train\.precision=fp8"):
        precision_of("embed.weight", "fp8")


def test_head_precision_changes_the_head_alone():
    assert precision_of("head.weight", "bf16").compute is torch.float32
    assert precision_of("head.weight", "bf16", head="bf16").compute is torch.bfloat16
    same = "layers.0.attn.wkv.weight"
    assert precision_of(same, "bf16", head="bf16") == precision_of(same, "bf16")
