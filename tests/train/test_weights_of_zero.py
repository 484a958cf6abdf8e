"""A loss of weight 0 costs nothing, and what only it would train stands still.

Work is counted in calls of torch's operators, forward and backward, by a dispatch mode; equality
is bitwise, since the same operators meet the same numbers.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import IndexerPhase
from model.kernels.ran import recorded
from model.transformer import DeepSeekV4
from quant.config import QuantConfig
from tests.helpers import random_rows, small_model
from tests.train.test_step import ROWS, SEQ_LEN, engine_of, run_config
from train.config.schema import StageConfig
from train.phase import PhaseSwitch
from train.stages import resolve
from train.step import plan_step, train_step

BATCH = ROWS * SEQ_LEN


class Operators(TorchDispatchMode):
    """How often each operator was called."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def steps(model: DeepSeekV4, count: int = 1, **train):
    """Losses and gradient norms of some steps, operators of the last, and what served ops."""
    run = run_config(steps=count, monitor_every=0, **train)
    run = replace(run, model=model.config)
    rows = random_rows(ROWS, SEQ_LEN, 128, 1 + model.config.num_nextn_predict_layers, seed=3)
    engine, plan = engine_of(model), resolve(run)
    switch, told, tokens = PhaseSwitch(engine, QuantConfig()), [], 0
    for number in range(1, count + 1):
        step = plan_step(number, tokens, plan, run.train, run.optim)
        switch.enter(step)
        with Operators() as operators, recorded() as ran:
            result = train_step(engine, rows, step)
        told.append({**result.shares.losses, "norm": torch.tensor(result.update.grad_norm)})
        tokens += step.batch_tokens
    return told, operators.calls, Counter({op: n for (op, _), n in ran.calls.items()})


NO_MTP = {"num_nextn_predict_layers": 0, "compress_ratios": [0, 4, 8]}
ZERO_MTP = {"mtp_loss_weight": 0.0, "mtp_loss_weight_decay": 0.0}


@pytest.mark.core
def test_mtp_of_weight_0_is_a_model_without_mtp():
    """The same operators as often, and the same bits in every loss and norm of three steps."""
    told, ran, _ = steps(small_model(), 3, **ZERO_MTP)
    without, least, _ = steps(small_model(**NO_MTP), 3)
    assert ran["aten.mm.default"] > 0
    assert {op: n for op, n in ran.items() if n != least[op]} == {}
    for mine, theirs in zip(told, without, strict=True):
        assert {name for name in mine if not torch.equal(mine[name], theirs[name])} == set()


@pytest.mark.parametrize("phase", [IndexerPhase.sparse, IndexerPhase.full])
def test_indexer_of_weight_0_only_chooses(phase):
    """Where it chooses it still runs, without gradients; in the full phase it has no work left."""
    trained = {"indexer_phase": phase, "indexer_loss_weight": 0.01}
    for model, zero in ((small_model(), False), (small_model(), True)):
        indexer, asked = model.layers["1"].attn.indexer, []
        indexer.register_forward_hook(lambda *seen: asked.append(seen[2][0].requires_grad))  # noqa: B023
        _, _, ops = steps(model, **trained | ({"indexer_loss_weight": 0.0} if zero else {}))
        sparse = phase is IndexerPhase.sparse
        assert asked == ([not zero] if sparse else [])
        assert ops["indexer_loss"] == (sparse and not zero)


def test_balance_of_weight_0_counts_the_load_alone(monkeypatch):
    asked = []
    for weight in (0.1, 0.0):
        model = small_model()
        for layer in (*model.layers.values(), *model.mtp.values()):
            moe = layer.ffn

            def noted(*args, plain=moe._load_and_balance, **named):
                asked.append((weight, named["balance"]))  # noqa: B023
                return plain(*args, **named)

            monkeypatch.setattr(moe, "_load_and_balance", noted)
        told, _, _ = steps(model, balance_loss_weight=weight)
        assert (float(told[0]["loss_balance"]) > 0) == (weight > 0)
    assert {one for one in asked if one[1]} == {(0.1, True)}
    assert (0.0, False) in asked


def test_mtp_stands_still_until_its_weight_comes_and_after_it_went():
    """Weight 0, 0.3, 0: to the bit, optimizer state included; the bias of its gate too."""
    model = small_model()
    run = replace(
        run_config(
            steps=0,
            stages=[
                StageConfig("without", BATCH, mtp_loss_weight=0.0),
                StageConfig("with", 2 * BATCH, mtp_loss_weight=0.3),
                StageConfig("after", 3 * BATCH, mtp_loss_weight=0.0),
            ],
        ),
        model=model.config,
    )
    engine, plan, rows = engine_of(model), resolve(run), random_rows(ROWS, SEQ_LEN, 128, seed=3)
    switch, moved = PhaseSwitch(engine, QuantConfig()), []
    for number in range(1, 4):
        before = {n: t.clone() for n, t in engine.state().items()}
        step = plan_step(number, (number - 1) * BATCH, plan, run.train, run.optim)
        switch.enter(step)
        result = train_step(engine, rows, step)
        moved.append({n for n, t in engine.state().items() if not torch.equal(t, before[n])})
        assert (float(result.shares.losses["loss_mtp"]) > 0) == (number == 2)
    of_mtp = [{name for name in names if ".mtp." in name} for names in moved]
    assert of_mtp[0] == of_mtp[2] == set()
    assert {"model.mtp.0.h_proj.weight", "model.mtp.0.ffn.gate.bias"} < of_mtp[1]
    assert all("model.layers.0.attn.wq_a.weight" in names for names in moved)
