"""``train.compile``: blocks as graphs give what their operations give, or the run stops.

``aot_eager`` traces forward and backward pass and runs the same operations, so bits are equal.
``inductor`` fuses them: sums run in another order, and the fp32 losses and gradient of a step agree
in half their digits, 3e-4. Whole compilations take tens of seconds and are marked slow; that a
graph is missed, or computes something else, is planted beside ``torch.compile`` and takes none.
"""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch.nn.utils.stateless import _reparametrize_module

from model.config import Kernels
from parallel.compiled_blocks import CompiledBlocks
from parallel.config import ParallelConfig
from tests.helpers import relative, small_config
from tests.integration.small_run import ROWS, SEQ_LEN, final_tensors, small_run, write_corpus
from train.audit.faults import AuditError
from train.build import build
from train.config.command_line import compose_run
from train.config.schema import ActivationCheckpoint, Precision, StageConfig
from train.errors import USER_ERRORS

# Tracing instantiates autograd functions itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
SHALLOW = {"num_hidden_layers": 1, "layer_kinds": ["csa"], "compress_ratios": [4, 0]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def run_of(folder, corpus, compiled=True, steps=2, shape=None, **train):
    """Packed documents, every loss, monitors in the first step; one CSA block and MTP's by default.

    All layer kinds with ``shape={}``.
    """
    given = {"eval_every": 0, "checkpoint_every": 0, "monitor_every": 50, **train}
    run = small_run(folder, corpus, steps=steps, compile=compiled, **given)
    shape = SHALLOW if shape is None else shape
    return replace(run, model=small_config(vocab_size=260, kernels=Kernels.reference, **shape))


def compiled_by(backend):
    return patch("train.build.CompiledBlocks", partial(CompiledBlocks, backend))


def trained(run, backend="aot_eager"):
    torch._dynamo.reset()
    with compiled_by(backend):
        assert build(run).fit() == 0
    return final_tensors(run), json.loads((Path(run.run_dir) / "receipt.json").read_text())


def farthest(a, b):
    assert a.keys() == b.keys()
    return max(relative(a[name], b[name]) for name in a)


# ---- equality -----------------------------------------------------------------------------------
def test_a_compiled_run_is_the_plain_one_and_says_so(tmp_path, corpus):
    plain, _ = trained(run_of(tmp_path / "plain", corpus, compiled=False, steps=1))
    graphs, receipt = trained(run_of(tmp_path / "graphs", corpus, steps=1), "eager")
    assert farthest(graphs, plain) == 0.0
    told = receipt["audit"]["compiled"]
    assert told["blocks"] == 2  # MTP's is the second
    assert told["backend"] == "eager"
    assert told["graphs"] >= 2
    assert "compiled" in receipt["audit"]["checks"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "block"])
def test_all_layer_kinds_forward_and_backward_as_graphs(tmp_path, corpus, mode):
    """Recomputed blocks run their graph again, and keep what the first pass kept."""
    more = {"shape": {}, "steps": 3, "activation_checkpoint": ActivationCheckpoint(mode)}
    plain, _ = trained(run_of(tmp_path / "plain", corpus, compiled=False, **more))
    graphs, receipt = trained(run_of(tmp_path / "graphs", corpus, **more))
    assert farthest(graphs, plain) == 0.0
    assert receipt["audit"]["compiled"]["blocks"] == 4
    assert receipt["audit"]["steps"] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of inductor, as it is imported and compiles
@pytest.mark.parametrize("mode", ["none", "block"])
def test_fused_graphs_agree_within_rounding(tmp_path, corpus, mode):
    more = {"steps": 1, "activation_checkpoint": ActivationCheckpoint(mode)}
    plain, _ = trained(run_of(tmp_path / "plain", corpus, compiled=False, **more))
    graphs, receipt = trained(run_of(tmp_path / "graphs", corpus, **more), "inductor")
    assert 0.0 < relative(gradient(graphs), gradient(plain)) < 3e-4
    for key in ("loss", "loss_mtp", "loss_indexer", "loss_balance", "grad_norm"):
        assert losses(tmp_path / "graphs")[key] == pytest.approx(
            losses(tmp_path / "plain")[key], rel=3e-4
        )
    assert receipt["audit"]["compiled"]["backend"] == "inductor"


def gradient(tensors):
    """All of it: what the first step leaves as momentum and first moments.

    Not by parameter, nor weights: of gradients that are rounding, AdamW makes whole steps.
    """
    names = sorted(n for n in tensors if n.endswith((".momentum", ".exp_avg")))
    return torch.cat([tensors[name].flatten() for name in names])


def losses(folder):
    [record] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return record


def test_masters_on_the_host_go_with_graphs(tmp_path, corpus):
    """Weights of the blocks are bf16 on the device, and their gradients add up in fp32."""
    runs = [
        run_of(tmp_path / name, corpus, compiled, steps=1, precision=Precision.bf16)
        for name, compiled in (("plain", False), ("graphs", True))
    ]
    plain, graphs = (replace(r, parallel=ParallelConfig(offload="optimizer+master")) for r in runs)
    whole, _ = trained(plain)
    found, receipt = trained(graphs, "eager")
    assert farthest(found, whole) == 0.0
    assert receipt["audit"]["compiled"]["graphs"] >= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of inductor, as it is imported and compiles
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_stopped_compiled_run_goes_on_as_if_it_had_not_been(tmp_path, corpus, backend):
    whole, _ = trained(run_of(tmp_path / "whole", corpus, steps=4, checkpoint_every=2), backend)
    run = run_of(tmp_path / "stopped", corpus, steps=4, checkpoint_every=2)
    with compiled_by(backend):
        trainer = build(run)
        trainer.stop.ask("the test")
        assert trainer.fit() == 75
    resumed, _ = trained(run, backend)
    assert farthest(resumed, whole) == 0.0


# ---- planted faults ------------------------------------------------------------------------------
def no_graph(forward, **_):
    return forward


def uneven(forward, **named):
    """Counts as a graph; channels are up to 10 % off (norms would hide one factor of all)."""
    named["backend"](torch.fx.symbolic_trace(torch.nn.Identity()), [])

    def graph(*args):
        x_BTSD, aux = forward(*args)
        return x_BTSD * torch.linspace(0.9, 1.1, x_BTSD.shape[-1]), aux

    return graph


def not_a_number(forward, **named):
    """Counts as a graph; what it gives would pass for a step to be skipped."""
    named["backend"](torch.fx.symbolic_trace(torch.nn.Identity()), [])

    def graph(*args):
        x_BTSD, aux = forward(*args)
        return x_BTSD * float("nan"), aux

    return graph


def leaks(forward, **named):
    """Counts as a graph; a rounding's worth of each token reaches the one behind it."""
    named["backend"](torch.fx.symbolic_trace(torch.nn.Identity()), [])

    def graph(*args):
        x_BTSD, aux = forward(*args)
        return x_BTSD + 1e-9 * x_BTSD.roll(1, dims=1), aux

    return graph


def chooses_anew(forward, **named):
    """Counts as a graph; recomputed, a gate takes other experts."""
    named["backend"](torch.fx.symbolic_trace(torch.nn.Identity()), [])
    calls = []

    def graph(x_BTSD, ids, context):
        calls.append(1)
        out = forward(x_BTSD, ids, context)
        if len(calls) % 2 == 0:
            context.record.update({name: i + 1 for name, i in context.record.items()})
        return out

    return graph


FAULTS = {
    no_graph: (AuditError, "compiled: train.compile=true: no graph was built", "none"),
    uneven: (AuditError, "compiled: train.compile=true: the graphs' gradient of layers.0", "none"),
    not_a_number: (AuditError, "compiled: train.compile=true: the graphs give loss nan", "none"),
    leaks: (AuditError, "isolation: train.compile=true: by the graphs a document's loss", "none"),
    chooses_anew: (RuntimeError, "chose anew", "block"),
}


def with_gradients(change):
    """``torch.compile`` whose graphs count, and give a block's parameters other gradients.

    Args:
        change: takes the block's number, the parameter's name and the gradient; returns another.
    """
    blocks = []

    def compiled(forward, **named):
        named["backend"](torch.fx.symbolic_trace(torch.nn.Identity()), [])
        block, number = forward.__self__, len(blocks)
        blocks.append(block)

        def graph(*args):
            views = {}
            for name, parameter in block.named_parameters():
                if parameter.requires_grad:
                    views[name] = parameter.view_as(parameter)
                    views[name].register_hook(partial(change, number, name))
            with _reparametrize_module(block, views):
                return forward(*args)

        return graph

    return compiled


def a_tenth_more(number, name, grad):
    return grad * 1.1 if number == 0 else grad


def one_turned(number, name, grad):
    return -grad if (number, name) == (0, "attn.attn_sink") else grad


def of_the_block_behind():
    """The backward pass comes to it first."""
    kept = {}

    def change(number, name, grad):
        if number == 1:
            kept[name] = grad
            return grad
        other = kept.get(name)
        return grad if other is None or other.shape != grad.shape else grad + other

    return change


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (a_tenth_more, "layers.0.attn.wq_a.weight"),
        (one_turned, "layers.0.attn.attn_sink"),
        (of_the_block_behind(), "layers.0."),
    ],
    ids=["scaled", "turned", "leaked"],
)
def test_graphs_with_other_gradients_are_refused_by_the_parameters_name(
    tmp_path, corpus, precision, change, name
):
    run = run_of(tmp_path, corpus, precision=Precision(precision))
    with compiled_by("eager"), patch("torch.compile", with_gradients(change)):
        trainer = build(run)
        with pytest.raises(AuditError) as error:
            trainer.fit()
    found, words = str(error.value).splitlines()[1:], f"the graphs' gradient of {name}"
    assert any(f"compiled: train.compile=true: {words}" in line for line in found)
    if change is one_turned:
        assert len(found) == 1


@pytest.mark.parametrize("planted", FAULTS, ids=lambda f: f.__name__)
def test_graphs_that_are_missing_or_wrong_stop_the_run(tmp_path, corpus, planted):
    error, words, mode = FAULTS[planted]
    run = run_of(tmp_path, corpus, activation_checkpoint=ActivationCheckpoint(mode))
    with compiled_by("eager"), patch("torch.compile", planted):
        trainer = build(run)
        with pytest.raises(error, match=words):
            trainer.fit()


def test_graphs_of_a_later_stage_are_asked_too(tmp_path, corpus):
    """Its rows are shorter, and the graphs that take them leak."""
    batch = ROWS * SEQ_LEN
    stages = [
        StageConfig(name="long", until_tokens=batch),
        StageConfig(name="short", until_tokens=2 * batch, seq_len=SEQ_LEN // 2),
    ]

    def planted(forward, **named):
        graph = leaks(forward, **named)

        def chosen(x_BTSD, *args):
            return (graph if x_BTSD.shape[1] < SEQ_LEN else forward)(x_BTSD, *args)

        return chosen

    run = run_of(tmp_path, corpus, steps=0, stages=stages)
    with compiled_by("eager"), patch("torch.compile", planted):
        trainer = build(run)
        with pytest.raises(AuditError, match="by the graphs a document's loss reaches"):
            trainer.fit()
    assert trainer.state.progress.step == 1


def test_a_block_that_is_no_whole_graph_is_an_error(tmp_path, corpus):
    run = run_of(tmp_path, corpus)

    def reads_the_host(self, u_BTD, ids, context):
        return (u_BTD if u_BTD.sum() > 0 else -u_BTD), {}

    with compiled_by("eager"):
        trainer = build(run)
    block = trainer.engine.model.layers["0"]
    blocks = CompiledBlocks("eager")
    del block.forward
    with patch("model.block.Block.forward", reads_the_host):
        blocks.install(block, recompute=False)
        with pytest.raises(torch._dynamo.exc.Unsupported):
            block(torch.ones(1, 2, 4, 32), None, None)


# ---- refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["model.kernels=auto"], "model.kernels=triton or reference, not of auto"),
        (["model.kernels=torch"], "model.kernels=triton or reference, not of torch"),
        (["train.activation_checkpoint=selective"], "train.activation_checkpoint=selective watch"),
        (["parallel.pp=2"], "parallel.pp=2 exchanges between ranks"),
        (["parallel.ep=2"], "parallel.ep=2 exchanges between ranks"),
        (["parallel.cp=2"], "parallel.cp=2 exchanges between ranks"),
        (["engine=deepspeed"], "engine.name=deepspeed does not go with train.compile=true"),
        (["parallel.offload_activations=true"], "parallel.offload_activations=true takes what"),
        (["model.kernels=triton", "model.deterministic=false"], "model.deterministic=false does"),
        (["quant=fp4_qat"], "quant.recipe=fp4_qat is not built for train.compile=true"),
        (["train.recovery.anticipatory=always", "train.checkpoint_every=1"],
         "train.recovery.anticipatory=always is not built for"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_it_is_refused_by_name(words, line):
    given = ["model=v4_tiny", "model.kernels=reference", "train.compile=true", *words]
    with pytest.raises(USER_ERRORS, match=re.escape(line)):
        compose_run(given)
