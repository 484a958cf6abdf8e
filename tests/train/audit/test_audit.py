"""The audit lets honest variants pass, and what is not finite to ``train.recovery``.

``test_planted_faults.py`` asks what it must stop, ``test_audit_samples.py`` what it looks at.
"""

import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from model.config import IndexerPhase
from optim.config import OptimConfig, OptimizerName
from quant.config import QuantConfig, Recipe
from tests.helpers import small_config
from tests.integration.small_run import final_tensors, small_run
from tests.train.audit.audited import BF16, QAT, RECOMPUTED, WARMUP, one_step, step
from tests.train.audit.config_reads import ConfigReads
from tests.train.audit.inactive_keys import needed
from train.audit import audit
from train.audit.audit import longest_document
from train.build import build
from train.config.schema import ActivationCheckpoint


# ---- steps that are not finite belong to train.recovery --------------------------------------
def poison(trainer, number):
    """Step ``number`` has losses and gradients that are not finite, as after an overflow."""
    forward_backward = trainer.engine.forward_backward

    def poisoned(batches, objective):
        shares = forward_backward(batches, objective)
        if trainer.state.progress.step + 1 != number:
            return shares
        for parameter in trainer.engine.model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(math.nan)
        losses = {name: value * math.nan for name, value in shares.losses.items()}
        return replace(shares, total=shares.total * math.nan, losses=losses)

    trainer.engine.forward_backward = poisoned
    return trainer


def test_step_that_is_not_finite_is_skipped_alike_in_and_outside_the_audits_window(
    tmp_path, corpus
):
    """The fifth step is far from the undisturbed run's start, and the first of the resumed one."""
    runs = [small_run(tmp_path / n, corpus, steps=8, checkpoint_every=4) for n in ("whole", "two")]
    assert poison(build(runs[0]), 5).fit() == 0
    stopped = build(runs[1])
    forward_backward = stopped.engine.forward_backward

    def then_stop(batches, objective):
        if stopped.state.progress.step + 1 == 4:
            stopped.stop.ask("the test")
        return forward_backward(batches, objective)

    stopped.engine.forward_backward = then_stop
    assert stopped.fit() == 75
    resumed = poison(build(runs[1]), 5)
    assert resumed.fit() == 0
    assert resumed.audit.result()["steps"] == [6, 7, 8]
    assert resumed.state.progress.skipped_steps == 1
    a, b = (final_tensors(run) for run in runs)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_first_step_that_is_not_finite_does_not_end_the_run(tmp_path, corpus):
    trainer = poison(build(small_run(tmp_path / "run", corpus, steps=5, eval_every=0)), 1)
    assert trainer.fit() == 0
    assert trainer.audit.result()["steps"] == [2, 3, 4]


# ---- what must pass -----------------------------------------------------------------------------
def model(**changes):
    return {"model": small_config(vocab_size=260, **changes)}


HONEST = {
    "plain": {},
    "plain residual": model(residual="plain"),
    "csa only": model(attention="csa"),
    "hca only": model(attention="hca"),
    "window only": model(attention="swa"),
    "dense": model(attention="dense"),
    "no shared expert": model(n_shared_experts=0),
    "no mtp": model(num_nextn_predict_layers=0, compress_ratios=[0, 4, 8]),
    "two mtp depths": model(num_nextn_predict_layers=2, compress_ratios=[0, 4, 8, 0, 0]),
    "all learned": model(num_hash_layers=0),
    "gamma": model(hc_gamma=True),
    "adamw": {"optim": OptimConfig(name=OptimizerName.adamw, lr=3e-3)},
    "bf16": {"train": BF16},
    "fp4 qat in bf16": {"quant": QAT, "train": BF16},
    "deployed": {"quant": QuantConfig(recipe=Recipe.deployed), "train": BF16},
    "fp8": {"quant": QuantConfig(recipe=Recipe.fp8)},
    "dense phase": {"train": {"indexer_phase": IndexerPhase.full}},
    "warm-up phase": {"train": WARMUP},
    "no side losses": {
        "train": {
            "mtp_loss_weight": 0.0,
            "indexer_loss_weight": 0.0,
            "balance_loss_weight": 0.0,
            "bias_update_speed": 0.0,
        }
    },
    "recomputed": {"train": RECOMPUTED},
    "partly recomputed": {"train": {"activation_checkpoint": ActivationCheckpoint.selective}},
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_variant_passes(tmp_path, corpus, name):
    changes = dict(HONEST[name])
    run = one_step(tmp_path / "run", corpus, **changes.pop("train", {}))
    run = replace(run, **changes)
    reads = ConfigReads(run)
    trainer = build(run)
    step(trainer)
    assert trainer.audit.result()["steps"] == [1]
    assert trainer.audit.result()["kernels"]["swiglu"] == "compiled"
    assert [key for key in reads.unread() if needed(run, key)] == [], "a wish that nobody fulfils"


def test_audit_leaves_the_model_as_it_was(tmp_path, corpus):
    """Same bits with and without: hooks, wrapped ops and the probe of isolation leave no trace."""
    runs = [one_step(tmp_path / name, corpus, QAT) for name in ("with", "without")]
    trainers = [build(run) for run in runs]
    with patch.object(audit, "AUDITED_STEPS", 0):
        trainers[1].audit._is_due = lambda step: False
        step(trainers[1])
    step(trainers[0])
    a, b = (trainer.engine.state() for trainer in trainers)
    assert all(torch.equal(a[name], b[name]) for name in a)
    ops = [m.op for m in trainers[0].engine.model.modules() if hasattr(m, "op")]
    assert not any("watched" in getattr(op, "__name__", "") for op in ops)


def test_longest_document_counts_runs():
    ids = torch.tensor([[0, 0, 1, 1, 1, -1, -1, -1], [0, 1, 1, 2, 2, 2, 2, 3]])
    assert longest_document(ids) == 4
    assert longest_document(ids[:1]) == 3
    assert longest_document(torch.full((1, 4), -1)) == 0
