"""Bytes per rank from the config alone, against counts, sharding rules and real saved tensors."""

import pytest
import torch

from model.config import LayerKind, ModelConfig
from model.flops import parameter_counts
from model.init import init_weights
from model.loss import Objective
from model.transformer import DeepSeekV4
from parallel.config import ParallelConfig
from train.config import ActivationCheckpoint
from train.errors import DoesNotFitError
from train.fit import GB, Needs, World, activation_bytes, check, report, smallest_layouts
from train.overrides import compose_run
from train.stages import resolve

ONE = ParallelConfig(dp_shard=1)


def needs(*args: str) -> Needs:
    run = compose_run(args)
    return Needs(run, resolve(run))


@pytest.mark.core
@pytest.mark.parametrize("name", ["v4_tiny", "v4_flash", "v4_pro"])
def test_masters_and_gradients_are_four_bytes_a_parameter(name):
    run = compose_run([f"model={name}"])
    memory = Needs(run, resolve(run)).peak(ONE, "cpu")
    counts = parameter_counts(run.model)
    biases = sum(
        run.model.n_routed_experts
        for i in range(run.model.num_hidden_layers)
        if run.model.router(i).value == "learned"
    )
    biases += run.model.n_routed_experts * run.model.num_nextn_predict_layers
    assert memory.weights == memory.gradients == 4 * (counts.total - biases)


def test_optimizer_states_are_one_value_under_muon_two_under_adamw():
    weights = needs("model=v4_nano").peak(ONE, "cpu").weights
    assert needs("model=v4_nano", "optim=adamw").peak(ONE, "cpu").optimizer == 2 * weights
    muon = needs("model=v4_nano").peak(ONE, "cpu").optimizer
    assert weights < muon < 1.5 * weights  # embedding and head are AdamW's
    half = needs("model=v4_nano", "optim.state_dtype=bf16").peak(ONE, "cpu").optimizer
    assert half == muon / 2
    averaged = needs("model=v4_nano", "train.ema_decay=0.9").peak(ONE, "cpu").optimizer
    assert averaged == muon + weights


def test_sharding_divides_what_it_should():
    n = needs("model=v4_flash")
    one, eight = n.peak(ONE, "cuda"), n.peak(ParallelConfig(dp_shard=8, ep=8), "cuda")
    assert eight.weights == pytest.approx(one.weights / 8, rel=1e-6)
    assert eight.optimizer == pytest.approx(one.optimizer / 8, rel=1e-6)
    wide = n.peak(ParallelConfig(dp_shard=8, ep=1), "cuda")
    assert wide.gathered > 5 * eight.gathered  # experts are gathered whole without ep
    halves = n.peak(ParallelConfig(dp_shard=1, pp=2), "cuda")
    assert 0.5 < halves.weights / one.weights < 0.56


@pytest.mark.parametrize(("name", "limit"), [("gpu_8gb", 7.5), ("gpu_24gb", 22.0)])
def test_gpu_presets_predict_a_peak_below_their_card(name, limit):
    peak = needs(f"experiment={name}").peak(ONE, "cuda").total / GB
    assert 0.5 * limit < peak < limit


@pytest.mark.core
@pytest.mark.parametrize("name", ["v4_flash", "v4_pro"])
def test_paper_models_are_refused_with_a_table(name):
    run = compose_run([f"model={name}"])
    plan = resolve(run)
    with pytest.raises(DoesNotFitError, match=rf"model.name={name} needs [\d,.]+ GB") as caught:
        check(run, plan, World(1, "cpu", 16 * 10**9))
    table = caught.value.table
    assert f"{parameter_counts(run.model).total:,} parameters" in table
    for kind in ("weights", "gradients", "optimizer", "activations", "temporary", "total"):
        assert f"\n{kind} " in table
    found = smallest_layouts(run, plan, "cuda", 80 * GB)
    assert found
    for layout, memory in found:
        assert memory.total <= 80 * GB
        assert f"parallel.pp={layout.pp} parallel.dp_shard={layout.dp_shard}" in table
    ranks = found[0][0].world_size
    assert 64 <= ranks <= 2048


def test_smallest_layout_is_smallest_and_is_one_rank_when_that_fits():
    run = compose_run(["model=v4_small"])
    plan = resolve(run)
    ((layout, _),) = smallest_layouts(run, plan, "cuda", 80 * GB)
    assert layout.world_size == 1
    tight = Needs(run, plan).peak(ONE, "cuda").total * 0.8
    found = smallest_layouts(run, plan, "cuda", tight)
    assert found[0][0].world_size == 2


def test_run_that_fits_passes_and_a_layout_that_mismatches_does_not():
    run = compose_run(["model=v4_tiny"])
    check(run, resolve(run), World(1, "cpu", 4 * 10**9))
    run = compose_run(["model=v4_tiny", "parallel.dp_shard=3"])
    with pytest.raises(ValueError, match="= 3 ranks, but the world size is 1"):
        check(run, resolve(run), World(1, "cpu", 4 * 10**9))


def test_large_layout_on_a_small_machine_still_gives_the_table():
    run = compose_run(["experiment=v4_pro"])
    with pytest.raises(DoesNotFitError, match="on 1 cpu rank"):
        check(run, resolve(run), World(1, "cpu", 16 * 10**9))


def test_cuda_asked_for_and_missing_says_so_and_shows_the_need():
    run = compose_run(["experiment=gpu_8gb"])
    with pytest.raises(DoesNotFitError, match=r"train.device=cuda, but this machine has no"):
        check(run, resolve(run), World(1, "cuda", 0))


def test_report_names_this_world():
    run = compose_run(["model=v4_mini"])
    text = report(run, resolve(run), ONE, World(1, "cpu", 10**9))
    assert "this world: 1 cpu rank(s) of 1.0 GB" in text


# ---- activations, against what autograd really saves -----------------------------------------
def model_of(kind: str, ratio: int, layers: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4,
        head_dim=32, qk_rope_head_dim=8, q_lora_rank=32, o_groups=2, o_lora_rank=32,
        compress_ratios=[ratio] * layers, layer_kinds=[LayerKind(kind)] * layers,
        sliding_window=16, index_n_heads=16, index_head_dim=32, index_topk=8,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
        num_hash_layers=0, num_nextn_predict_layers=0,
    )  # fmt: skip


def saved_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of distinct storages that one forward pass saves, parameters and their casts aside."""
    model = DeepSeekV4(config)
    init_weights(model, 0)
    model.compute_dtype = dtype
    ids = torch.randint(0, config.vocab_size, (2, 128))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(sorted(p.shape)) for p in model.parameters()}
    found: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() and t.untyped_storage().data_ptr() not in own:
            if tuple(sorted(t.shape)) not in shapes:
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    objective = Objective(
        targets_K=(256.0,), tokens=256.0, mtp_weight=0.3, indexer_weight=0.01, balance_weight=1e-4,
        indexer_phase="sparse", monitors=False,
    )  # fmt: skip
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(ids, torch.zeros_like(ids), ids.roll(-1, 1)[..., None], objective)
    return sum(found.values())


@pytest.mark.parametrize(("kind", "ratio"), [("swa", 0), ("csa", 4), ("hca", 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_activation_estimate_is_near_what_is_saved(kind, ratio, dtype):
    """Coarse on purpose: never far below what is saved, and at most three times it."""
    configs = [model_of(kind, ratio, layers) for layers in (1, 3)]
    real = (saved_bytes(configs[1], dtype) - saved_bytes(configs[0], dtype)) / 2 / 256
    estimate, running = activation_bytes(
        configs[0], LayerKind(kind), dtype.itemsize, ActivationCheckpoint.none
    )
    assert running == 0
    assert 0.9 * real < estimate < 3 * real


def test_checkpointing_keeps_less_and_runs_one_block():
    config = model_of("csa", 4, 1)
    whole, _ = activation_bytes(config, LayerKind.csa, 2, ActivationCheckpoint.none)
    block, running = activation_bytes(config, LayerKind.csa, 2, ActivationCheckpoint.block)
    selective, rest = activation_bytes(config, LayerKind.csa, 2, ActivationCheckpoint.selective)
    assert block == config.hc_mult * config.hidden_size * 2
    assert running == whole
    assert block < selective < whole
    assert rest < running
