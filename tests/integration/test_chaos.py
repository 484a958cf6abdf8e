"""A run that is killed at random instants, again and again, ends as the run that never was.

Every kill is a SIGKILL from outside: between steps, inside one, inside a save, while it starts.
Compared are all fields of metrics.jsonl but the measured ones, and every tensor of the last
checkpoint. Bound: equality.
"""

import random
import subprocess
import time
from collections import Counter

import pytest

from tests.integration.killed_jobs import kill_at_random, run_to_end
from tests.integration.small_run import differing, final_tensors, write_corpus
from tests.parallel.torchrun import (
    ONE_THREAD,
    command,
    end,
    launch,
    steps_of,
    wait_for_line,
    words,
    worker_of,
)
from train.config.schema import RunConfig
from train.record.metrics import read_metrics


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def tiny(corpus, folder, steps, every):
    """``v4_tiny`` on one row of 32 tokens a step, with averaged weights."""
    return [
        "model=v4_tiny", "data=jsonl", f"data.sources.jsonl.path={corpus}",
        f"data.cache_dir={corpus.parent / 'cache'}", "data.tokenizer=byte",
        "data.validation.bytes=2000", "data.validation.max_overlap=1", "train.seq_len=32",
        "train.global_batch_tokens=32", "train.micro_batch_size=1", f"train.steps={steps}",
        f"train.checkpoint_every={every}", "train.device=cpu", "train.eval_tokens=32",
        "train.ema_decay=0.9", "sample.tokens=0", f"run_dir={folder}",
    ]  # fmt: skip


def assert_equal_runs(folder, reference, steps):
    assert [r["step"] for r in read_metrics(folder / "metrics.jsonl")] == [*range(1, steps + 1)]
    assert steps_of(folder) == steps_of(reference)
    mine, theirs = (final_tensors(RunConfig(run_dir=str(f))) for f in (folder, reference))
    assert differing(mine, theirs) == []


def survive(corpus, tmp_path, kills, steps, every, seed):
    """Kill a run so often, let it end, and compare; how many kills hit what."""
    folder, whole, log = tmp_path / "killed", tmp_path / "whole", tmp_path / "log"
    run_to_end(tiny(corpus, whole, steps, every), log)
    rng, hits = random.Random(seed), Counter()
    while hits.total() < kills:
        hit = kill_at_random(tiny(corpus, folder, steps, every), folder, rng, log)
        assert hit != "finished", f"the run ended after {hits}: give it more steps"
        hits[hit] += 1
    run_to_end(tiny(corpus, folder, steps, every), log)
    assert_equal_runs(folder, whole, steps)
    return hits


@pytest.mark.timeout(1500)
def test_run_survives_8_kills(corpus, tmp_path):
    hits = survive(corpus, tmp_path, kills=8, steps=18, every=1, seed=0)
    assert hits["save"] > 0, hits


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", range(4))
def test_run_survives_100_kills(corpus, tmp_path, part):
    hits = survive(corpus, tmp_path, kills=25, steps=70, every=1 + part % 2, seed=part)
    print(f"25 kills hit {dict(hits)}")  # noqa: T201  with pytest -s
    assert hits["save"] > 2, hits


def wait_for_save(folder, launcher, rng):
    """Every other time, until a save is under way; and a bit."""
    deadline = time.monotonic() + 60 * rng.randint(0, 1)
    while time.monotonic() < deadline and launcher.poll() is None:
        if any((folder / "checkpoints").glob(".writing_*")):
            break
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.02))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_job_of_four_ranks_survives_kills_of_one(corpus, tmp_path):
    """Under torchrun, which starts all four again each time."""
    kills, steps, folder, log = 8, 40, tmp_path / "killed", tmp_path / "log"
    args = [*words(corpus, steps), "train.checkpoint_every=1"]
    done = launch(4, *args, f"run_dir={tmp_path / 'whole'}", seconds=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    rng, hit = random.Random(0), []
    with log.open("w") as file:
        launcher = subprocess.Popen(
            command(4, [*args, f"run_dir={folder}"], restarts=kills),
            stdout=file, stderr=file, env=ONE_THREAD,
        )  # fmt: skip
    try:
        for _ in range(kills):
            at = len(read_metrics(folder / "metrics.jsonl")) + rng.randint(1, 3)
            wait_for_line(folder / "metrics.jsonl", at, [launcher], log)
            wait_for_save(folder, launcher, rng)
            rank = rng.randrange(4)
            worker_of([launcher], rank).kill()
            hit.append((rank, bool(list((folder / "checkpoints").glob(".writing_*")))))
        assert launcher.wait(timeout=1200) == 0, log.read_text()[-3000:]
    finally:
        end(launcher)
    print(f"killed (rank, inside a save): {hit}")  # noqa: T201
    assert_equal_runs(folder, tmp_path / "whole", steps)
