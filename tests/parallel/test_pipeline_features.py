"""What a run can ask for beside its layout, on two pipeline stages: as in one process.

Every case is a whole run, audited, in one spawn. Microbatches are cut alike, so the first step's
losses agree to 1e-6 and its gradient norm to 1e-6 relative, rounded or not: every forward pass has
equal bits, only sums over stages have another order. Later steps are free, and Newton-Schulz
amplifies rounding: 1e-3, and averages to 1 % of their distance from the weights, all in all.
"""

import json
import math
import os
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from model.config import IndexerPhase
from optim.config import MatmulDtype
from parallel.collectives import whole
from parallel.config import ParallelConfig
from quant.config import QuantConfig, Recipe
from tests.helpers import run_distributed
from tests.integration.poisoned_run import EVERY, FIRST_SPIKE, poisoned_run, write_poisoned
from tests.integration.small_run import (
    ROWS,
    SEQ_LEN,
    SignalAfter,
    differing,
    final_tensors,
    fit,
    metrics_of,
    small_run,
    write_corpus,
)
from train.build import build
from train.config.recovery import Anticipatory, RecoveryConfig
from train.config.schema import Precision, SampleConfig, StageConfig
from train.errors import ExitCode
from train.preflight.matmul_rate import measured_matmul_rate

BATCH = ROWS * SEQ_LEN
DECAY = 0.9
STAGES = [
    StageConfig(name="warmup", until_tokens=BATCH, indexer_phase=IndexerPhase.warmup),
    StageConfig(name="sparse", until_tokens=3 * BATCH),
]
ALWAYS = RecoveryConfig(anticipatory=Anticipatory.always)

EVERYTHING = "fp4_qat in bf16, indexer warm-up then all, average, anticipatory routing"
PLAIN = "average, anticipatory routing"  # the first step is that of a plain run in fp32


@dataclass(frozen=True)
class Case:
    """How a run differs from the plain one of two steps."""

    schedule: str
    train: dict = field(default_factory=dict)
    quant: Recipe = Recipe.none
    steps: int = 2


EVALUATED = ("val_loss", "val_loss_average")
AVERAGED = {"ema_decay": DECAY, "recovery": ALWAYS}
BF16 = {"precision": Precision.bf16}
CASES = {
    EVERYTHING: Case(
        "zbvzerobubble", {**BF16, **AVERAGED, "stages": STAGES}, Recipe.fp4_qat, steps=3
    ),
    "bf16": Case("1f1b", BF16),
    "fp4_qat": Case("dualpipev", quant=Recipe.fp4_qat),
    "fp4_qat in bf16": Case("interleaved1f1b", BF16, Recipe.fp4_qat),
    "indexer warm-up, then all": Case("zbvzerobubble", {"stages": STAGES}, steps=3),
    PLAIN: Case("interleavedzerobubble", AVERAGED, steps=3),
}


def config(folder, corpus, case):
    run = small_run(
        folder, corpus, steps=case.steps, eval_every=2, micro_batch_size=1, **case.train
    )
    optim = replace(run.optim, muon=replace(run.optim.muon, dtype=MatmulDtype.fp32))
    return replace(run, quant=QuantConfig(recipe=case.quant), optim=optim)


def on_stages(run, schedule):
    os.environ["WORLD_SIZE"] = "2"  # as torchrun would
    return replace(run, parallel=ParallelConfig(pp=2, schedule=schedule))


def train_all(rank, world, runs, skipped):
    for name, run in runs.items():
        assert fit(on_stages(run, CASES[name].schedule))[0] == ExitCode.finished, name
    if skipped is not None:
        skip_on_last_stage(rank, skipped)


def state_of(trainer):
    tensors = trainer.engine.state() | trainer.state.average.state()
    return {name: whole(tensor).clone() for name, tensor in tensors.items()}


def spoil_gradient(engine):
    """Let one gradient be no number; FSDP sets it past autograd's hooks."""
    plain = engine.forward_backward

    def spoilt(*args):
        shares = plain(*args)
        engine.model.norm.weight.grad.mul_(math.nan)
        return shares

    engine.forward_backward = spoilt
    return plain


def skip_on_last_stage(rank, run):
    """A gradient of the last stage alone is not finite: no bit moves on any rank, then on."""
    trainer = build(on_stages(run, "1f1b"))
    rates = trainer.engine.gather(measured_matmul_rate(torch.device("cpu"), torch.float32).peak)
    assert trainer.recorder.matmul_rate == pytest.approx(sum(rates)), "mfu is that of all ranks"
    with trainer.stop:
        trainer._next_step()
        before = state_of(trainer)
        if rank == 1:
            forward_backward = spoil_gradient(trainer.engine)
        trainer._next_step()
        assert differing(before, state_of(trainer)) == []
        assert trainer.state.progress.skipped_steps == 1
        if rank == 1:
            trainer.engine.forward_backward = forward_backward
        trainer._next_step()
    after = state_of(trainer)
    for name in trainer.state.average.averages:
        moved = before[f"ema.{name}"].lerp(after[f"model.{name}"], 1 - DECAY)
        assert torch.equal(after[f"ema.{name}"], moved), name
    changed = differing(before, after)
    assert {f"model.{name}" for name, _ in trainer.engine.model.named_parameters()} <= set(changed)
    assert not trainer.engine.agree(trainer.engine._copy.differs())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def run_all(names, folder, corpus, skipped=None):
    """Each case in this process and on two ranks; the config of the latter."""
    runs = {}
    for name in names:
        one = config(folder / f"{name}, one", corpus, CASES[name])
        assert fit(one)[0] == ExitCode.finished
        runs[name] = replace(one, run_dir=str(folder / f"{name}, two"))
    run_distributed(train_all, 2, runs, skipped)
    for name, many in runs.items():
        compare(name, replace(many, run_dir=str(folder / f"{name}, one")), many)
    return runs


def test_what_a_run_asks_for_does_the_same_on_two_stages(tmp_path, corpus):
    skipped = config(tmp_path / "skipped", corpus, CASES[PLAIN])
    runs = run_all([EVERYTHING], tmp_path, corpus, skipped)
    assert [record.get("anticipated") for record in metrics_of(runs[EVERYTHING])] == [None, None, 1]
    compare_averages(EVERYTHING, tmp_path, runs[EVERYTHING])
    steps = metrics_of(skipped)
    assert [record["skipped_steps"] for record in steps] == [0, 1, 1]
    assert steps[1]["grad_norm"] is None, "no number"
    assert math.isfinite(steps[2]["grad_norm"])


@pytest.mark.slow
def test_each_of_them_alone_does_the_same_on_two_stages(tmp_path, corpus):
    runs = run_all([name for name in CASES if name != EVERYTHING], tmp_path, corpus)
    compare_averages(PLAIN, tmp_path, runs[PLAIN])
    exact = metrics_of(runs[PLAIN])[0]["loss"]
    for name in ("bf16", "fp4_qat", "fp4_qat in bf16"):
        assert metrics_of(runs[name])[0]["loss"] == pytest.approx(exact, rel=1e-2), name


def compare(name, one, many):
    """Metrics of every step, the sample, the table of parameters, what the audit saw."""
    expected, found = metrics_of(one), metrics_of(many)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys(), name
        first = mine["step"] == 1
        for key in ("loss", "loss_mtp", "loss_indexer", "loss_balance", *EVALUATED):
            bound = 1e-6 if first and key not in EVALUATED else 1e-3
            if key in theirs:
                assert mine[key] == pytest.approx(theirs[key], abs=bound), (name, key, mine["step"])
        for key in ("stage", "tokens", "skipped_steps", "anticipated"):
            assert mine.get(key) == theirs.get(key), (name, key)
        for key in theirs:
            if key.startswith("quant_error"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-3), (name, key)
    assert found[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-6), name
    folders = Path(one.run_dir), Path(many.run_dir)
    for file in ("params.csv", "sample.txt"):
        assert folders[1].joinpath(file).read_text() == folders[0].joinpath(file).read_text(), name
    receipts = [json.loads(folder.joinpath("receipt.json").read_text()) for folder in folders]
    assert receipts[1]["audit"]["steps"] == receipts[0]["audit"]["steps"], name


def compare_averages(name, folder, many):
    """Gathered from all stages; away from the weights, and as one process's are."""
    one = replace(many, run_dir=str(folder / f"{name}, one"))
    tensors, expected = final_tensors(many), final_tensors(one)
    names = [name for name in expected if name.startswith("ema.")]
    assert {name for name in tensors if name.startswith("ema.")} == set(names)
    away = sum(float((expected[n] - expected[f"model.{n[4:]}"]).square().sum()) for n in names)
    apart = sum(float((expected[n] - tensors[n]).square().sum()) for n in names)
    assert away > 0
    assert apart < 1e-2**2 * away


# ---- rollbacks and choices that wait in a checkpoint --------------------------------------------
TOLD = ("step", "loss_spikes", "rollbacks", "abandoned_steps", "anticipated", "skipped_steps")
STOPPED = FIRST_SPIKE + EVERY - 1  # a step that is routed by earlier weights


def told(run):
    return [{key: record.get(key) for key in TOLD} for record in metrics_of(run)]


def roll_back_and_stop(rank, world, whole_run, stopped):
    code, trainer = fit(on_stages(whole_run, "1f1b"))
    assert code == ExitCode.finished
    assert trainer.state.recovery.state.rollbacks == 2
    trainer = build(on_stages(stopped, "1f1b"))
    if rank == 0:
        trainer.recorder.trackers.append(SignalAfter(STOPPED, signal.SIGTERM))
    assert trainer.fit() == ExitCode.resumable
    assert fit(on_stages(stopped, "1f1b"))[0] == ExitCode.finished


@pytest.mark.slow
def test_two_stages_roll_back_as_one_process_and_resume_bitwise(tmp_path):
    """Losses agree to 1e-3: free steps. A run that was stopped in between ends with equal bits."""
    one = poisoned_run(tmp_path / "one", write_poisoned(tmp_path))
    one = replace(one, sample=SampleConfig(tokens=0))
    assert fit(one)[0] == ExitCode.finished
    whole_run, stopped = (replace(one, run_dir=str(tmp_path / n)) for n in ("whole", "stopped"))
    run_distributed(roll_back_and_stop, 2, whole_run, stopped)
    assert any(record["anticipated"] for record in told(one))
    assert told(whole_run) == told(one)
    for mine, theirs in zip(metrics_of(whole_run), metrics_of(one), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
    assert metrics_of(stopped) == metrics_of(whole_run)
    assert differing(final_tensors(stopped), final_tensors(whole_run)) == []
