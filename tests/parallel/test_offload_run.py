"""Whole runs with state and activations in host memory are the runs without, bit for bit.

On a CPU AdamW's kernel is the same with and without offload, so every tensor and metric is compared
bitwise; on a GPU the host's kernel may round once otherwise.
"""

import os
from dataclasses import replace

import pytest

from parallel.config import ParallelConfig
from tests.helpers import run_distributed
from tests.integration.small_run import (
    KillAfter,
    Killed,
    differing,
    final_tensors,
    fit,
    metrics_of,
    small_run,
    write_corpus,
)
from train.build import build
from train.config.schema import Precision
from train.errors import ExitCode


def offloaded(folder, corpus, offload, precision=Precision.fp32, **degrees):
    run = small_run(
        folder, corpus, steps=5, checkpoint_every=2, eval_every=0, precision=precision,
        global_batch_tokens=4 * 48, micro_batch_size=1,
    )  # fmt: skip
    activations = offload != "none"
    return replace(run, parallel=ParallelConfig(
        offload=offload, offload_activations=activations, **degrees
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("offload", "precision"),
    [("optimizer", Precision.fp32), ("optimizer+master", Precision.bf16)],
)
def test_offloaded_run_has_the_bits_of_a_plain_one_though_it_is_killed(
    offload, precision, tmp_path
):
    corpus = write_corpus(tmp_path)
    plain = offloaded(tmp_path / "plain", corpus, "none", precision)
    assert fit(plain)[0] == ExitCode.finished
    run = offloaded(tmp_path / "offloaded", corpus, offload, precision)
    trainer = build(run)
    bf16 = [n for n, p in trainer.engine.model.named_parameters() if str(p.dtype)[6:] == "bfloat16"]
    assert bool(bf16) == (offload == "optimizer+master")
    trainer.recorder.trackers.append(KillAfter(3))
    with pytest.raises(Killed):
        trainer.fit()
    assert fit(run)[0] == ExitCode.finished
    assert differing(final_tensors(run), final_tensors(plain)) == []
    assert metrics_of(run) == metrics_of(plain)


def on_rank(rank, world, folder, corpus):
    os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank)}
    for degrees in ({}, {"ep": 2}):
        runs = [
            offloaded(folder / f"{offload}{len(degrees)}", corpus, offload, **degrees)
            for offload in ("none", "optimizer")
        ]
        assert [fit(run)[0] for run in runs] == [ExitCode.finished] * 2
        assert differing(*map(final_tensors, runs)) == []
        assert metrics_of(runs[0]) == metrics_of(runs[1])


def test_offload_under_fsdp_and_ep_has_the_same_bits(tmp_path):
    run_distributed(on_rank, 2, tmp_path, write_corpus(tmp_path))
