"""The long-context curriculum, whole: rows of 512 to 32,768 tokens, killed at each edge of a stage.

The preset is run as it is. Each kill is a SIGKILL from outside, when the last step before an edge
was recorded, or the first one behind it; the saves, every 12 steps, fall on some edges and beside
others, so that starts begin on an edge, and before one that they cross again. Bound: equality of
all metrics but the measured ones and of every tensor of the last checkpoint.
"""

import time

import pytest

from tests.integration.killed_jobs import run_to_end, start
from tests.integration.small_run import differing, final_tensors
from tests.parallel.torchrun import steps_of
from train.config.command_line import compose_run
from train.config.schema import RunConfig
from train.record.metrics import read_metrics
from train.record.plots import stage_edges
from train.stages import resolve

PRESET = ["+experiment=curriculum", "train.device=cpu"]


def test_preset_goes_through_every_phase_with_a_constant_batch():
    run = compose_run(PRESET)
    plan = resolve(run)
    assert [stage.seq_len for stage in plan.reached()] == [512, 2048, 8192, 8192, 32768]
    assert [stage.indexer_phase.value for stage in plan.reached()] == [
        "full", "full", "warmup", "sparse", "sparse",
    ]  # fmt: skip
    assert {stage.global_batch_tokens for stage in plan.reached()} == {32768}
    assert run.model.yarn_from_seq_len == 8192


def test_curves_show_where_stages_begin():
    names = ["a", "a", "b", "c", "c"]
    records = [{"tokens": 10 * n, "stage": stage} for n, stage in enumerate(names, start=1)]
    assert stage_edges(records) == [(20, "b"), (30, "c")]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_run_killed_at_every_edge_is_the_run_that_never_was(tmp_path):
    words = [*PRESET, f"data.cache_dir={tmp_path / 'cache'}"]
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    run_to_end([*words, f"run_dir={whole}"], log)
    plan = resolve(compose_run(PRESET))
    edges = [plan.step_at(stage.start_tokens) for stage in plan.stages[1:]]
    for number, edge in enumerate(edges):
        kill_behind([*words, f"run_dir={killed}"], killed, edge + number % 2, log)
    run_to_end([*words, f"run_dir={killed}"], log)
    assert [r["step"] for r in read_metrics(killed / "metrics.jsonl")] == [
        *range(1, plan.steps + 1)
    ]
    assert steps_of(killed) == steps_of(whole)
    mine, theirs = (final_tensors(RunConfig(run_dir=str(f))) for f in (killed, whole))
    assert differing(mine, theirs) == []


def kill_behind(words, folder, step, log):
    """Start the command and SIGKILL it when the line of ``step`` stands in its metrics."""
    process = start(words, log)
    while process.is_alive() and last_step(folder) < step:
        time.sleep(0.05)
    assert process.is_alive(), log.read_text()[-3000:]
    process.kill()
    process.join()


def last_step(folder):
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return len([line for line in lines if line.endswith("}")])
