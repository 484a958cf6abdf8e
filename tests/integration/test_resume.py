"""A run that was killed and started again is bit for bit the run that was never killed.

Compared are all fields of metrics.jsonl but the measured ones, and every tensor of the final
checkpoint: weights, expert biases, hash tables, both optimizers, averaged weights. Bound: equality.
"""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data.config import FimConfig
from model.config import IndexerPhase
from quant.config import QuantConfig, Recipe
from tests.helpers import ROOT
from tests.integration.small_run import (
    ROWS,
    SEQ_LEN,
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
from train import pretrain
from train.build import build
from train.config.schema import Precision, StageConfig
from train.errors import ExitCode
from train.record.metrics import read_metrics

STEPS, TOKENS = 6, ROWS * SEQ_LEN


def every_feature(folder, corpus, precision, **train):
    """All phases of the indexer, two row lengths, frozen parts, QAT, FIM, averaged weights."""
    run = small_run(
        folder,
        corpus,
        steps=0,
        precision=precision,
        ema_decay=0.9,
        checkpoint_every=3,
        keep_checkpoints=0,
        stages=[
            StageConfig("dense", TOKENS, seq_len=24, indexer_phase=IndexerPhase.full),
            StageConfig("warm", 2 * TOKENS, indexer_phase=IndexerPhase.warmup, lr=1e-3),
            StageConfig("sparse", STEPS * TOKENS),
        ],
        **train,
    )
    run.data.fim = FimConfig(rate=0.5)
    run.quant = QuantConfig(recipe=Recipe.fp4_qat)
    return run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def finished(corpus, folder, precision):
    run = every_feature(folder, corpus, precision)
    assert fit(run)[0] == ExitCode.finished
    return run


@pytest.fixture(scope="module")
def in_fp32(corpus, tmp_path_factory):
    return finished(corpus, tmp_path_factory.mktemp("fp32") / "whole", Precision.fp32)


@pytest.fixture(scope="module")
def in_bf16(corpus, tmp_path_factory):
    return finished(corpus, tmp_path_factory.mktemp("bf16") / "whole", Precision.bf16)


@pytest.fixture(params=["in_fp32", "in_bf16"])
def undisturbed(request):
    return request.getfixturevalue(request.param)


def again(run, folder):
    """The same config in another folder."""
    return replace(run, run_dir=str(folder))


def assert_same_run(run, reference):
    assert metrics_of(run) == metrics_of(reference)
    assert differing(final_tensors(run), final_tensors(reference)) == []


def test_run_used_every_feature(undisturbed):
    names = set(final_tensors(undisturbed))
    assert {n.split(".")[0] for n in names} == {"model", "optim", "ema"}
    assert any(n.endswith("gate.bias") for n in names)
    records = metrics_of(undisturbed)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert [r["stage"] for r in records] == ["dense", "warm"] + ["sparse"] * 4
    assert records[2]["loss_indexer"] > 0
    assert "quant_error_experts" in records[0]
    assert "val_bits_per_byte" in records[-1]


@pytest.mark.core
def test_killed_between_checkpoints_continues_bitwise(undisturbed, tmp_path):
    run = again(undisturbed, tmp_path / "run")
    trainer = build(run)
    trainer.recorder.trackers.append(KillAfter(5))
    with pytest.raises(Killed):
        trainer.fit()
    assert [r["step"] for r in metrics_of(run)] == [1, 2, 3, 4, 5]
    assert fit(run)[0] == ExitCode.finished
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_leaves_with_75(in_fp32, tmp_path, number):
    run = again(in_fp32, tmp_path / "run")
    trainer = build(run)
    trainer.recorder.trackers.append(SignalAfter(2, number))
    assert trainer.fit() == ExitCode.resumable
    assert [p.name for p in trainer.checkpoints.published()] == ["step_00000002"]
    assert not json.loads((tmp_path / "run" / "receipt.json").read_text())["finished"]
    assert metrics_of(run) == metrics_of(in_fp32)[:2]


def test_time_limit_leaves_with_75_and_damage_falls_back(in_fp32, tmp_path):
    """Each limited start does one step; before the last one the newest checkpoint is damaged."""
    run = again(in_fp32, tmp_path / "run")
    limited = replace(run, train=replace(run.train, time_limit_seconds=1e-3))
    assert [fit(limited)[0] for _ in range(2)] == [ExitCode.resumable] * 2
    newest = tmp_path / "run" / "checkpoints" / "step_00000002" / "__0_0.distcp"
    newest.write_bytes(newest.read_bytes()[:-7])
    trainer = build(run)
    assert trainer.state.progress.step == 1
    assert trainer.fit() == ExitCode.finished
    assert_same_run(run, in_fp32)


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_killed_after_any_step_continues_bitwise(undisturbed, tmp_path, step):
    run = again(undisturbed, tmp_path / "run")
    trainer = build(run)
    trainer.recorder.trackers.append(KillAfter(step))
    with pytest.raises(Killed):
        trainer.fit()
    assert fit(run)[0] == ExitCode.finished
    assert_same_run(run, undisturbed)


def test_sigkill_of_the_command_continues_bitwise(corpus, tmp_path):
    """The real command, killed from outside as soon as its second line is on disk."""
    words = [
        "model=v4_tiny", "data=jsonl", f"data.sources.jsonl.path={corpus}",
        f"data.cache_dir={corpus.parent / 'cache'}", "data.tokenizer=byte",
        "data.validation.bytes=2000", "data.validation.max_overlap=1", "train.seq_len=64",
        "train.global_batch_tokens=128", "train.micro_batch_size=1", "train.steps=4",
        "train.checkpoint_every=1", "train.device=cpu", "train.eval_tokens=128", "sample.tokens=0",
    ]  # fmt: skip
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, str(ROOT / "train" / "pretrain.py"), *words, f"run_dir={killed}"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)
    try:
        wait_for_lines(killed / "metrics.jsonl", 2, process, tmp_path / "log")
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "receipt.json").exists()
    assert pretrain.cli([*words, f"run_dir={killed}"]) == ExitCode.finished
    assert pretrain.cli([*words, f"run_dir={whole}"]) == ExitCode.finished
    runs = [small_run(folder, corpus) for folder in (killed, whole)]
    assert [r["step"] for r in metrics_of(runs[0])] == [1, 2, 3, 4]
    assert_same_run(*runs)


def wait_for_lines(path: Path, count, process, log):
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if path.exists() and len(read_metrics(path)) >= count:
            return
        assert process.poll() is None, f"left before it was killed: {log.read_text()[-2000:]}"
        time.sleep(0.02)
    pytest.fail(f"no line {count} in time: {log.read_text()[-2000:]}")


def test_started_again_when_finished_does_nothing(corpus, tmp_path):
    run = small_run(tmp_path / "run", corpus, steps=2)
    fit(run)
    before = metrics_of(run), final_tensors(run)
    assert fit(run)[0] == ExitCode.finished
    assert metrics_of(run) == before[0]
    assert differing(final_tensors(run), before[1]) == []
