"""What a run can ask for beside shards of rows: as in one process, and resumed to the bit.

Bounds: the first step's losses agree to 1e-6 in fp32 and, quantised and in bf16, to 2e-3, since
a value that falls to the other side of a rounding's edge moves one loss by about that. Later steps
are free, and Newton-Schulz amplifies rounding: 1e-3. Averages: a tenth of their distance from the
weights, since one of other weights would be apart by that distance. A run that was stopped and went
on equals the one that was not, bit for bit.
"""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from model.config import IndexerPhase
from optim.config import MatmulDtype
from parallel.config import ParallelConfig
from quant.config import QuantConfig, Recipe
from tests.helpers import run_distributed
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
from train.config.schema import ActivationCheckpoint, Precision, RunConfig, StageConfig
from train.errors import ExitCode

BATCH = ROWS * SEQ_LEN
STAGES = [  # whole rows, shards, shards of rows twice as long, then whole rows again
    StageConfig(name="whole", until_tokens=BATCH, indexer_phase=IndexerPhase.full),
    StageConfig(name="warmup", until_tokens=2 * BATCH, cp=2, indexer_phase=IndexerPhase.warmup),
    StageConfig(name="long", until_tokens=5 * BATCH, cp=2, seq_len=2 * SEQ_LEN, micro_batch_size=1),
    StageConfig(name="end", until_tokens=6 * BATCH, cp=1),
]
STAGED = {
    "stages": STAGES, "ema_decay": 0.9, "checkpoint_every": 1, "micro_batch_size": 1,
    "recovery": RecoveryConfig(anticipatory=Anticipatory.always),
    "activation_checkpoint": ActivationCheckpoint.block,
}  # fmt: skip
LOSSES = ("loss", "loss_mtp", "loss_indexer", "loss_balance", "val_loss", "val_loss_average")


def config(folder, corpus, steps, **train) -> RunConfig:
    run = small_run(folder, corpus, steps=steps, eval_every=2, **train)
    return replace(
        run, optim=replace(run.optim, muon=replace(run.optim.muon, dtype=MatmulDtype.fp32))
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def compare(one, many, first_bound):
    for theirs, mine in zip(metrics_of(one), metrics_of(many), strict=True):
        assert mine.keys() == theirs.keys()
        for key in LOSSES:
            trained = theirs["step"] > 1 or key.startswith("val")
            bound = max(first_bound, 1e-3 if trained else 0.0)
            if key in theirs:
                assert mine[key] == pytest.approx(theirs[key], abs=bound), (key, mine["step"])
        for key in ("stage", "tokens", "skipped_steps", "anticipated"):
            assert mine.get(key) == theirs.get(key), key


# ---- stages -------------------------------------------------------------------------------------
def train_in_parts(rank, world, whole, parts):
    os.environ["WORLD_SIZE"] = str(world)
    assert fit(whole)[0] == ExitCode.finished
    for stopped, shards in ((1, 1), (2, 2), (3, 2), (6, 1)):
        trainer = build(parts)
        if rank == 0 and stopped < 6:
            trainer.recorder.trackers.append(SignalAfter(stopped, signal.SIGTERM))
        assert trainer.fit() == (ExitCode.resumable if stopped < 6 else ExitCode.finished)
        assert trainer.engine.shard.count == shards


def test_stages_cut_rows_otherwise_and_a_run_goes_on_over_their_edges(tmp_path, corpus):
    one = config(tmp_path / "one", corpus, 6, **STAGED)
    alone = [replace(stage, cp=1) for stage in STAGES]
    fit(replace(one, train=replace(one.train, stages=alone)))
    whole, parts = (
        replace(one, run_dir=str(tmp_path / name), parallel=ParallelConfig(dp_shard=2))
        for name in ("whole", "parts")
    )
    run_distributed(train_in_parts, 2, whole, parts)
    compare(one, whole, 1e-6)
    assert [record.get("anticipated") for record in metrics_of(whole)][3:5] == [1, 1]
    assert differing(final_tensors(whole), final_tensors(parts)) == []
    tensors, expected = final_tensors(whole), final_tensors(one)
    names = [name for name in expected if name.startswith("ema.")]
    away = sum(float((expected[n] - expected[f"model.{n[4:]}"]).square().sum()) for n in names)
    apart = sum(float((expected[n] - tensors[n]).square().sum()) for n in names)
    assert 0 < apart < 0.1**2 * away
    sample = (Path(run.run_dir, "sample.txt").read_text() for run in (one, whole))
    assert len(set(sample)) == 1, "whole rows are sampled from"


# ---- quantisation, another layout ---------------------------------------------------------------
def train_on_rank(rank, world, run):
    os.environ["WORLD_SIZE"] = str(world)
    assert fit(run)[0] == ExitCode.finished


def test_qat_in_bf16_trains_on_shards_as_one_process(tmp_path, corpus):
    one = config(tmp_path / "one", corpus, 2, precision=Precision.bf16)
    one = replace(one, quant=QuantConfig(recipe=Recipe.fp4_qat))
    fit(one)
    two = replace(one, run_dir=str(tmp_path / "two"), parallel=ParallelConfig(dp_shard=1, cp=2))
    run_distributed(train_on_rank, 2, two)
    compare(one, two, 2e-3)


# ---- probes -------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    "degrees",
    [{"cp": 2}, {"dp_shard": 2}, {"pp": 2}, {"cp": 2, "pp": 2}],
    ids=["cp2", "dp2", "pp2", "cp2xpp2"],
)
def test_a_run_probes_itself_alike_under_every_layout(tmp_path, corpus, degrees):
    """After one update: 1e-4 (its bound of 1e-3 in this file, and a mean over many tokens)."""
    asked = {"probe_every": 1, "seq_len": 128, "global_batch_tokens": 512, "eval_tokens": 512}
    one = config(tmp_path / "one", corpus, 1, micro_batch_size=1, **asked)
    fit(one)
    layout = ParallelConfig(**({"dp_shard": 1} | degrees))
    many = replace(one, run_dir=str(tmp_path / "many"), parallel=layout)
    run_distributed(train_on_rank, layout.world_size, many)
    (mine,), (theirs,) = metrics_of(many), metrics_of(one)
    names = {name for name in theirs if name.startswith("probe_")}
    assert {"probe_loss_0", "probe_needle_far", "probe_needle_near"} <= names
    assert {name for name in mine if name.startswith("probe_")} == names
    for name in names:
        assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
