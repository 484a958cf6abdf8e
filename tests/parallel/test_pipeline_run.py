"""A whole run on pipeline stages: audit, table, metrics, checkpoint; killed and started again.

Bounds: the first step's losses are within 1e-6 of one process's and its gradient norm within 1e-6
relative (test_pipeline.py has the gradients); a run that was killed is bitwise the one that was
not. The real launcher is slow.
"""

import csv
import json
import os
from pathlib import Path

import pytest

from parallel.config import ParallelConfig
from tests.helpers import run_distributed
from tests.integration.small_run import (
    differing,
    final_tensors,
    fit,
    metrics_of,
    small_run,
    write_corpus,
)
from tests.parallel.torchrun import kill_rank, launch, steps_of, words
from train.audit.audit import AUDITED_STEPS
from train.config.schema import ActivationCheckpoint, RunConfig
from train.errors import ExitCode
from train.record.params_table import COLUMNS


def config(folder, corpus):
    return small_run(
        Path(folder), Path(corpus), steps=AUDITED_STEPS, eval_every=2,
        activation_checkpoint=ActivationCheckpoint.block,
    )  # fmt: skip


def train(rank, world, folder, corpus, layout):
    os.environ["WORLD_SIZE"] = str(world)  # as torchrun would
    run = config(folder, corpus)
    run.parallel = ParallelConfig(**layout)
    assert fit(run)[0] == ExitCode.finished


def test_run_on_two_stages_is_audited_and_reports_as_one_process(tmp_path):
    corpus = write_corpus(tmp_path)
    one, many = config(tmp_path / "one", corpus), config(tmp_path / "many", corpus)
    assert fit(one)[0] == ExitCode.finished
    layout = {"pp": 2, "schedule": "zbvzerobubble"}
    run_distributed(train, 2, many.run_dir, str(corpus), layout)
    for mine, theirs in zip(metrics_of(many), metrics_of(one), strict=True):
        assert mine.keys() == theirs.keys()
    first, expected = metrics_of(many)[0], metrics_of(one)[0]
    for name in ("loss", "loss_mtp", "loss_indexer", "loss_balance", "expert_load_cv"):
        assert first[name] == pytest.approx(expected[name], abs=1e-6), name
    assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)
    tables = [
        {
            row["name"]: row
            for row in csv.DictReader(Path(run.run_dir, "params.csv").read_text().splitlines())
        }
        for run in (one, many)
    ]
    assert tables[0] == tables[1]
    assert list(next(iter(tables[1].values()))) == list(COLUMNS)
    receipt = json.loads(Path(many.run_dir, "receipt.json").read_text())
    assert receipt["audit"]["steps"] == list(range(1, AUDITED_STEPS + 1))
    assert {"pipeline", "isolation", "recompute"} <= set(receipt["audit"]["checks"])
    assert (Path(many.run_dir) / "sample.txt").read_text().startswith("the")
    assert final_tensors(many).keys() == final_tensors(one).keys()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
def test_killed_run_of_two_stages_continues_bitwise_under_torchrun(tmp_path, schedule):
    layout = ["parallel.pp=2", "parallel.dp_shard=1", f"parallel.schedule={schedule}"]
    args = [*words(write_corpus(tmp_path), 5), *layout]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = launch(2, *args, f"run_dir={whole}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert kill_rank(1, 3, killed, args)[0] == 1
    done = launch(2, *args, f"run_dir={killed}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert steps_of(killed) == steps_of(whole)
    tensors = [final_tensors(RunConfig(run_dir=str(folder))) for folder in (whole, killed)]
    assert differing(*tensors) == []
    done = launch(1, *words(tmp_path / "corpus.jsonl", 6), f"run_dir={killed}")  # another layout
    assert done.returncode == 0, done.stderr[-3000:]
