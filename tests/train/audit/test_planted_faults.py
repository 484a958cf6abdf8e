"""The audit stops a run that does not do what was asked, by name.

Each fault is planted in a run that was really built; nothing of the audit itself is touched. The
run has one step, so that the audit's window ends with it.
"""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch

from data.batch import IGNORE
from model.config import Kernels
from model.context import build_context
from model.kernels import elementwise
from model.kernels.attention import attention_reference
from model.kernels.ran import recorded
from model.kernels.select import select
from optim.build import build_optimizer
from optim.config import OptimConfig, OptimizerName
from quant.config import ExpertFormat
from tests.helpers import small_config
from tests.model.kernels.op_cases import indexer_loss, run
from tests.train.audit.audited import BF16, QAT, RECOMPUTED, WARMUP, one_step, sampled, step
from train.audit.faults import AuditError
from train.audit.passes import order_of_sums
from train.build import build
from train.config.schema import HeadPrecision


def frozen_indexer(trainer, stack):
    enter = trainer.engine.set_trainable

    def but_indexers(trains):
        enter(trains)
        for name, parameter in trainer.engine.model.named_parameters():
            parameter.requires_grad_(trains(name) and ".indexer." not in name)

    trainer.engine.set_trainable = but_indexers


def no_indexer_loss(trainer, stack):
    layer = trainer.engine.model.layers["1"].attn
    layer._indexer_loss = lambda *args, **kwargs: args[1].sum() * 0.0


def no_table_line(trainer, stack):
    trainer.engine.optimizer.table.pop(7)


def parameter_in_no_group(trainer, stack):
    optimizer = trainer.engine.optimizer
    set_trainable = optimizer.set_trainable

    def all_but_one(trains):
        set_trainable(trains)
        optimizer._active.remove("layers.1.attn.wq_a.weight")

    optimizer.set_trainable = all_but_one


def adamw_where_muon_was_asked(trainer, stack):
    trainer.engine.optimizer = build_optimizer(
        trainer.engine.model.named_parameters(),
        OptimConfig(name=OptimizerName.adamw, lr=3e-3),
        split_counts=trainer.run.model.split_counts,
    )


def sign_descent_called_muon(trainer, stack):
    stack.enter_context(patch("optim.muon.newton_schulz", lambda x, *_, **__: x.sign()))


def weights_decay_twice(trainer, stack):
    optimizer_step = trainer.engine.optimizer.step

    def more_decay(lr):
        optimizer_step(lr)
        trainer.engine.model.norm.weight.data.mul_(0.99)

    trainer.engine.optimizer.step = more_decay


def quantisation_not_applied(trainer, stack):
    trainer.phase.quantise(False)
    trainer.phase.quantise = lambda on: None


def fp8_where_fp4_was_asked(trainer, stack):
    trainer.phase.quantise(False)
    trainer.phase._quant = replace(QAT, experts=ExpertFormat.fp8)


def identity_kv_cast(trainer, stack):
    cast = trainer.engine.model.layers["2"].attn.kv_cast
    cast.forward = lambda x: x


def constant_hash_table(trainer, stack):
    trainer.engine.model.layers["0"].ffn.gate.tid2eid.zero_()


def repeated_expert_in_hash_table(trainer, stack):
    table = trainer.engine.model.layers["0"].ffn.gate.tid2eid
    table[5, 1] = table[5, 0]


def balance_loss_zero(trainer, stack):
    stack.enter_context(
        patch("model.kernels.routing.balance_loss", lambda index, score, *_: score.sum() * 0)
    )


def rewritten(trainer, batch=lambda b: b, objective=lambda o: o):
    forward = trainer.engine._forward
    trainer.engine._forward = lambda b, o: forward(batch(b), objective(o))


def mtp_labels_dropped(trainer, stack):
    def drop(batch):
        batch.labels_BTK[..., 1:] = IGNORE
        return batch

    rewritten(trainer, batch=drop)


def mtp_left_out_of_the_objective(trainer, stack):
    rewritten(trainer, objective=lambda o: replace(o, mtp_weight=0.0))


def indexer_loss_weighted_twice(trainer, stack):
    rewritten(trainer, objective=lambda o: replace(o, indexer_weight=2 * o.indexer_weight))


def bias_never_updated(trainer, stack):
    trainer.engine.update_biases = lambda load, speed: None


def bias_in_the_wrong_direction(trainer, stack):
    update = trainer.engine.update_biases
    trainer.engine.update_biases = lambda load, speed: update(load, -speed)


def parameter_without_gradient(trainer, stack):
    sink = trainer.engine.model.layers["0"].attn.attn_sink
    sink.register_hook(torch.zeros_like)


def expert_without_gradient(trainer, stack):
    keep = torch.tensor([1.0, 1.0, 0.0, 1.0])[:, None, None]
    weight = trainer.engine.model.layers["1"].ffn.experts.w2.weight
    weight.register_hook(lambda grad: grad * keep)


def weight_moves_in_the_backward_pass(trainer, stack):
    forward_backward = trainer.engine.forward_backward

    def and_moves(batches, objective):
        shares = forward_backward(batches, objective)
        trainer.engine.model.layers["1"].attn.wq_b.weight.data.view(-1)[3] += 1e-6
        return shares

    trainer.engine.forward_backward = and_moves


def frozen_weight_moves(trainer, stack):
    update = trainer.engine.optimizer_step

    def and_decay(lr, finite):
        trainer.engine.model.head.weight.data.mul_(1 - lr)
        return update(lr, finite)

    trainer.engine.optimizer_step = and_decay


def documents_seen_as_one(trainer, stack):
    model = trainer.engine.model
    model.context = lambda ids_BT, *more: build_context(
        model.config, torch.zeros_like(ids_BT), True, None, *more
    )


def fp32_where_bf16_was_asked(trainer, stack):
    trainer.engine.model.compute_dtype = torch.float32


def fp32_head_where_bf16_was_asked(trainer, stack):
    trainer.engine.model.head_dtype = torch.float32


def tf32_head_unasked(trainer, stack):
    trainer.engine.model.head_tf32 = True


def nothing_recomputed(trainer, stack):
    for block in trainer.engine.model.modules():
        block.__dict__.pop("forward", None)


def attention_of_no_table(trainer, stack):
    trainer.engine.model.layers["1"].attn._attention = attention_reference


# fault -> (the audit's name for it, words of its line, how the run differs from the plain one)
FAULTS = {
    frozen_indexer: ("tracked", "indexer.wq_b.weight should train", {}),
    no_indexer_loss: ("indexer", "the indexer loss is 0.0 with weight 0.01", {}),
    no_table_line: ("owner", "stands in the optimizer's table 0 times", {}),
    parameter_in_no_group: ("owner", "wq_a.weight received a gradient but did not move", {}),
    adamw_where_muon_was_asked: ("owner", "belongs to adamw, muon was asked", {}),
    sign_descent_called_muon: (
        "algorithm",
        "of the update's energy is off an",
        {},
    ),
    weights_decay_twice: ("algorithm", "norm.weight: adamw was asked for", {}),
    quantisation_not_applied: ("quant", "quant.experts: layers.0.ffn.experts", {"quant": QAT}),
    fp8_where_fp4_was_asked: ("quant", "quant.experts: layers.0.ffn.experts", {"quant": QAT}),
    identity_kv_cast: ("quant", "quant.kv: layers.2.attn.kv_cast left its values", {"quant": QAT}),
    constant_hash_table: ("hash_table", "layers.0.ffn.gate.tid2eid is constant", {}),
    repeated_expert_in_hash_table: ("hash_table", "names an expert twice", {}),
    balance_loss_zero: ("balance", "the balance loss is 0.0", {}),
    mtp_labels_dropped: ("mtp", "the MTP loss is 0.0 with weight 0.3", {}),
    mtp_left_out_of_the_objective: ("objective", "0.3 * loss_mtp", {}),
    indexer_loss_weighted_twice: ("objective", "0.01 * loss_indexer", {}),
    bias_never_updated: ("bias", "moved by 0, train.bias_update_speed asks for 0.05", {}),
    bias_in_the_wrong_direction: ("bias", "layers.1.ffn.gate.bias moved by 0.05", {}),
    parameter_without_gradient: ("gradient", "layers.0.attn.attn_sink received no gradient", {}),
    expert_without_gradient: ("gradient", "w2.weight had no gradient for expert 2", {}),
    weight_moves_in_the_backward_pass: ("early", "layers.1.attn.wq_b.weight moved before", {}),
    frozen_weight_moves: ("frozen", "head.weight is frozen in this phase but moved", WARMUP),
    documents_seen_as_one: ("isolation", "reaches the one before it", {}),
    nothing_recomputed: ("recompute", "layers.0 ran 2 times in 2 microbatches", RECOMPUTED),
    attention_of_no_table: (
        "kernels",
        "attention was served 6 times by the table, 8",
        {},
    ),
    fp32_where_bf16_was_asked: ("precision", "multiplied in torch.float32", BF16),
    fp32_head_where_bf16_was_asked: (
        "precision",
        "the head multiplied in fp32, train.head_precision=bf16 was asked",
        {**BF16, "head_precision": HeadPrecision.bf16},
    ),
    tf32_head_unasked: ("precision", "multiplied in tf32, train.head_precision=fp32 was asked", {}),
}
# What the size of samples may matter to: the update, and the weights that the seams read.
BY_SAMPLES = (
    parameter_in_no_group, adamw_where_muon_was_asked, sign_descent_called_muon,
    weights_decay_twice, quantisation_not_applied, fp8_where_fp4_was_asked, bias_never_updated,
    weight_moves_in_the_backward_pass, frozen_weight_moves,
)  # fmt: skip


@pytest.mark.parametrize(
    ("plant", "few"), [(f, False) for f in FAULTS] + [(f, True) for f in BY_SAMPLES]
)
def test_planted_fault_stops_the_run_by_name(tmp_path, corpus, plant, few):
    """By what a CPU looks at, and by the few samples that a device takes."""
    name, words, changes = FAULTS[plant]
    with ExitStack() as stack:
        if few:
            stack.enter_context(sampled())
        trainer = build(one_step(tmp_path / "run", corpus, **changes))
        plant(trainer, stack)
        with pytest.raises(AuditError) as error:
            step(trainer)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert any(line.startswith(f"{name}:") and words in line for line in lines), lines
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def triton_run(folder, corpus):
    """One block, one short row: Triton's interpreter takes its time."""
    run = one_step(folder, corpus, seq_len=12, global_batch_tokens=12, micro_batch_size=1)
    shape = {"num_hidden_layers": 1, "layer_kinds": ["swa"], "compress_ratios": [0]}
    kernels = {"kernels": Kernels.triton, "num_nextn_predict_layers": 0}
    return replace(run, model=small_config(vocab_size=260, **shape, **kernels))


def test_op_that_only_says_it_is_triton_is_refused_by_name(tmp_path, corpus):
    with patch("model.kernels.triton.swiglu.swiglu", elementwise.swiglu):
        trainer = build(triton_run(tmp_path / "planted", corpus))
        with pytest.raises(AuditError) as error:
            step(trainer)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "kernels: model.kernels=triton: swiglu was called 2 times by its triton implementation,"
        " and in 2 of them no triton kernel was started"
    ]
    trainer = build(triton_run(tmp_path / "honest", corpus))
    step(trainer)
    result = trainer.audit.result()
    assert {"attention", "cross_entropy", "swiglu"} <= result["kernels"].keys()
    assert result["kernels"].pop("block_linear") == "torch"  # one batched product of torch's
    assert set(result["kernels"].values()) == {"triton"}
    assert {"swiglu_forward", "swiglu_backward"} <= result["started"].keys()


def test_sums_in_another_order_than_asked_for_are_refused_by_name():
    """Planted where the ops are taken from the table; ``kernels`` asks this of every step."""
    case, runs = indexer_loss(True), {}
    for order in (True, False):
        with recorded() as runs[order]:
            run(case, partial(select, kernels=Kernels.triton, deterministic=order), case.inputs)
        assert [*order_of_sums(order, runs[order])] == []
    [line] = order_of_sums(True, runs[False])
    assert line.startswith("model.deterministic=true: list_grad_pairs_atomic was started")
    [line] = order_of_sums(False, runs[True])
    assert line.startswith("model.deterministic=false: segment_sum was started")


def test_op_that_only_says_it_is_compiled_is_refused_by_name(tmp_path, corpus):
    run = one_step(tmp_path / "run", corpus)
    run.model = small_config(vocab_size=260, kernels=Kernels.compiled)
    with patch("model.kernels.elementwise_fast.compiled", lambda *_: False):
        trainer = build(run)
        with pytest.raises(AuditError, match=r"rms_norm was called \d+ times by its compiled imp"):
            step(trainer)
