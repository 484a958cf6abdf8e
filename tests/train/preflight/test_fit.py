"""Bytes per rank from the config alone, against counts, sharding rules and real saved tensors."""

import pytest
import torch

import train.preflight.fit as fit_module
import train.preflight.world as world_module
from model.activation_memory import gathered_entry_bytes
from model.init import init_weights
from model.parameter_counts import parameter_counts
from model.transformer import DeepSeekV4
from optim.build import build_optimizer
from parallel.config import ParallelConfig
from train.build import build_offload
from train.config.command_line import compose_run
from train.config.schema import Device
from train.errors import DoesNotFitError
from train.preflight.fit import check, report, smallest_layouts
from train.preflight.needs import Needs
from train.preflight.world import GB, World, poorest, this_world
from train.stages import resolve

ONE = ParallelConfig(dp_shard=1)
NANO = ("model=v4_nano", "train.precision=bf16")


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


def test_a_layout_that_is_not_resolved_has_no_peak():
    """Degrees of -1 counted weights and states at less than half."""
    layout = ParallelConfig(dp_shard=-1)
    for ask in (lambda n: n.peak(layout, "cuda"), lambda n: n.resting(layout)):
        with pytest.raises(AssertionError, match="dp_shard=-1"):
            ask(needs(*NANO))
    assert needs(*NANO).peak(layout.resolve(2), "cuda").total > 0


def test_optimizer_states_are_one_value_under_muon_two_under_adamw():
    weights = needs(*NANO).peak(ONE, "cpu").weights
    assert needs(*NANO, "optim=adamw").peak(ONE, "cpu").optimizer == 2 * weights
    muon = needs(*NANO).peak(ONE, "cpu").optimizer
    assert weights < muon < 1.5 * weights  # embedding and head are AdamW's
    half = needs(*NANO, "optim.state_dtype=bf16").peak(ONE, "cpu").optimizer
    assert half == muon / 2
    averaged = needs(*NANO, "train.ema_decay=0.9").peak(ONE, "cpu").optimizer
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


def test_blocks_that_are_graphs_are_gathered_in_fp32():
    graphs = (*NANO, "model.kernels=reference", "train.compile=true")
    two = ParallelConfig(dp_shard=2)
    plain, compiled = (needs(*words).peak(two, "cuda").gathered for words in (NANO, graphs))
    assert 1.2 * plain < compiled <= 2 * plain  # some is fp32 anyway
    alone = [needs(*words).peak(ONE, "cuda").gathered for words in (NANO, graphs)]
    assert alone[0] == alone[1]


def test_gradients_kept_beside_those_of_graphs_count_where_they_rest(monkeypatch):
    """Of a CPU in its memory, of a GPU in the host's, which may have no room for them."""
    graphs = (*NANO, "model.kernels=reference", "train.compile=true")
    plain, compiled = (needs(*words) for words in (NANO, graphs))
    weights = plain.peak(ONE, "cpu").weights
    assert compiled.peak(ONE, "cpu").audit == plain.peak(ONE, "cpu").audit + weights
    assert compiled.peak(ONE, "cuda").audit == plain.peak(ONE, "cuda").audit
    world = World(1, "cuda", 80 * 10**9)
    monkeypatch.setattr(fit_module, "machine_memory", lambda: weights)
    check(compiled.run, resolve(compiled.run), world)
    monkeypatch.setattr(fit_module, "machine_memory", lambda: weights - 1)
    check(plain.run, resolve(plain.run), world)
    with pytest.raises(DoesNotFitError, match=r"^train\.compile=true: .* in host memory, which"):
        check(compiled.run, resolve(compiled.run), world)


def test_keys_that_rest_too_much_on_the_host_are_named(monkeypatch):
    words = (*NANO, "parallel.offload=optimizer", "parallel.offload_activations=true")
    run = compose_run([*words, "train.device=cuda"])
    monkeypatch.setattr(fit_module, "machine_memory", lambda: 10**6)
    named = "^parallel.offload=optimizer, parallel.offload_activations=true: "
    with pytest.raises(DoesNotFitError, match=named):
        check(run, resolve(run), World(1, "cuda", 80 * 10**9))


@pytest.mark.parametrize("card", [8, 12, 16, 24, 80])
def test_gpu_presets_predict_a_peak_below_their_card(card):
    """A tenth stays free: a desktop's share, and what an allocator cannot use."""
    peak = needs(f"experiment=gpu_{card}gb").peak(ONE, "cuda").total / GB
    assert 0.6 * card < peak < 0.9 * card


@pytest.mark.parametrize(
    ("name", "model", "card", "host"),
    [("offload_12gb", "v4_small", 11.2, 24), ("offload_24gb", "v4_medium", 22.4, 56)],
)
def test_offload_presets_predict_a_peak_below_their_card(name, model, card, host):
    """Of a card 7 % stays free, of the host what a system and a checkpoint's copy take."""
    n = needs(f"experiment={name}")
    peak, rest = n.peak(ONE, "cuda"), n.resting(ONE)
    assert n.run.model.name == model
    assert 0.5 * card < peak.total / GB < card
    assert n.run.train.async_checkpoint
    assert 2 * rest.host / GB < host  # a save copies what rests there
    plain = needs(f"experiment={name}", "parallel.offload=none").peak(ONE, "cuda")
    assert plain.total / GB > card  # else it would be no use
    assert rest.seconds > 0


@pytest.mark.parametrize(
    ("offload", "precision"), [("optimizer", "fp32"), ("optimizer+master", "bf16")]
)
def test_host_bytes_are_those_of_the_real_tensors(offload, precision):
    args = (
        "model=v4_tiny", f"parallel.offload={offload}", f"train.precision={precision}",
        "train.device=cpu",
    )  # fmt: skip
    n = needs(*args)
    model = DeepSeekV4(n.run.model)
    init_weights(model, 0)
    given = build_offload(n.run, model, torch.device("cpu"))
    assert given is not None
    optimizer = build_optimizer(
        model.named_parameters(), n.run.optim, split_counts=n.run.model.split_counts, offload=given
    )
    states = optimizer.state_dict().values()
    real = sum(t.nbytes for state in states for key, t in state.items() if key != "step")
    real += sum(master.nbytes for master in given.masters.values())
    assert n.resting(ONE).host == real


def test_offloaded_activations_leave_two_blocks_on_the_device():
    words = ("model=v4_small", "train.device=cuda", "train.precision=bf16")
    plain, away = (needs(*words, f"parallel.offload_activations={on}") for on in ("false", "true"))
    left, kept = (n.peak(ONE, "cuda").activations for n in (away, plain))
    host = away.resting(ONE).host
    assert plain.resting(ONE).host == 0
    assert kept - left == pytest.approx(host, abs=2)
    blocks = plain.run.model.num_hidden_layers + plain.run.model.num_nextn_predict_layers
    assert host < kept * (blocks - 2) / blocks
    assert host > 0.3 * kept  # the rest: two blocks, the head, the running block
    assert away.resting(ONE).down == away.resting(ONE).up >= host
    assert away.peak(ONE, "cpu").activations == plain.peak(ONE, "cpu").activations


def test_zero_stages_cut_what_they_say_over_the_ranks():
    eight = ParallelConfig(dp_shard=8)
    memory = {
        name: needs("model=v4_small", f"engine={name}").peak(eight, "cuda")
        for name in ("deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero2_offload",
                     "deepspeed_zero3")
    }  # fmt: skip
    one, two, offloaded, three = memory.values()
    assert one.weights == two.weights == 8 * three.weights
    assert one.gradients > 2 * two.gradients
    assert offloaded.optimizer == 0 < one.optimizer == two.optimizer == three.optimizer
    rest = needs("model=v4_small", "engine=deepspeed_zero3_nvme").resting(eight)
    assert rest.disk > 0
    assert "GB on NVMe" in rest.text()


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


def test_a_cuda_device_has_what_is_free_and_what_this_process_holds(monkeypatch):
    """24 GB, 10 free, of the rest 0.4 in the allocator of this process; its context comes to it."""
    taken = {0: (10.0, 0.4), 1: (23.6, 0.0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (int(taken[i][0] * GB), int(24 * GB)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda i: int(taken[i][1] * GB))
    here = this_world(Device.auto)
    assert here == World(1, "cuda", round(11.2 * GB), round(24 * GB))
    run = compose_run(["experiment=gpu_24gb"])
    with pytest.raises(DoesNotFitError, match=r"which have 11\.2 of 24\.0 GB free") as refused:
        check(run, resolve(run), here)
    assert "1 cuda rank(s) with 11.2 of 24.0 GB free" in refused.value.table
    monkeypatch.setenv("LOCAL_RANK", "1")  # alone on its device but for the context
    alone = this_world(Device.auto)
    assert alone.bytes_per_rank == alone.device_bytes
    assert alone.memory == "24.0 GB"


def test_of_several_cuda_ranks_the_least_free_memory_counts(monkeypatch):
    def gather(found, mine):
        found[:] = [(8, 24), mine, (6, 80)]

    monkeypatch.setattr(world_module, "init_process_group", lambda device: None)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert poorest(World(3, "cuda", 7, 24)) == World(3, "cuda", 6, 80)


def test_report_names_this_world():
    run = compose_run(["model=v4_mini"])
    text = report(run, resolve(run), ONE, World(1, "cpu", 10**9))
    assert "this world: 1 cpu rank(s) with 1.0 GB" in text


def test_recomputing_blocks_keeps_less():
    none, block = (
        needs(*NANO, f"train.activation_checkpoint={mode}").peak(ONE, "cpu").activations
        for mode in ("none", "block")
    )
    assert block < none / 2


def test_pipeline_stages_hold_several_microbatches():
    n = needs("model=v4_mini", "train.activation_checkpoint=none")
    layouts = [ParallelConfig(dp_shard=1, pp=4, schedule=s) for s in ("1f1b", "gpipe")]
    in_order, all_at_once = (n.peak(layout, "cuda").activations for layout in layouts)
    assert in_order == pytest.approx(n.peak(ONE, "cuda").activations, rel=0.4)  # 4 of a quarter
    assert all_at_once > 3 * in_order  # 16 microbatches


@pytest.mark.parametrize("name", ["v4_flash", "v4_pro"])
def test_layouts_of_the_paper_presets_fit_80_gb(name):
    n = needs(f"experiment={name}")
    layout = n.run.parallel
    assert n.peak(layout, "cuda").total < 80 * GB
    assert all(
        stage.quantum_tokens // stage.seq_len % (layout.data_degree // stage.cp) == 0
        for stage in n.stages
    )


def test_shards_of_rows_keep_a_share_of_the_activations_and_all_entries():
    """Half a row's tokens; besides, for every compressed layer, the row's entries and keys."""
    words = [*NANO, "train.precision=fp32", "train.activation_checkpoint=none"]
    alone, shared = needs(*words), needs(*words, "parallel.cp=2")
    whole = alone.peak(ONE, "cpu").activations
    half = shared.peak(ParallelConfig(dp_shard=1, cp=2), "cpu").activations
    model, train = shared.run.model, shared.run.train
    entries = 0.0
    for layer in range(model.num_hidden_layers):
        kind, ratio = model.kind(layer), model.ratio(layer)
        entries += gathered_entry_bytes(model, kind, ratio, 4)
    entries *= train.micro_batch_size * train.seq_len
    assert half > whole / 2 + entries
    assert half == pytest.approx(whole / 2 + entries, rel=0.1), "gradients of one layer's entries"
