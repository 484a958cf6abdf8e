"""Runs under ``engine=deepspeed``: audited, killed and resumed bitwise, handed to other engines.

One spawn of two ranks for all of them, since DeepSpeed takes seconds to import. The loss of the
first step after a change of engine is held to 1e-5, as for a change of layout.
"""

import os
from dataclasses import replace

import pytest

from parallel.config import EngineConfig, EngineName, OffloadTo
from tests.helpers import run_distributed
from tests.integration.small_run import (
    Killed,
    differing,
    final_tensors,
    fit,
    metrics_of,
    small_run,
    write_corpus,
)
from train.audit.audit import AuditError
from train.build import build
from train.errors import ExitCode

TORCH = EngineConfig()
ZERO_2 = EngineConfig(EngineName.deepspeed, 2, OffloadTo.cpu)
ZERO_3 = EngineConfig(EngineName.deepspeed, 3)


def on_rank(rank, world, folder, corpus):
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}

    def run(name, engine):
        plain = small_run(folder / name, corpus, steps=6, checkpoint_every=2, keep_checkpoints=0)
        return replace(plain, engine=engine)

    killed_run_continues_bitwise(run)
    run_goes_from_engine_to_engine(run)
    flat_shards_are_named(run)


def fit_until(run, step):
    """A run that dies behind this step, before its checkpoint."""
    trainer = build(run)
    write = trainer.recorder.write

    def then_die(done, *args):
        write(done, *args)
        if done.number == step:
            raise Killed

    trainer.recorder.write = then_die
    with pytest.raises(Killed):
        trainer.fit()


def killed_run_continues_bitwise(run):
    straight, killed = run("straight", ZERO_3), run("killed", ZERO_3)
    code, trainer = fit(straight)
    assert code == ExitCode.finished
    assert trainer.audit.result()["steps"] == [1, 2, 3]
    fit_until(killed, 5)
    assert fit(killed)[0] == ExitCode.finished
    assert differing(final_tensors(killed), final_tensors(straight)) == []
    assert metrics_of(killed) == metrics_of(straight)


def run_goes_from_engine_to_engine(run):
    """torch to step 2, ZeRO 2 to step 4, torch to the end: as if torch had run all the time."""
    straight = run("torch", TORCH)
    assert fit(straight)[0] == ExitCode.finished
    for engine, dies in ((TORCH, 3), (ZERO_2, 5), (TORCH, None)):
        moved = run("moved", engine)
        if dies:
            fit_until(moved, dies)
        else:
            assert fit(moved)[0] == ExitCode.finished
    expected, found = metrics_of(straight), metrics_of(moved)
    assert [r["step"] for r in found] == [1, 2, 3, 4, 5, 6]
    for step in (1, 2, 3, 5):  # 3 and 5 are the first of an engine
        bound = 1e-5 if step < 5 else 1e-3  # after two free steps: Newton-Schulz amplifies
        assert found[step - 1]["loss"] == pytest.approx(expected[step - 1]["loss"], rel=bound)


def flat_shards_are_named(run):
    """What a Muon of DeepSpeed's flat shards would do: each row by itself is a vector of norm 1."""
    trainer = build(run("flat", EngineConfig(EngineName.deepspeed, 1)))
    muon = trainer.engine._muon
    step_round = muon._step_round

    def flat(now, momentum, lr):
        shards = replace(now, rows=1, cols=now.rows * now.cols)
        step_round(shards, momentum.view(len(momentum), 1, -1), lr)

    muon._step_round = flat
    with pytest.raises(AuditError, match=r"algorithm: .*: muon was asked for, but"):
        trainer.fit()


def test_runs_under_deepspeed(tmp_path):
    run_distributed(on_rank, 2, tmp_path, write_corpus(tmp_path))
