"""The roofline's FLOPs and bytes against closed forms and against real tensors.

Two ways to the same number: shapes that a trace shows, and ``model/flops.py`` from the config.
"""

import math
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from model.config import Kernels, LayerKind
from model.flops import block_flops, training_flops
from model.kernels.triton import entries
from model.kernels.triton.launch import launch
from model.parameter_counts import parameter_counts
from scripts.benchmarks.launches import kinds, trace_block
from scripts.cli.model_yaml import load_model_config
from scripts.gpu.roofline import called, estimate, main, pair_sums, whole_pass
from scripts.gpu.traffic import Operation, Traffic, block_traffic, op_flops
from tests.helpers import ROOT, small_config, small_model
from train.config.command_line import compose_run
from train.preflight.cards import CARDS, Card, card
from train.preflight.forecast import duration, quantity
from train.preflight.needs import Needs
from train.preflight.world import GB
from train.stages import resolve

SMALL = replace(load_model_config("v4_small"), kernels=Kernels.triton)
TOKENS = 4096


@pytest.mark.parametrize("layer", kinds(SMALL).values(), ids=list(kinds(SMALL)))
def test_flops_of_a_block_are_those_of_the_closed_form(layer):
    found, wanted = block_traffic(SMALL, layer, 1, TOKENS), block_flops(SMALL, layer, TOKENS)
    for operations, parts in ((found.forward, wanted.forward), (found.backward, wanted.backward)):
        assert estimate(operations, []).flops == pytest.approx(TOKENS * sum(parts.values()))


def test_flops_of_a_whole_pass_are_those_of_the_closed_form():
    found = whole_pass(SMALL, 1, TOKENS, [], torch.float32)
    assert found.flops == pytest.approx(TOKENS * training_flops(SMALL, TOKENS).total)
    assert found.launches < 60 * 18 + 130 * 18 + 300  # the budget of a block, and the rest


def test_bytes_are_every_operand_and_every_result_once():
    c, rest = SMALL, {}
    for o in block_traffic(SMALL, 0, 1, TOKENS).forward:
        rest.setdefault(o.name, []).append(o)
    (merge,) = rest["v4::triton_mhc_merge"]  # streams in and out, the result, two coefficients
    streams, width = c.hc_mult, c.hidden_size
    a_token = 2 * 2 * streams * width + 2 * width + 4 * streams + 4 * streams**2
    assert (merge.calls, merge.bytes) == (1, TOKENS * a_token)  # the other is one with a pre
    (both,) = rest["v4::triton_mhc_merge_pre"]  # more: what is read, three gates, the projection
    mix = (2 + streams) * streams
    pre = 2 * width + 4 * (2 * mix + 1 - streams)
    weights = 4 * (mix * streams * width + mix + 3)
    assert both.bytes == TOKENS * (a_token + pre) + weights
    wq_a = min(rest["aten::mm"], key=lambda o: abs(o.flops - 2 * TOKENS * width * c.q_lora_rank))
    assert wq_a.bytes == 2 * (TOKENS * (width + c.q_lora_rank) + width * c.q_lora_rank)
    (experts,) = rest["v4::triton_grouped"]
    rows = TOKENS * c.num_experts_per_tok
    weights = c.n_routed_experts * c.moe_intermediate_size * width
    offsets = experts.bytes - 2 * (rows * (width + c.moe_intermediate_size) + weights)
    assert experts.calls == 3
    assert 0 < offsets <= 8 * (c.n_routed_experts + 1)


def test_bytes_on_meta_are_those_of_real_tensors():
    """A CSA block runs in Triton's interpreter, under the same mode."""
    config, tokens = small_config(kernels="triton"), 8
    flops = op_flops(config, tokens, config.kind(1), config.ratio(1), tokens)
    forward, backward = Traffic(flops, "cpu"), Traffic(flops, "cpu")
    block = small_model(kernels="triton").layers["1"]
    trace_block(block, config, tokens, forward, backward)
    meta = block_traffic(config, 1, 1, tokens)

    def sums(operations):
        found = {}
        for o in operations:
            if o.name.startswith("v4::") or o.name in ("aten::mm", "aten::bmm"):
                calls, size, work = found.get(o.name, (0, 0, 0))
                found[o.name] = calls + o.calls, size + o.calls * o.bytes, work + o.calls * o.flops
        return found

    assert sums(forward.found.values()) == sums(meta.forward)
    here, there = sums(backward.found.values()), sums(meta.backward)
    for name in ("aten::mm", "aten::bmm"):  # a CPU's product of bf16 gives no fp32 gradient
        (calls, size, work), (_, larger, _) = here.pop(name), there[name]
        assert size < larger <= size + 2 * sum(p.numel() for p in block.parameters())
        assert there.pop(name) == (calls, larger, work)
    assert here == there
    assert len(sums(meta.forward)) > 15


def test_an_operation_takes_the_longest_of_its_three_times():
    one = Card("x", 1, bf16_tflops=2.0, fp32_tflops=1.0, bandwidth_gb=100)
    assert Operation("a", 3, 1, 10**8, 1e12, False).seconds(one) == (1.5, "compute")
    assert Operation("a", 1, 1, 10**8, 1e12, True).seconds(one) == (1.0, "compute")
    assert Operation("a", 2, 1, 10**11, 1e12, False).seconds(one) == (2.0, "memory")
    assert Operation("a", 1, 1, 10, 10, False).seconds(one) == (4e-6, "launches")
    assert all(one.bf16_tflops > one.fp32_tflops > 0 for one in CARDS)
    assert all(one.bandwidth_gb >= 300 for one in CARDS)


def test_every_operator_of_a_block_is_called_as_the_table_of_kernels_calls_it():
    for layer in kinds(SMALL).values():
        for operation in block_traffic(SMALL, layer, 1, 512).all:
            assert not operation.name.startswith("v4::") or called(operation.name) != "others"


def test_the_command_writes_what_it_computed(tmp_path, capsys):
    path = tmp_path / "roofline.md"
    words = ["--models", "v4_mini", "--cards", "rtx4090", "h100", "--tokens", "2048"]
    assert main([*words, "--markdown", str(path)]) == 0
    text = path.read_text()
    assert text.startswith("# Roofline: computed, not measured")
    assert text in capsys.readouterr().out
    config = replace(load_model_config("v4_mini"), kernels=Kernels.triton)
    cards = [card("rtx4090"), card("h100")]
    seconds = whole_pass(config, 1, 2048, cards, torch.float32).seconds
    for one in cards:
        took = seconds[one.name]
        assert f"| {one.name} | {took * 1e3:,.1f} | {2048 / took:,.0f} |" in text
    assert main(["--cards", "rtx9999"]) == 2


@pytest.mark.parametrize("tokens", [1024, 16384])
def test_sums_over_pairs_are_of_the_rows_that_are_written_and_read(monkeypatch, tokens):
    """The workspace is the one that kernels are handed; the mask of short rows needs none."""
    layer = next(i for i in kinds(SMALL).values() if SMALL.kind(i) is LayerKind.csa)
    handed = Counter()

    def seen(kernel, grid, *args, **constants):
        if kernel.fn.__name__ == "segment_sum":
            handed[args[0].shape[-1]] += args[0].numel() * 4
        launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(entries, "launch", seen)
    ordered = pair_sums(SMALL, layer, 2, tokens)
    channels = {"attention": SMALL.head_dim, "indexer_loss": SMALL.index_head_dim}
    pairs = 2 * tokens * min(SMALL.index_topk, tokens // SMALL.ratio(layer))
    assert ordered["attention"].met == ("bits" if tokens == 1024 else "list")
    for op, sums in ordered.items():
        rows = handed[channels[op]]
        assert sums.workspace == (2 * rows + 32 * pairs if rows else 0), op
    handed.clear()
    atomic = pair_sums(replace(SMALL, deterministic=False), layer, 2, tokens)
    assert not handed
    for op, sums in atomic.items():
        assert sums.workspace == 0
        assert sums.added == (4 * channels[op] * pairs if sums.met == "list" else 0)
        assert sums.launches < ordered[op].launches or ordered[op].met == "bits"


PRESETS = {  # preset -> the card that the guide's time is for
    "gpu_8gb": "rtx4090", "gpu_12gb": "rtx4090", "gpu_16gb": "rtx4090", "gpu_24gb": "rtx4090",
    "gpu_80gb": "h100",
}  # fmt: skip


def guide_row(name, card_name):
    """A preset's line of the table in docs/guide/one_gpu.md, computed."""
    run = compose_run([f"experiment={name}"])
    plan, one = resolve(run), card(card_name)
    (stage,) = plan.reached()
    peak = Needs(run, plan).peak(run.parallel.resolve(1), "cuda").total
    config = replace(run.model, kernels=Kernels.triton)
    recompute = run.train.activation_checkpoint.value == "block"
    size = stage.micro_batch_size, stage.seq_len
    least = whole_pass(config, *size, [one], torch.float32, recompute).seconds[one.name]
    seconds = least * plan.end_tokens / math.prod(size)
    rows = f"{size[0]} x {size[1]:,}{', blocks recomputed' if recompute else ''}"
    cells = [
        f"`{name}`", f"`{run.model.name}`", quantity(parameter_counts(run.model).total),
        quantity(plan.end_tokens), rows, f"{peak / GB:.1f} GB",
        f"{duration(seconds)} on {one.name}", f"{seconds / plan.steps:.2g} s",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


@pytest.mark.parametrize("name", PRESETS)
def test_the_guide_tells_of_each_preset_what_is_computed(name):
    """Words exactly; memory and times within a sixth: a better kernel breaks no document."""
    guide = (ROOT / "docs" / "guide" / "one_gpu.md").read_text()
    (told,) = [line for line in guide.splitlines() if line.startswith(f"| `{name}` |")]
    wanted = guide_row(name, PRESETS[name])
    numbers = [
        [
            float(n)
            for n in re.findall(
                r"[\d.]+", line.partition("GB")[0].rpartition("|")[2] + line.partition("GB")[2]
            )
        ]
        for line in (told, wanted)
    ]
    assert numbers[0] == pytest.approx(numbers[1], rel=1 / 6)
    words = [re.sub(r"[\d.]+ (GB|h|days|s)\b", r"N \1", line) for line in (told, wanted)]
    assert words[0] == words[1]
