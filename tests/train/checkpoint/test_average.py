"""Averaged weights: their values by hand, and that what asks for them gets them, to the bit.

One run of four steps, its linears rounded to FP4, saves at every step. The average of step t is
0.75 times that of t - 1 plus 0.25 times the saved weights; it begins at the first weights.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from quant.config import QuantConfig, Recipe
from scripts import export_hf, generate, import_hf, score
from tests.integration.small_run import fit, small_run, write_corpus
from train.build import build
from train.checkpoint import reader as checkpoint_reader
from train.checkpoint.average import WeightAverage
from train.config.load import load
from train.config.schema import Weights
from train.errors import UserError
from train.exchange.open import load_model
from train.record.metrics import read_metrics

DECAY, STEPS = 0.75, 4


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A finished run, and the average by hand."""
    folder = tmp_path_factory.mktemp("averaged")
    run = small_run(
        folder / "run", write_corpus(folder), STEPS, ema_decay=DECAY, checkpoint_every=1,
        keep_checkpoints=0, eval_every=2,
    )  # fmt: skip
    run = replace(run, quant=QuantConfig(recipe=Recipe.fp4_qat))
    trainer = build(run)
    average = {n: p.detach().clone() for n, p in trainer.engine.model.named_parameters()}
    assert trainer.fit() == 0
    for step in range(1, STEPS + 1):
        weights = tensors_of(checkpoint(run, step))
        for name, value in average.items():
            value.copy_(DECAY * value + (1 - DECAY) * weights[f"model.{name}"])
            torch.testing.assert_close(weights[f"ema.{name}"], value, rtol=1e-6, atol=1e-8)
    return run, average


def checkpoint(run, step=STEPS):
    return Path(run.run_dir) / "checkpoints" / f"step_{step:08d}"


def tensors_of(path):
    names = list(checkpoint_reader.saved_tensors(path))
    return dict(checkpoint_reader.load_each(path, names))


def evaluated(run, folder=None, **train):
    """What an evaluation without training tells."""
    asked = replace(run, train=replace(run.train, eval_only=True, **train))
    if folder is not None:
        asked = replace(asked, run_dir=str(folder), init_from=run.run_dir)
    assert fit(asked)[0] == 0
    return json.loads((Path(asked.run_dir) / "evaluation.json").read_text())


def called(main, *arguments):
    return main([str(a) for a in arguments])


@pytest.mark.core
def test_the_average_is_read_as_saved(averaged):
    run, average = averaged
    model, _ = load_model(Path(run.run_dir), weights=Weights.average)
    saved = tensors_of(checkpoint(run))
    for name, value in model.state_dict().items():
        kind = "ema" if name in average else "model"  # expert biases and tables are not averaged
        assert torch.equal(value, saved[f"{kind}.{name}"]), name
    assert any(not torch.equal(saved[f"ema.{n}"], saved[f"model.{n}"]) for n in average)


def test_in_place_ends_with_the_bits_that_were_there():
    weight = torch.tensor([1.0, -0.0, 1e-40])
    average = WeightAverage([("w", weight)], 0.5)
    average.averages["w"] += 1
    before = weight.clone(), average.averages["w"].clone()
    with average.in_place():
        assert torch.equal(weight, before[1])
    for now, then in zip((weight, average.averages["w"]), before, strict=True):
        assert torch.equal(now.view(torch.int32), then.view(torch.int32))


@pytest.mark.core
def test_a_run_tells_the_loss_of_both(averaged, tmp_path):
    """Bitwise what an evaluation of either alone gives, in the folder and from elsewhere."""
    run, _ = averaged
    records = read_metrics(Path(run.run_dir) / "metrics.jsonl")
    assert [r["step"] for r in records if "val_loss_average" in r] == [2, 4]
    final = json.loads((Path(run.run_dir) / "receipt.json").read_text())["validation"]
    assert final["loss_average"] != final["loss"]
    for weights, suffix in ((Weights.model, ""), (Weights.average, "_average")):
        for folder in (None, tmp_path / weights.value):
            found = evaluated(run, folder, weights=weights)
            assert found["weights"] == weights.value
            assert found["metrics"]["val_loss"] == final[f"loss{suffix}"]
            assert found["metrics"]["val_bits_per_byte"] == final[f"bits_per_byte{suffix}"]
            assert "val_loss_average" not in found["metrics"]


def test_a_run_starts_from_the_average(averaged, tmp_path):
    run, _ = averaged
    train = replace(run.train, weights=Weights.average)
    new = replace(run, run_dir=str(tmp_path / "new"), init_from=run.run_dir, train=train)
    trainer = build(new)
    saved = tensors_of(checkpoint(run))
    for name, value in trainer.engine.model.named_parameters():
        assert torch.equal(value, saved[f"ema.{name}"]), name
        assert torch.equal(trainer.state.average.averages[name], value), name


def test_scripts_take_the_average(averaged, tmp_path, capsys):
    """Exported and imported it has the bits, the scores and the text of the run's average."""
    run, average = averaged
    asked = ("--weights", "average")
    out, back = tmp_path / "out", tmp_path / "back"
    words = (run.run_dir, out, "--dtype", "fp32", "--to", "official")
    assert called(export_hf.main, *words, *asked) == 0
    assert called(import_hf.main, out, back) == 0
    saved = tensors_of(checkpoint(run))
    imported = load_model(back)[0].state_dict()
    for name in average:
        assert torch.equal(imported[name], saved[f"ema.{name}"]), name
    (tmp_path / "text").write_text("the cat")
    told = {}
    for name, model in (
        ("average", (run.run_dir, *asked)), ("model", (run.run_dir,)), ("imported", (back,)),
    ):  # fmt: skip
        capsys.readouterr()
        assert called(score.main, model[0], tmp_path / "text", *model[1:]) == 0
        scored = json.loads(capsys.readouterr().out)
        assert scored.pop("weights") == ("average" if name == "average" else "model")
        assert called(generate.main, *model, "--prompt", "the", "--tokens", 8, "--no-stop") == 0
        told[name] = scored, capsys.readouterr().out
    assert told["average"] == told["imported"]
    assert told["average"][0] != told["model"][0]
    assert called(export_hf.main, *words) == 2
    assert "average weights' and not" in capsys.readouterr().err, "the folder holds the average"


# ---- what cannot be ------------------------------------------------------------------------------
@pytest.mark.core
def test_an_average_that_is_not_there_is_refused(averaged, tmp_path, capsys):
    run, _ = averaged
    plain = small_run(tmp_path / "plain", write_corpus(tmp_path), 1)
    assert fit(plain)[0] == 0
    for asked in (
        replace(plain, train=replace(plain.train, eval_only=True, weights=Weights.average)),
        replace(plain, run_dir=str(tmp_path / "new"), init_from=plain.run_dir,
                train=replace(plain.train, weights=Weights.average)),
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"train\.weights=average: .* holds model weights only"):
            fit(asked)
    for main, words in (
        (export_hf.main, (tmp_path / "out",)),
        (import_hf.main, (tmp_path / "out",)),
        (score.main, (tmp_path / "corpus.jsonl",)),
        (generate.main, ("--prompt", "x")),
    ):
        assert called(main, plain.run_dir, *words, "--weights", "average") == 2
        assert "--weights=average: checkpoint" in capsys.readouterr().err
    assert called(export_hf.main, run.run_dir, tmp_path / "out") == 0
    capsys.readouterr()
    assert called(import_hf.main, tmp_path / "out", tmp_path / "x", "--weights", "average") == 2
    assert "which holds one set of weights" in capsys.readouterr().err


def test_weights_that_nothing_takes_are_refused():
    with pytest.raises(UserError, match=r"train\.weights=average says what train\.eval_only"):
        load(OmegaConf.create({"train": {"weights": "average"}}))
