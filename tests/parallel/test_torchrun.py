"""Under the real launcher: a rank dies, the job restarts, several jobs in turn, another layout.

Bounds: a restarted job is bitwise the undisturbed one of the same layout. Under another layout the
next step's loss is within 1e-5 of it: sums have another order. Later steps amplify rounding.
"""

import json
import re
import subprocess

import psutil
import pytest

from tests.integration.small_run import differing, final_tensors, write_corpus
from tests.parallel.torchrun import (
    ONE_THREAD,
    command,
    end,
    kill_rank,
    launch,
    steps_of,
    wait_for_line,
    words,
)
from tests.train.checkpoint.folders import newest_good
from tests.train.samples import every_token_once, read_samples
from tests.train.test_bad_inputs import SHARDED_MODEL, SHARDS
from train.checkpoint.manager import Checkpoints
from train.config.schema import RunConfig

STEPS = 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def run_on(ranks, folder, args):
    done = launch(ranks, *args, f"run_dir={folder}")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """The job on two ranks, never killed."""
    return run_on(2, tmp_path_factory.mktemp("whole") / "run", words(corpus, STEPS))


def tensors_of(folder):
    return final_tensors(RunConfig(run_dir=str(folder)))


def test_killed_rank_brings_the_job_down_and_is_named(corpus, tmp_path):
    """30 s is the promise; the ranks that are left wait in a collective when it happens."""
    args = [*words(corpus, 500), "train.checkpoint_every=0"]
    code, seconds, printed = kill_rank(1, 2, tmp_path / "run", args)
    assert code == 1
    assert seconds < 30
    cause = printed.rpartition("Root Cause")[2]
    assert "rank      : 1 (local_rank: 1)" in cause
    assert "exitcode  : -9" in cause


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(10))
def test_killed_rank_is_restarted_and_the_job_ends_bitwise(corpus, undisturbed, tmp_path, attempt):
    """Rank and step differ from try to try; checkpoints come every second step."""
    folder = tmp_path / "run"
    rank, step = attempt % 2, 3 + attempt % 3
    code, _, printed = kill_rank(rank, step, folder, words(corpus, STEPS), restarts=1)
    assert code == 0, printed[-3000:]
    assert "resuming after step" in printed
    assert steps_of(folder) == steps_of(undisturbed)
    assert differing(tensors_of(folder), tensors_of(undisturbed)) == []


@pytest.mark.slow
def test_ranks_of_a_killed_launcher_save_and_leave(corpus, tmp_path):
    folder = tmp_path / "run"
    args = [*words(corpus, 500), "train.checkpoint_every=0", f"run_dir={folder}"]
    log = tmp_path / "log"
    with log.open("w") as file:
        launcher = subprocess.Popen(command(2, args), stdout=file, stderr=file, env=ONE_THREAD)
    ranks = []
    try:
        wait_for_line(folder / "metrics.jsonl", 2, [launcher], log)
        ranks = psutil.Process(launcher.pid).children()
        assert len(ranks) == 2
        launcher.kill()
        launcher.wait()
        _, left = psutil.wait_procs(ranks, timeout=30)
        assert left == []
    finally:
        end(launcher)
        for rank in ranks:
            if rank.is_running():
                rank.kill()
    last = steps_of(folder)[-1]["step"]
    assert 2 <= last < 500
    assert newest_good(Checkpoints(folder / "checkpoints")).name == f"step_{last:08d}"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_two_launchers_meet_and_restart_together(corpus, undisturbed, tmp_path, rank):
    """As on two nodes: only one launcher counts the restart, the other one follows it."""
    folder = tmp_path / "run"
    args = words(corpus, STEPS)
    code, _, printed = kill_rank(rank, 3, folder, args, ranks=1, restarts=1, nodes=2)
    assert code == 0, printed[-3000:]
    assert "resuming after step" in printed
    assert steps_of(folder) == steps_of(undisturbed)


@pytest.mark.slow
def test_multirun_runs_every_job_on_all_ranks_in_one_folder_each(corpus, tmp_path):
    args = ["-m", "optim=muon,adamw", *words(corpus, 2), f"run_dir={tmp_path}/study"]
    done = launch(2, *args)
    assert done.returncode == 0, done.stderr[-3000:]
    jobs = {path.name for path in (tmp_path / "study").iterdir() if path.is_dir()}
    assert jobs == {"optim=muon", "optim=adamw"}
    for job in jobs:
        folder = tmp_path / "study" / job
        assert [record["step"] for record in steps_of(folder)] == [1, 2]
        receipt = json.loads((folder / "receipt.json").read_text())
        assert receipt["finished"]
        assert f"name: {job.partition('=')[2]}" in (folder / "config.yaml").read_text()


EPOCH_STEPS = 24  # somewhat more than an epoch of eight documents
OTHERS = {
    1: [],
    2: ["parallel.pp=2"],
    4: ["parallel.pp=2", "parallel.ep=2"],
    8: ["parallel.pp=2", "parallel.dp_replicate=2", "parallel.ep=2"],
}


@pytest.fixture(scope="module")
def epoch(tmp_path_factory):
    """Words of a job of four ranks that passes through its data once, and the job undisturbed."""
    folder = tmp_path_factory.mktemp("epoch")
    job = words(write_corpus(folder, documents=8), EPOCH_STEPS)
    job += ["train.log_samples=true", "train.eval_tokens=0", "data.validation.bytes=0"]
    return job, run_on(4, folder / "run", [*job, "parallel.ep=2"])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", OTHERS)
def test_killed_job_of_four_ranks_goes_on_under_another_layout(epoch, tmp_path, ranks):
    """No sample of an epoch is missing or comes twice, though half of it was read by others."""
    job, whole = epoch
    folder = tmp_path / "run"
    code, _, _ = kill_rank(1, 9, folder, [*job, "parallel.ep=2"], ranks=4)
    assert code == 1
    done = launch(ranks, *job, *OTHERS[ranks], f"run_dir={folder}")
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = int(re.search(r"resuming after step (\d+)", done.stdout + done.stderr)[1])
    assert resumed in (6, 8, 10)
    mine, theirs = steps_of(folder), steps_of(whole)
    assert mine[:resumed] == theirs[:resumed]
    assert [record["step"] for record in mine] == [record["step"] for record in theirs]
    assert mine[resumed]["loss"] == pytest.approx(theirs[resumed]["loss"], rel=1e-5)
    assert mine[-1]["loss"] == pytest.approx(theirs[-1]["loss"], rel=1e-2)
    assert read_samples(folder) == read_samples(whole)
    every_token_once(folder, epochs=1)


BAD = [
    (["parallel.dp_shard=3"], "parallel: pp=1 * dp_replicate=1 * dp_shard=3 * cp=1 = 3 ranks, but"
     " the world size is 2"),
    (["parallel.ep=3"], "parallel.ep=3 must divide the 2 data ranks"),
    (["parallel.ep=2", "model.n_routed_experts=5"],
     "parallel.ep=2 must divide model.n_routed_experts=5"),
    (["parallel.cp=4"], "parallel.dp_shard=-1 cannot be the rest: parallel.cp=4 does not divide"),
    (["parallel.cp=2", "train.seq_len=63", "train.global_batch_tokens=126"],
     "train.seq_len=63 must be a multiple of cp=2, its shards"),
    (["parallel.cp=2", "model.layer_kinds=[swa,mha,hca]", "model.compress_ratios=[0,0,16,0]"],
     "train needs cp=2 (rows of 64 tokens in 2 shards), but layer 1 of model.attention=hybrid is"),
    (["train.global_batch_tokens=192"],
     "a batch of 3 rows (train.global_batch_tokens=192, seq_len=64) must be a multiple of"
     " train.micro_batch_size=1 times 2 data rank(s)"),
]  # fmt: skip


def refused(ranks, folder, args, message):
    """The worker's line comes first; what follows is the launcher's own report."""
    done = launch(ranks, *args, f"run_dir={folder}")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 2  # above the launcher's report and below it
    assert message in lines[0] == lines[1] == done.stderr.splitlines()[-1]
    assert "exitcode  : 2" in done.stderr
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("args", "message"), BAD)
def test_layout_that_cannot_be_is_one_line_from_one_rank(corpus, tmp_path, args, message):
    refused(2, tmp_path / "run", [*words(corpus, STEPS), *args], message)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "ranks", "args", "message"), SHARDS, ids=[case[0] for case in SHARDS]
)
def test_shards_that_cannot_be_are_one_line_from_one_rank(what, ranks, args, message, tmp_path):
    refused(ranks, tmp_path / "run", [*SHARDED_MODEL, *args], message)


def test_the_users_lines_are_the_last_whatever_the_launcher_reports(tmp_path):
    """Its table of failures would bury them. A rank that waits for rank 0 has the same code."""
    words = ["model=v4_tiny", "train.micro_batch_size=2", "train.lr=1", "train.stepz=2"]
    done = launch(2, *words, f"run_dir={tmp_path}/run")
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.splitlines()[-2:] == [
        "error: unknown config key train.lr=1: give optim.lr",
        "error: unknown config key train.stepz=2: did you mean train.steps?",
    ]
    assert "exitcode  : 2" in done.stderr.partition("Root Cause")[2]
