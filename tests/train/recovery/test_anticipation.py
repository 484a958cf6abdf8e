"""Anticipatory routing against a reference that holds the weights of every step.

Oracle: a loop of its own that keeps a copy of the model from before each step. Step t records the
choices of copy t - lag on the batch of step t, and trains with the gates' indices replaced by them.
Bound: equality of every gradient and of the state after the last step, since both compute the same
sums in the same order.
"""

import copy
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from model.config import Kernels
from tests.integration.small_run import (
    KillAfter,
    Killed,
    SignalAfter,
    differing,
    final_tensors,
    fit,
    metrics_of,
    small_run,
    write_corpus,
)
from train.build import build
from train.checkpoint import reader as checkpoint_reader
from train.checkpoint.manager import Checkpoints
from train.checkpoint.retention import remove
from train.config.recovery import Anticipatory, RecoveryConfig
from train.config.schema import ActivationCheckpoint, SampleConfig
from train.errors import ExitCode
from train.step import microbatches, objective_of, plan_step

STEPS = 5
LEARNED = {"layers.1.ffn.gate", "layers.2.ffn.gate", "mtp.0.ffn.gate"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def run_of(folder, corpus, lag=1, when=Anticipatory.always, steps=STEPS, **train):
    """Two microbatches a step, learning fast enough for choices to change."""
    recovery = RecoveryConfig(anticipatory=when, anticipatory_lag=lag)
    run = small_run(folder, corpus, steps=steps, eval_every=0, recovery=recovery, **train)
    run.model = replace(run.model, kernels=Kernels.reference)
    run.optim.lr = 2e-2
    run.sample = SampleConfig(tokens=0)
    return run


class Spy:
    """Notes what every step's update is made from; stands before the engine's own step."""

    def __init__(self, trainer):
        self.gradients, self.forwards = [], []
        engine = trainer.engine
        update = engine.optimizer_step

        def noting(lr, finite):
            self.gradients.append(
                {
                    n: p.grad.clone()
                    for n, p in engine.model.named_parameters()
                    if p.grad is not None
                }
            )
            return update(lr, finite)

        engine.optimizer_step = noting
        engine.model.register_forward_hook(lambda *_: self.forwards.append(torch.is_grad_enabled()))


def reference(run, lag):
    """Gradients of each step, the state after the last, and whether old choices ever differed."""
    trainer = build(run)
    engine, history, gradients, differed = trainer.engine, [], [], False
    tokens = 0
    for number in range(1, STEPS + 1):
        step = plan_step(number, tokens, trainer.plan, run.train, run.optim)
        tokens += step.batch_tokens
        trainer.phase.enter(step)
        rows = trainer.state.loader.plan(step.num_rows, step.stage.seq_len)
        history.append(copy.deepcopy(engine.model))
        objective, load = objective_of(step, rows.counts), {}
        for batch in microbatches(rows, step.num_rows, step.stage.micro_batch_size):
            tensors = (batch.input_ids_BT, batch.document_ids_BT, batch.labels_BTK)
            replay = {}
            if number > lag:
                old, own = {}, {}
                with torch.no_grad():
                    history[-1 - lag](*tensors, replace(objective, record=old))
                    engine.model(*tensors, replace(objective, record=own))
                replay = {name: old[name] for name in LEARNED}
                differed |= any(not torch.equal(old[name], own[name]) for name in LEARNED)
            output = engine.model(*tensors, replace(objective, replay=replay))
            output.total.backward()
            for name, load_E in output.expert_load.items():
                load[name] = load.get(name, 0) + load_E
        gradients.append({n: p.grad.clone() for n, p in engine.model.named_parameters()})
        engine.optimizer_step(step.lr, finite=True)
        engine.update_biases(load, step.weights.bias_update_speed)
    return gradients, engine.state(), differed


@pytest.mark.core
@pytest.mark.parametrize("lag", [1, 2])
def test_choices_are_those_of_the_weights_lag_steps_before(corpus, tmp_path, lag):
    trainer = build(run_of(tmp_path / "run", corpus, lag))
    spy = Spy(trainer)
    trainer.fit()
    gradients, state, differed = reference(
        run_of(tmp_path / "reference", corpus, when=Anticipatory.never), lag
    )
    assert differed  # else any routing would pass
    for number, (mine, theirs) in enumerate(zip(spy.gradients, gradients, strict=True), 1):
        assert differing(mine, theirs) == [], number
    assert differing(trainer.engine.state(), state) == []
    records = metrics_of(trainer.run)
    assert [r["step"] for r in records if "anticipated" in r] == list(range(1 + lag, STEPS + 1))


def test_switched_off_it_costs_no_forward_pass_and_no_bit(corpus, tmp_path):
    """As by default, where nothing has been rolled back."""
    counts, states = [], []
    for when in (Anticipatory.after_rollback, Anticipatory.always):
        trainer = build(run_of(tmp_path / when.value, corpus, when=when))
        spy = Spy(trainer)
        trainer.fit()
        counts.append((spy.forwards.count(True), spy.forwards.count(False)))
        states.append(trainer.engine.state())
    _, state, _ = reference(run_of(tmp_path / "plain", corpus, when=Anticipatory.never), STEPS)
    assert differing(states[0], state) == []
    assert differing(states[1], state) != []
    assert counts[0] == (2 * STEPS + 1, 4)  # the audit's one, and two evaluations at the end
    assert counts[1] == (2 * STEPS + 1, 4 + 2 * (STEPS - 1))  # one look ahead a step but the last


@pytest.mark.slow
@pytest.mark.parametrize("lag", [1, 2])
def test_killed_in_the_mode_continues_bitwise(corpus, tmp_path, lag):
    whole = run_of(tmp_path / "whole", corpus, lag, checkpoint_every=2)
    fit(whole)
    killed = replace(whole, run_dir=str(tmp_path / "killed"))
    trainer = build(killed)
    trainer.recorder.trackers.append(KillAfter(3))
    with pytest.raises(Killed):
        trainer.fit()
    fit(killed)
    assert metrics_of(killed) == metrics_of(whole)
    assert differing(final_tensors(killed), final_tensors(whole)) == []


@pytest.mark.slow
@pytest.mark.parametrize("mode", [ActivationCheckpoint.block, ActivationCheckpoint.selective])
def test_recomputation_routes_as_the_first_pass(corpus, tmp_path, mode):
    plain, recomputed = (
        run_of(tmp_path / m.value, corpus, activation_checkpoint=m)
        for m in (ActivationCheckpoint.none, mode)
    )
    for run in (plain, recomputed):
        fit(run)
    assert metrics_of(plain) == metrics_of(recomputed)
    assert differing(final_tensors(plain), final_tensors(recomputed)) == []


@pytest.mark.slow
def test_other_microbatches_get_the_same_choices(corpus, tmp_path):
    """Stopped and resumed with microbatches of 1 and 4 rows, a step is given the same experts."""
    run = run_of(tmp_path / "run", corpus, steps=4)
    trainer = build(run)
    trainer.recorder.trackers.append(SignalAfter(3, signal.SIGTERM))
    assert trainer.fit() == ExitCode.resumable
    loads = []
    for size in (1, 2, 4):
        folder = tmp_path / str(size)
        shutil.copytree(run.run_dir, folder)
        train = replace(run.train, micro_batch_size=size)
        trainer = build(replace(run, run_dir=str(folder), train=train))
        loads.append({})
        move = trainer.engine.update_biases

        def noting(load, speed, move=move):
            loads[-1].update({name: load_E.clone() for name, load_E in load.items()})
            move(load, speed)

        trainer.engine.update_biases = noting
        trainer.fit()
        assert metrics_of(trainer.run)[-1]["anticipated"] == 1
    assert loads[0].keys() >= LEARNED
    assert differing(loads[0], loads[1]) == differing(loads[0], loads[2]) == []


def test_names_of_choices_are_the_same_in_every_checkpoint(corpus, tmp_path):
    """FAULTS D1: a name that held the number of a step gave each save buffers of its own."""
    trainer = build(run_of(tmp_path / "run", corpus, 2, checkpoint_every=1, keep_checkpoints=0))
    trainer.fit()
    saved = [
        {name for name in checkpoint_reader.saved_tensors(path) if name.startswith("anticipated.")}
        for path in trainer.checkpoints.published()
    ]
    waiting = {f"anticipated.+{ahead}.{gate}" for ahead in (1, 2) for gate in LEARNED}
    assert saved[1:-2] == [waiting] * (STEPS - 3)
    assert saved[-1] == set()


def test_choices_under_the_names_of_older_checkpoints_are_read(corpus, tmp_path):
    run = run_of(tmp_path / "run", corpus, steps=4)
    trainer = build(run)
    trainer.recorder.trackers.append(SignalAfter(2, signal.SIGTERM))
    assert trainer.fit() == ExitCode.resumable
    folder = trainer.checkpoints.path(2)
    state = checkpoint_reader.verify(folder)
    saved = checkpoint_reader.saved_tensors(folder)
    tensors = {
        name.replace(".+1.", ".3."): tensor
        for name, tensor in checkpoint_reader.load_each(folder, sorted(saved))
    }
    assert any(name.startswith("anticipated.3.") for name in tensors)
    remove(folder)
    Checkpoints(folder.parent).save(2, tensors, state)
    again = build(run)
    assert differing(again.state.anticipation.state(2), trainer.state.anticipation.state(2)) == []
