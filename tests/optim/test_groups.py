"""The table of owners: every parameter of every kind of V4 matches exactly one line of it."""

import pytest
import torch

from model.config import Attention, Residual
from model.transformer import DeepSeekV4
from optim.config import MuonConfig, OptimConfig, OptimizerName
from optim.groups import TABLE, Owner, Rule, build_table, match_rule
from tests.helpers import small_config

VARIANTS = {
    "default": {},
    "gamma": {"hc_gamma": True},
    "plain": {"residual": Residual.plain},
    "csa": {"attention": Attention.csa},
    "hca": {"attention": Attention.hca},
    "swa": {"attention": Attention.swa},
    "dense": {"attention": Attention.dense},
    "no_shared": {"n_shared_experts": 0},
    "two_mtp": {"num_nextn_predict_layers": 2, "compress_ratios": [0, 4, 8, 0, 0]},
}


def shapes_of(config):
    with torch.device("meta"):
        model = DeepSeekV4(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def table_of(config, optim=None):
    counts = {"o_groups": config.o_groups, "num_attention_heads": config.num_attention_heads}
    return {r.name: r for r in build_table(shapes_of(config), optim or OptimConfig(), counts)}


@pytest.mark.core
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_one_owner(variant):
    config = small_config(**VARIANTS[variant])
    shapes = shapes_of(config)
    table = table_of(config)
    assert list(table) == list(shapes)
    for name, record in table.items():
        assert record.shape == shapes[name]
        # By the letter of section 2.4: AdamW has the tables and all that is no matrix.
        adamw = (
            name in ("embed.weight", "head.weight")
            or len(record.shape) == 1
            or name.endswith("ape")
        )
        assert record.owner == (Owner.adamw if adamw else Owner.muon), name


def test_every_line_of_the_table_is_used():
    names = {n for keys in VARIANTS.values() for n in shapes_of(small_config(**keys))}
    used = {match_rule(name).pattern for name in names}
    assert used == {rule.pattern for rule in TABLE}


@pytest.mark.parametrize(
    ("name", "owner", "split", "decay", "num_matrices"),
    [
        ("embed.weight", "adamw", "whole", 0.2, 0),
        ("head.weight", "adamw", "whole", 0.2, 0),
        ("norm.weight", "adamw", "whole", 0.2, 0),
        ("layers.1.attn_norm.weight", "adamw", "whole", 0.2, 0),
        ("layers.1.attn.indexer.compressor.norm.weight", "adamw", "whole", 0.2, 0),
        ("layers.1.attn.attn_sink", "adamw", "whole", 0.0, 0),
        ("layers.1.attn.compressor.ape", "adamw", "whole", 0.0, 0),
        ("layers.1.hc_attn.base", "adamw", "whole", 0.0, 0),
        ("mtp.0.hc_head.scale", "adamw", "whole", 0.0, 0),
        ("layers.1.hc_attn.fn", "muon", "whole", 0.3, 1),
        ("layers.1.attn.wq_b.weight", "muon", "whole", 0.3, 1),
        ("layers.1.attn.wo_a.weight", "muon", "o_groups", 0.3, 2),
        ("layers.1.attn.indexer.wq_b.weight", "muon", "whole", 0.3, 1),
        ("layers.1.ffn.gate.weight", "muon", "whole", 0.3, 1),
        ("layers.1.ffn.experts.w2.weight", "muon", "experts", 0.3, 4),
        ("mtp.0.ffn.experts.w1.weight", "muon", "experts", 0.3, 4),
        ("mtp.0.e_proj.weight", "muon", "whole", 0.3, 1),
    ],
)
def test_owner_split_and_decay(name, owner, split, decay, num_matrices):
    optim = OptimConfig()
    optim.adamw.weight_decay, optim.muon.weight_decay = 0.2, 0.3
    record = table_of(small_config(), optim)[name]
    assert (record.owner, record.split, record.weight_decay, record.num_matrices) == (
        owner,
        split,
        decay,
        num_matrices,
    )


def test_adamw_takes_every_line_of_the_same_table():
    muon, adamw = (
        table_of(small_config()),
        table_of(small_config(), OptimConfig(name=OptimizerName.adamw)),
    )
    assert list(muon) == list(adamw)
    assert {r.owner for r in adamw.values()} == {Owner.adamw}
    assert {n for n, r in adamw.items() if not r.weight_decay} == {
        n for n, r in muon.items() if not r.weight_decay
    }


def test_splits_of_the_config_win():
    splits = {
        "<block>.attn.wo_a.weight": "whole",
        "<block>.attn.wq_b.weight": "num_attention_heads",
    }
    table = table_of(small_config(), OptimConfig(muon=MuonConfig(splits=splits)))
    assert table["layers.0.attn.wo_a.weight"].num_matrices == 1
    assert table["mtp.0.attn.wq_b.weight"].num_matrices == 2
    assert table["layers.1.attn.indexer.wq_b.weight"].num_matrices == 1


def test_experts_can_be_left_to_adamw():
    splits = {"<block>.ffn.experts.{w1,w2,w3}.weight": "adamw"}
    optim = OptimConfig(muon=MuonConfig(splits=splits))
    optim.adamw.weight_decay = 0.05
    table = table_of(small_config(), optim)
    expert, gate = table["layers.0.ffn.experts.w1.weight"], table["layers.0.ffn.gate.weight"]
    assert (expert.owner, expert.num_matrices, expert.weight_decay) == (Owner.adamw, 0, 0.05)
    assert gate.owner is Owner.muon


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.attn.wq_c.weight",
        "layers.x.attn.wq_a.weight",
        "layers.0.attn.wq_a.weight.extra",
        "model.layers.0.attn.wq_a.weight",
        "layers.0xattn.wq_a.weight",
        "embed.bias",
    ],
)
def test_unknown_parameter_is_named_with_the_patterns(name):
    with pytest.raises(ValueError, match="no rule") as error:
        build_table({name: (4, 4)}, OptimConfig(), {})
    assert name in str(error.value)
    assert "<block>.attn.wo_a.weight" in str(error.value)


def test_two_matching_lines_are_an_error_that_names_both():
    rules = (*TABLE, Rule("<block>.attn.{wkv,other}.weight", Owner.muon))
    with pytest.raises(ValueError, match="matches 2 rules") as error:
        build_table({"layers.0.attn.wkv.weight": (4, 4)}, OptimConfig(), {}, rules)
    assert "layers.0.attn.wkv.weight" in str(error.value)
    assert "<block>.attn.{wkv,other}.weight" in str(error.value)


@pytest.mark.parametrize(
    ("shape", "splits", "counts", "message"),
    [
        ((6, 4), {}, {}, "'o_groups', known are"),
        ((6, 4), {}, {"o_groups": 4}, "6 rows, not a multiple of o_groups=4"),
        ((6,), {}, {"o_groups": 2}, "takes 2 dims"),
        ((2, 3, 4), {}, {"o_groups": 2}, "takes 2 dims"),
        ((6, 4), {"<block>.attn.wo_a.weight": "experts"}, {}, "takes 3 dims"),
        ((6, 4), {"<block>.attn.wo_b.weight": "whole"}, {"o_groups": 2}, "match no parameter"),
        (
            (6, 4),
            {"<block>.attn.wo_a.weight": "whole", "<block>.attn.{wo_a,x}.weight": "whole"},
            {"o_groups": 2},
            "matches 2 patterns",
        ),
    ],
)
def test_bad_splits_are_refused(shape, splits, counts, message):
    optim = OptimConfig(muon=MuonConfig(splits=splits))
    with pytest.raises(ValueError, match=message) as error:
        build_table({"layers.0.attn.wo_a.weight": shape}, optim, counts)
    assert "wo_" in str(error.value)
