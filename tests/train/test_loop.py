"""What a run does besides its steps: its folder, its failures, its options.

Oracle: files read back, and formulas written out here (moving average, bits per byte).
"""

import csv
import json
import logging
import math
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.batch import IGNORE
from data.loader import Loader
from model.flops import training_flops
from optim.muon import matmul_dtype
from quant.apply import apply_quant
from quant.config import QuantConfig, Recipe
from quant.formats import MXFP4, fake_quant
from quant.probe import QuantProbe
from tests.integration.small_run import (
    ROWS,
    SEQ_LEN,
    differing,
    final_tensors,
    fit,
    metrics_of,
    small_run,
    write_corpus,
)
from train.build import build
from train.checkpoint import reader as checkpoint_reader
from train.checkpoint.manager import CheckpointFailedError
from train.config.schema import SampleConfig, StageConfig, WandbConfig, WandbMode
from train.errors import ExitCode, UserError
from train.preflight.reach import check_reach
from train.record.metrics import read_metrics
from train.run_folder.folder import read_identity
from train.stages import resolve


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory):
    """A finished run of three steps with averaged weights."""
    run = small_run(
        tmp_path_factory.mktemp("runs") / "done",
        corpus,
        steps=3,
        eval_every=2,
        checkpoint_every=1,
        keep_checkpoints=2,
        ema_decay=0.5,
    )
    code, trainer = fit(run)
    assert code == ExitCode.finished
    return run, trainer


def test_folder_holds_what_was_promised(done):
    run, trainer = done
    folder = Path(run.run_dir)
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml", "params.csv", "metrics.jsonl", "checkpoints", "receipt.json", "loss.png",
        "sample.txt", "identity.json", "tokenizer.json", "report.html",
    }  # fmt: skip
    assert [p.name for p in trainer.checkpoints.published()] == ["step_00000002", "step_00000003"]
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "sample.txt").read_text().startswith("the")


def test_receipt_says_what_ran(done):
    run, trainer = done
    receipt = json.loads((Path(run.run_dir) / "receipt.json").read_text())
    assert receipt["finished"]
    assert receipt["progress"] == {"step": 3, "tokens": 3 * ROWS * SEQ_LEN, "skipped_steps": 0}
    assert receipt["audit"]["steps"] == [1, 2, 3]
    assert {"quant", "gradient", "recompute"} <= set(receipt["audit"]["checks"])
    record = read_identity(Path(run.run_dir))
    assert receipt["data"] == {"tokenizer": record.tokenizer, "sources": record.sources}
    assert (receipt["code"], receipt["layout"]) == (record.code, record.layout)
    assert record.sources == trainer.state.loader.manifest["sources"]
    assert receipt["final_metrics"] == read_metrics(trainer.recorder.metrics.path)[-1]
    assert len(receipt["code"]["source_sha256"]) == len(receipt["config_sha256"]) == 64
    assert receipt["environment"]["libraries"]["torch"] == torch.__version__
    dtype = matmul_dtype(run.optim.muon.dtype, torch.device("cpu"))
    assert f"torch.{receipt['muon_dtype']}" == str(dtype)
    validation = receipt["validation"]
    assert validation["bits_per_byte"] == receipt["final_metrics"]["val_bits_per_byte"]
    assert validation["xz_bits_per_byte"] > 1
    assert validation["bytes"] == len(trainer.state.loader.validation_bytes(SEQ_LEN, 4 * SEQ_LEN))


def test_metrics_hold_the_promised_fields_every_step(done):
    run, _ = done
    records = read_metrics(Path(run.run_dir) / "metrics.jsonl")
    always = (
        "step tokens loss loss_mtp loss_indexer loss_balance grad_norm lr tokens_per_second"
        " step_seconds peak_memory_bytes mfu"
    ).split()
    assert all(isinstance(r[name], int | float) for r in records for name in always)
    assert [r["step"] for r in records] == [1, 2, 3]
    assert [r["tokens"] for r in records] == [192, 384, 576]
    assert [("val_loss" in r, "val_bits_per_byte" in r) for r in records] == [
        (False, False), (True, True), (True, True),
    ]  # fmt: skip
    assert "checkpoint_seconds" in records[1]
    assert "indexer_recall" in records[1]


def test_mfu_is_flops_over_the_matmul_rate(done):
    run, trainer = done
    record = read_metrics(trainer.recorder.metrics.path)[-1]
    flops = training_flops(run.model, SEQ_LEN).total
    expected = flops * record["tokens_per_second"] / trainer.recorder.matmul_rate
    assert record["mfu"] == pytest.approx(expected)
    assert record["tokens_per_second"] == pytest.approx(ROWS * SEQ_LEN / record["step_seconds"])


def test_params_table_names_every_parameter_once(done):
    run, trainer = done
    with (Path(run.run_dir) / "params.csv").open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    parameters = dict(trainer.engine.model.named_parameters())
    assert rows.keys() == parameters.keys()
    for name, row in rows.items():
        assert [int(n) for n in row["shape"].split("x")] == list(parameters[name].shape)
    expert = rows["layers.1.ffn.experts.w1.weight"]
    assert (expert["owner"], expert["split"], expert["storage"]) == ("muon", "experts", "float32")
    assert rows["embed.weight"]["owner"] == "adamw"
    assert {row["quantised"] for row in rows.values()} == {"no"}


def test_average_follows_its_formula(done, corpus, tmp_path):
    run, _ = done
    other = replace(run, run_dir=str(tmp_path), train=replace(run.train, keep_checkpoints=0))
    fit(other)
    expected = None
    for step in range(1, 4):
        weights = model_tensors(tmp_path / "checkpoints" / f"step_{step:08d}", "model.head.weight")
        if expected is None:  # the average began at the first weights, one step before
            expected = 2 * ema_tensor(tmp_path, step) - weights
        expected = 0.5 * expected + 0.5 * weights
        assert torch.allclose(ema_tensor(tmp_path, step), expected, atol=1e-7)
    assert not torch.equal(expected, weights)


def model_tensors(path, name):
    shape = checkpoint_reader.saved_tensors(path)[name]
    tensor = torch.empty(shape)
    checkpoint_reader.read(path, {name: tensor}, partial=True)
    return tensor


def ema_tensor(folder, step):
    return model_tensors(folder / "checkpoints" / f"step_{step:08d}", "ema.head.weight")


def test_validation_is_nats_and_bits_of_the_same_rows(done):
    """Against one row at a time with the model's own logits."""
    _, trainer = done
    record = read_metrics(trainer.recorder.metrics.path)[-1]
    nats = targets = num_bytes = 0
    for batch in trainer.state.loader.validation(SEQ_LEN, 4 * SEQ_LEN):
        for row in range(len(batch.rows)):
            one = batch.batch(row, row + 1)
            with torch.no_grad():
                logits = trainer.engine.model.logits(one.input_ids_BT, one.document_ids_BT)[0]
            label = one.labels_BTK[0, :, 0]
            kept = label != IGNORE
            nats -= float(logits.double().log_softmax(-1)[kept, label[kept]].sum())
            targets += int(kept.sum())
        num_bytes += batch.target_bytes
    assert record["val_loss"] == pytest.approx(nats / targets, rel=1e-5)
    assert record["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_eval_only_evaluates_and_trains_nothing(done):
    run, _ = done
    before = metrics_of(run), final_tensors(run)
    code, _ = fit(replace(run, train=replace(run.train, eval_only=True)))
    assert code == ExitCode.finished
    found = json.loads((Path(run.run_dir) / "evaluation.json").read_text())["metrics"]
    assert found["val_loss"] == before[0][-1]["val_loss"]
    assert metrics_of(run) == before[0]
    assert differing(final_tensors(run), before[1]) == []
    (Path(run.run_dir) / "evaluation.json").unlink()


def evaluation(run):
    code, _ = fit(replace(run, train=replace(run.train, eval_only=True)))
    assert code == ExitCode.finished
    return json.loads((Path(run.run_dir) / "evaluation.json").read_text())["metrics"]


def test_evaluations_of_one_state_are_comparable(corpus, tmp_path):
    """Three figures of one state: the run's own, plain from outside, quantised after training.

    All on the rows of the final evaluation, which are more than those of the others. The last one
    is the oracle written out here: the same weights under the casts, in the same order of rows.
    """
    run = small_run(tmp_path / "run", corpus, steps=2, eval_every=0, final_eval_tokens=8 * SEQ_LEN)
    _, trainer = fit(run)
    receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())
    final = receipt["validation"]["loss"]
    assert final != receipt["final_metrics"]["val_loss"], "other rows"
    later = replace(run, init_from=run.run_dir)
    plain = evaluation(replace(later, run_dir=str(tmp_path / "plain")))
    assert plain["val_loss"] == final
    assert plain["val_bits_per_byte"] == receipt["validation"]["bits_per_byte"]
    quant = QuantConfig(recipe=Recipe.fp4_qat)
    cast = evaluation(replace(later, run_dir=str(tmp_path / "cast"), quant=quant))
    lost = json.loads((tmp_path / "cast" / "evaluation.json").read_text())["quantised"]
    assert "quantised" not in json.loads((tmp_path / "plain" / "evaluation.json").read_text())
    experts = {
        name: weight.detach()
        for name, weight in trainer.engine.model.named_parameters()
        if ".ffn.experts.w" in name and name.startswith("layers.")
    }
    assert {f"{module}.weight" for module in lost} == experts.keys()
    for name, weight in experts.items():
        error = (fake_quant(weight, MXFP4) - weight).double().square().sum()
        share = float(error / weight.double().square().sum())
        assert lost[name.removesuffix(".weight")] == pytest.approx(share, rel=1e-4), name
    apply_quant(trainer.engine.model, quant, QuantProbe())
    assert (
        cast["val_loss"]
        == trainer.recorder.final_evaluator.evaluate(trainer._last_step())["val_loss"]
    )
    assert cast["val_loss"] != final


def test_the_text_of_evaluations_is_hashed_once(corpus, tmp_path, monkeypatch):
    """For the rows of those between steps, and for those of the last one."""
    hashed, real = [], Loader.validation_digest
    monkeypatch.setattr(
        Loader, "validation_digest", lambda *a, **k: hashed.append(a) or real(*a, **k)
    )
    run = small_run(tmp_path / "run", corpus, steps=3, eval_every=1, final_eval_tokens=8 * SEQ_LEN)
    fit(run)
    assert len(hashed) == 2


def test_evaluation_is_in_the_state_of_the_last_step(corpus, tmp_path):
    """Quantised from the second stage on: a run that ends with the first is not, one behind is."""
    batch = ROWS * SEQ_LEN
    stages = [
        StageConfig(name="bf16", until_tokens=2 * batch, quantised=False),
        StageConfig(name="fp4", until_tokens=3 * batch),
    ]
    quant = QuantConfig(recipe=Recipe.fp4_qat)
    run = replace(small_run(tmp_path / "a", corpus, steps=2, stages=stages), quant=quant)
    _, trainer = fit(run)
    assert not trainer.phase.records, "the last step was of the first stage"
    whole = replace(run, train=replace(run.train, steps=0))
    from_outside = replace(whole, run_dir=str(tmp_path / "b"), init_from=run.run_dir)
    assert evaluation(run)["val_loss"] != evaluation(from_outside)["val_loss"]


def test_init_from_takes_weights_and_a_fresh_optimizer(done, corpus, tmp_path):
    source, _ = done
    run = small_run(tmp_path / "next", corpus, steps=1)
    run.init_from = source.run_dir
    trainer = build(run)
    state, saved = trainer.engine.state(), final_tensors(source)
    for name, tensor in state.items():
        if name.startswith("model."):
            assert torch.equal(tensor, saved[name]), name
        else:
            assert not tensor.any(), name
    assert trainer.state.progress.step == 0
    assert trainer.state.loader.state_dict()["row"] == 0


def test_init_from_nothing_is_the_users_error(corpus, tmp_path):
    run = small_run(tmp_path / "next", corpus)
    run.init_from = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"init_from=.*nowhere holds no complete checkpoint"):
        build(run)


class SmallFilesOnly:
    """A tracker: files may not grow beyond so many bytes until a step's line is written."""

    def __init__(self, num_bytes, until):
        self.until, self.before = until, resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, self.before[1]))

    def show(self, record):
        if record["step"] == self.until:
            self.close()

    def before_save(self):
        return {}

    def close(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("behind", [False, True])
def test_failed_periodic_save_costs_the_save_only(corpus, tmp_path, caplog, behind):
    """The kernel refuses to let the first checkpoints' files grow, as a full disk does."""
    run = small_run(tmp_path / "run", corpus, steps=3, eval_every=0, checkpoint_every=1)
    run = replace(run, train=replace(run.train, async_checkpoint=behind))
    trainer = build(run)
    trainer.checkpoints.saved_step = 0
    limit = SmallFilesOnly(100_000, until=3)
    trainer.recorder.trackers.append(limit)
    try:
        with caplog.at_level(logging.ERROR):
            assert trainer.fit() == ExitCode.finished
    finally:
        limit.close()
    assert "checkpoint of step 1 failed: OSError: [Errno 27] File too large" in caplog.text
    assert "checkpoint of step 3 failed" not in caplog.text
    assert [p.name for p in trainer.checkpoints.folder.iterdir()] == ["step_00000003"]
    assert differing(final_tensors(run), trainer.engine.state()) == []


def test_last_save_that_fails_is_no_success(corpus, tmp_path):
    run = small_run(tmp_path / "run", corpus, steps=1, eval_every=0)
    trainer = build(run)
    limit = SmallFilesOnly(100_000, until=9)
    try:
        with pytest.raises(CheckpointFailedError, match="step_00000001 could not be written"):
            trainer.fit()
    finally:
        limit.close()
    assert not (tmp_path / "run" / "receipt.json").exists()


def test_all_checkpoints_damaged_is_refused(corpus, tmp_path):
    run = small_run(tmp_path / "run", corpus, steps=1, eval_every=0)
    fit(run)
    before = metrics_of(run)
    (tmp_path / "run" / "checkpoints" / "step_00000001" / "manifest.json").write_text("")
    with pytest.raises(UserError, match="none of its 1 checkpoints is whole"):
        build(run)
    assert metrics_of(run) == before


def test_skipped_step_is_counted_across_a_resume(corpus, tmp_path):
    run = small_run(tmp_path / "run", corpus, steps=4, eval_every=0, checkpoint_every=1)
    trainer = build(run)
    poison(trainer)
    trainer.fit()
    records = metrics_of(run)
    assert [r["skipped_steps"] for r in records] == [0, 1, 1, 1]
    assert records[1]["grad_norm"] is None
    assert records[1]["loss"] is not None
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    fit(run)
    assert metrics_of(run) == records


def poison(trainer):
    """The second backward pass of the head gives infinities."""
    passes = []

    def infinite(grad):
        passes.append(1)
        return grad * math.inf if len(passes) == 3 else grad  # two microbatches a step

    trainer.engine.model.head.weight.register_hook(infinite)


def test_profile_window_writes_a_trace(corpus, tmp_path):
    run = small_run(tmp_path / "run", corpus, steps=4, eval_every=0, monitor_every=0)
    run.train.micro_batch_size = ROWS
    run.train.profile_start, run.train.profile_steps = 4, 1  # behind the audit, so it is short
    fit(run)
    assert b"aten::mm" in (tmp_path / "run" / "profile" / "steps_4_4.json").read_bytes()
    assert "aten::mm" in (tmp_path / "run" / "profile" / "steps_4_4.txt").read_text()
    with pytest.raises(UserError, match=r"profile_start=5 and train\.profile_steps=1 end"):
        check_reach(replace(run, train=replace(run.train, profile_start=5)), resolve(run))


def test_tensorboard_and_no_text(corpus, tmp_path):
    run = small_run(tmp_path / "run", corpus, steps=1, eval_every=0)
    run = replace(run, tensorboard=True, sample=SampleConfig(tokens=0))
    assert fit(run)[0] == ExitCode.finished
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    assert not (tmp_path / "run" / "sample.txt").exists()


def test_wandb_offline_keeps_its_id(corpus, tmp_path):
    run = small_run(tmp_path / "run", corpus, steps=1, eval_every=0)
    run = replace(run, wandb=WandbConfig(mode=WandbMode.offline))
    assert fit(run)[0] == ExitCode.finished
    assert (tmp_path / "run" / "wandb_id.txt").read_text().strip()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_evaluation_without_text_is_refused(corpus, tmp_path):
    run = small_run(tmp_path / "run", corpus, steps=1)
    run.data.validation.bytes = 0
    with pytest.raises(UserError, match=r"train\.eval_every=3 needs validation text"):
        build(run)
