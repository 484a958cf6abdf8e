"""The dial of ``v4_scaled``: each place is a valid run, the family grows, its end is V4-Flash."""

from dataclasses import asdict, replace
from itertools import pairwise

import pytest

from model.config import LayerKind, ModelConfig
from model.parameter_counts import parameter_counts
from model.scaled import LARGEST, SMALLEST, scaled_shape
from train.config.command_line import compose_run
from train.config.scaled import scaled_cost, scaled_line, scaled_recipe
from train.errors import UserError
from train.pretrain import cli
from train.stages import resolve

pytestmark = pytest.mark.core
SCALES = range(SMALLEST, LARGEST + 1)
GROW = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "qk_rope_head_dim", "q_lora_rank", "o_groups", "o_lora_rank", "sliding_window",
    "index_n_heads", "index_head_dim", "index_topk", "n_routed_experts", "num_experts_per_tok",
    "moe_intermediate_size", "num_hash_layers",
)  # fmt: skip


def test_top_of_the_dial_is_v4_flash():
    top = compose_run(["model=v4_scaled", f"model.scale={LARGEST}"]).model
    flash = compose_run(["model=v4_flash"]).model
    assert asdict(replace(top, name=flash.name, scale=0)) == asdict(flash)
    assert parameter_counts(top).total == 290_942_289_362


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_is_a_valid_run_in_which_every_part_acts(scale):
    """In bf16, which asks for the wider multiples."""
    run = compose_run(["model=v4_scaled", f"model.scale={scale}", "train.precision=bf16"])
    model, train = run.model, run.train
    assert resolve(run).steps == train.steps == scaled_cost(scale).steps
    kinds = {model.kind(layer) for layer in range(scale)}
    assert kinds == {LayerKind.swa, LayerKind.csa, LayerKind.hca}
    assert model.index_topk < train.seq_len // 4, "the indexer leaves entries out"
    assert model.sliding_window < train.seq_len
    assert train.seq_len >= 16 * max(model.ratios), "a row holds HCA blocks"
    assert train.global_batch_tokens % (train.seq_len * train.micro_batch_size) == 0


def test_family_grows_with_the_dial():
    for one, two in pairwise(SCALES):
        small, large = scaled_shape(one), scaled_shape(two)
        shrunk = [key for key in GROW if small[key] > large[key]]
        assert not shrunk, f"from {one} to {two}"
        costs, recipes = (scaled_cost(one), scaled_cost(two)), map(scaled_recipe, (one, two))
        for key in ("parameters", "active", "flops_per_token", "tokens", "flops"):
            assert getattr(costs[0], key) < getattr(costs[1], key), key
        first, second = recipes
        assert first["lr"] > second["lr"]
        for key in ("seq_len", "global_batch_tokens", "eval_tokens"):
            assert first[key] <= second[key], key


@pytest.mark.parametrize("scale", [4, 9, 20, 43])
def test_tokens_are_twenty_for_each_active_parameter(scale):
    """To half a step's rounding."""
    run = compose_run(["model=v4_scaled", f"model.scale={scale}"])
    wanted = 20 * parameter_counts(run.model).active_without_embedding
    batch = run.train.global_batch_tokens
    assert abs(run.train.steps * batch - wanted) <= batch / 2
    assert run.optim.schedule.warmup_steps <= run.train.steps / 20 + 1


@pytest.mark.parametrize("scale", [3, 44, -1])
def test_a_scale_outside_is_refused_in_one_line(scale, capsys):
    assert cli(["model=v4_scaled", f"model.scale={scale}"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.endswith(f"model.scale={scale} is the number of layers of v4_scaled: 4 to 43")
    assert error.count("\n") == 0
    assert "interpolation" not in error


def test_a_scale_without_its_shape_is_refused():
    with pytest.raises(ValueError, match=r"model\.scale=5 is a place in the family"):
        ModelConfig(scale=5).validate()
    with pytest.raises(ValueError, match=r"hidden_size=48, but model\.hidden_size=64"):
        compose_run(["model=v4_scaled", "model.scale=5", "model.hidden_size=64"])
    with pytest.raises(UserError, match=r"model\.scale=0 is the number of layers"):
        compose_run(["train=v4_scaled"])  # of another model


def test_an_override_of_the_recipe_stands():
    run = compose_run(["model=v4_scaled", "model.scale=6", "optim.lr=1e-3", "train.steps=7"])
    assert (run.optim.lr, run.train.steps) == (1e-3, 7)


def test_a_start_says_what_was_not_searched():
    assert "model.scale=6" in scaled_line(6)
    assert "extrapolated" in scaled_line(6)
