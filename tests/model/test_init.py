"""Initialisation: every parameter matches one line, bits depend on seed and name alone.

Statistical bounds: the sample deviation of n normal numbers strays from the true one by less than
5 / sqrt(2 n) of it, the sample mean by less than 5 / sqrt(n) deviations (5 sigma, fixed seeds).
"""

import math
import re

import pytest
import torch
from torch import nn

from model.config import LayerKind, ModelConfig
from model.init import TABLE, Region, _fill, distribution_of, init_weights, stream_seed, whole
from model.parameter_counts import buffer_shapes, parameter_shapes
from model.transformer import DeepSeekV4
from tests.helpers import table_load

CONFIG = ModelConfig(
    vocab_size=64, hidden_size=32, q_lora_rank=16, moe_intermediate_size=16, n_routed_experts=4,
    hc_gamma=True, initializer_range=0.3, num_nextn_predict_layers=2, num_hash_layers=2,
    compress_ratios=[0, 0, 4, 16, 4, 16],
    layer_kinds=[LayerKind(k) for k in ("swa", "swa", "csa", "hca", "csa", "hca")],
)  # fmt: skip


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    model = DeepSeekV4(CONFIG)
    init_weights(model, seed=11)
    return model.state_dict()


@pytest.mark.core
def test_every_parameter_matches_and_no_line_is_dead():
    used = set()
    for fqn in parameter_shapes(CONFIG):
        distribution_of(fqn)  # raises unless exactly one line matches
        used |= {pattern for pattern, _ in TABLE if re.fullmatch(pattern, fqn)}
    assert used == {pattern for pattern, _ in TABLE}


def test_matrices_are_normal_with_the_configured_range(tensors):
    drawn = 0
    for fqn, shape in parameter_shapes(CONFIG).items():
        if len(shape) == 1 or fqn.endswith(".ape"):
            continue
        values, n = tensors[fqn].double(), tensors[fqn].numel()
        assert abs(float(values.std()) / 0.3 - 1) < 5 / math.sqrt(2 * n), fqn
        assert abs(float(values.mean())) < 0.3 * 5 / math.sqrt(n), fqn
        drawn += n
    assert drawn > 100_000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("norm.weight", 1.0),
        ("layers.2.attn.kv_norm.weight", 1.0),
        ("layers.2.attn.indexer.compressor.norm.weight", 1.0),
        ("mtp.1.hnorm.weight", 1.0),
        ("layers.2.attn.compressor.ape", 0.0),
        ("layers.3.attn.attn_sink", 0.0),
        ("layers.2.hc_attn.base", 0.0),
        ("hc_head.base", 0.0),
        ("layers.2.hc_ffn.scale", 0.01),
        ("mtp.0.hc_head.scale", 0.01),
        ("layers.2.hc_attn.gamma", 1.0),
        ("layers.2.ffn.gate.bias", 0.0),
    ],
)
def test_constants(tensors, name, value):
    assert torch.equal(tensors[name], torch.full_like(tensors[name], value))


def initial_tensor(fqn, shape, seed, config):
    tensor = torch.empty(shape)
    _fill(whole(tensor), fqn, seed, config, distribution_of(fqn))
    return tensor


def test_identity_base_sits_on_the_diagonal_of_comb():
    config = ModelConfig(hc_mult=3, hc_identity_base=8.0)
    base = initial_tensor("layers.0.hc_attn.base", (15,), 0, config)
    assert torch.equal(base[:6], torch.zeros(6))
    assert torch.equal(base[6:].view(3, 3), 8.0 * torch.eye(3))


def test_gain_spreads_mixes_alike_at_every_width():
    """A mix of an input of RMS 1 is normal with the deviation of fn times the input's norm."""
    for width in (16, 64, 256):
        config = ModelConfig(hidden_size=width, hc_fn_gain=0.5)
        fn_MC = initial_tensor("layers.0.hc_ffn.fn", (24, 4 * width), 3, config)
        spread, n = float(fn_MC.double().std()) * math.sqrt(4 * width), fn_MC.numel()
        assert abs(spread / 0.5 - 1) < 5 / math.sqrt(2 * n), width
    other = initial_tensor("layers.0.ffn.gate.weight", (8, 64), 3, config)
    assert float(other.std()) == pytest.approx(config.initializer_range, rel=5 / 32)


@pytest.mark.core
def test_same_seed_same_bits_other_seed_name_or_expert_others():
    def draw(fqn: str, seed: int) -> torch.Tensor:
        return initial_tensor(fqn, (4, 8, 8), seed, CONFIG)

    w1 = draw("layers.0.ffn.experts.w1.weight", 3)
    assert torch.equal(w1, draw("layers.0.ffn.experts.w1.weight", 3))
    for other in (
        draw("layers.0.ffn.experts.w1.weight", 4),
        draw("layers.1.ffn.experts.w1.weight", 3),
        draw("layers.0.ffn.experts.w3.weight", 3),
        w1.roll(1, dims=0),
    ):
        assert not (w1 == other).any()


@pytest.mark.core
def test_stream_seed_is_stable():
    # A constant, so that checkpoints of one version can be compared with runs of another.
    assert stream_seed(1234, "embed.weight") == 3396205273554941808
    assert 0 <= stream_seed(0, "head.weight", 5) < 2**63


def test_bits_do_not_depend_on_what_else_is_created(tensors):
    stage = DeepSeekV4(CONFIG)  # as a pipeline stage: some layers only
    for number in ("0", "1", "2", "5"):
        del stage.layers[number]
    del stage.embed, stage.mtp
    init_weights(stage, seed=11)
    kept = stage.state_dict()
    assert {name.split(".")[1] for name in kept if name.startswith("layers.")} == {"3", "4"}
    for name, tensor in kept.items():
        assert torch.equal(tensor, tensors[name]), name


class Shards(nn.Module):
    """What one rank of a layout holds: some rows, columns or experts of a few real tensors."""

    def __init__(self, parts: dict[str, tuple[slice, ...]]) -> None:
        super().__init__()
        self.config, self.parts = CONFIG, parts
        self.shapes = parameter_shapes(CONFIG)
        sizes = {k: [s.stop - s.start for s in part] for k, part in parts.items()}
        self.tensors = {k: nn.Parameter(torch.empty(size)) for k, size in sizes.items()}

    def named_parameters(self, *_args, **_kwargs):
        yield from self.tensors.items()

    def region_of(self, tensor: torch.Tensor) -> Region:
        name = next(k for k, v in self.tensors.items() if v is tensor)
        return Region(tensor, self.shapes[name], self.parts[name])


def test_a_shard_holds_the_bits_of_the_whole(tensors):
    parts = {
        "layers.2.attn.wq_b.weight": (slice(100, 256), slice(0, 16)),
        "layers.2.ffn.experts.w1.weight": (slice(1, 3), slice(4, 9), slice(0, 32)),
        "layers.2.ffn.experts.w2.weight": (slice(3, 4), slice(0, 32), slice(0, 16)),
        "head.weight": (slice(64, 64), slice(0, 32)),
        "layers.2.hc_attn.base": (slice(5, 20),),
    }
    shards = Shards(parts)
    init_weights(shards, seed=11, region_of=shards.region_of)
    for name, part in parts.items():
        assert torch.equal(shards.tensors[name], tensors[name][part]), name


def test_hash_tables_are_balanced_and_differ_by_layer(tensors):
    names = [name for name in buffer_shapes(CONFIG) if name.endswith("tid2eid")]
    assert names == ["layers.0.ffn.gate.tid2eid", "layers.1.ffn.gate.tid2eid"]
    first, second = (tensors[name].long() for name in names)
    assert not torch.equal(first, second)
    for table in (first, second):
        load = table_load(table, CONFIG.n_routed_experts)
        assert int(load.max() - load.min()) <= 1


def test_hash_tables_follow_the_token_counts():
    counts = torch.ones(CONFIG.vocab_size, dtype=torch.int64)
    counts[7] = 10_000
    model = DeepSeekV4(CONFIG)
    init_weights(model, seed=11, token_counts_V=counts)
    table = model.state_dict()["layers.0.ffn.gate.tid2eid"].long()
    busy = set(table[7].tolist())
    rest = torch.cat((table[:7], table[8:])).flatten().tolist()
    assert not busy & set(rest)  # nothing else goes where token 7 already fills the experts


def test_unknown_parameters_and_buffers_are_refused():
    model = DeepSeekV4(CONFIG)
    attention = model.get_submodule("layers.0.attn")
    attention.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ValueError, match=r"layers\.0\.attn\.extra matches 0 lines"):
        init_weights(model, seed=0)
    del attention.extra
    attention.register_buffer("extra", torch.zeros(1))
    with pytest.raises(ValueError, match=r"buffer layers\.0\.attn\.extra"):
        init_weights(model, seed=0)
