"""What an exported folder holds besides tensors: what other programs and readers expect there."""

import json
import os
import stat

import pytest
import yaml
from transformers import AutoTokenizer, GenerationConfig

from data.tokenizer import ByteTokenizer, train_bpe
from model.parameter_counts import parameter_counts
from scripts import export_hf, score
from tests.train.exchange.exchange_models import CONFIG_TINY, write_run
from train.exchange.export import ExportFormat, ExportJob, export_folder
from train.exchange.open import load_model, open_source

VALIDATION = {"loss": 2.5, "bits_per_byte": 1.75, "xz_bits_per_byte": 2.25}
RECEIPT = {
    "config_sha256": "c" * 64,
    "code": {"commit": "d" * 40, "source_sha256": "e" * 64},
    "data": {"sources": {"words": {"documents": 12, "tokens": 3456, "train": "f" * 64}}},
    "progress": {"step": 10},
    "final_metrics": {"loss": 2.625},
    "validation": VALIDATION,
    "harness": [{"step": 10, "results": {"cloze": {"acc": 0.375}}}],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "words"
    write_run(folder)
    (folder / "receipt.json").write_text(json.dumps(RECEIPT))
    return folder


def front_matter(card):
    return yaml.safe_load(card.split("---")[1])


@pytest.mark.parametrize("layout", list(ExportFormat))
def test_model_card_says_what_the_model_is_and_where_it_comes_from(layout, run, tmp_path):
    export_folder(open_source(run), tmp_path / "out", ExportJob(layout, licence="mit"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert front_matter(card)["license"] == "mit"
    counts = parameter_counts(CONFIG_TINY)
    told = [
        f"{counts.total:,}",
        f"{counts.active:,}",
        "`words`, step 10",
        "1,280, padding included",
    ]
    told += ["3,456", *("c" * 12, "d" * 12, "e" * 12, "f" * 12)]
    told += [f"{value:.4f}" for value in (*VALIDATION.values(), 2.625, 0.375)]
    for text in told:
        assert text in card, text


def test_model_card_without_a_run_claims_nothing_of_training(run, tmp_path):
    export_folder(open_source(run), tmp_path / "a", ExportJob(ExportFormat.transformers))
    export_folder(open_source(tmp_path / "a"), tmp_path / "b", ExportJob(ExportFormat.official))
    card = (tmp_path / "b" / "README.md").read_text()
    assert "## Training" not in card
    assert front_matter(card)["license"] == "unknown"


def test_losses_of_another_step_are_not_told(run, tmp_path):
    """The receipt is of the run's end; an earlier checkpoint has other losses."""
    write_run(tmp_path / "run")
    (tmp_path / "run" / "receipt.json").write_text(json.dumps(RECEIPT | {"progress": {"step": 20}}))
    export_folder(open_source(tmp_path / "run"), tmp_path / "out", ExportJob(ExportFormat.official))
    assert f"{VALIDATION['loss']:.4f}" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), train_bpe(["the cat sat. " * 20], 300)])
def test_tokenizer_and_generation_files_are_what_transformers_writes(
    tokenizer, run, tmp_path, monkeypatch
):
    source = open_source(run)
    monkeypatch.setattr(source, "tokenizer", lambda: tokenizer)
    export_folder(source, tmp_path / "out", ExportJob(ExportFormat.transformers))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs.save_pretrained(tmp_path / "again")
    missing = {p.name for p in (tmp_path / "again").iterdir()} - {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert missing == set()
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.eos_token_id == theirs.eos_token_id == tokenizer.eos_id
    assert generation.pad_token_id == theirs.pad_token_id


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_mode_that_the_user_asked_for(mask, run, tmp_path):
    before = os.umask(mask)
    try:
        assert export_hf.main([str(run), str(tmp_path / "out")]) == 0
    finally:
        os.umask(before)
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path.name


def test_a_licence_of_several_words_is_refused(run, tmp_path, capsys):
    assert export_hf.main([str(run), str(tmp_path / "out"), "--license", "as you\nlike"]) == 2
    assert "--license" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_card_is_no_obstacle_to_reading(run, tmp_path):
    export_folder(open_source(run), tmp_path / "out", ExportJob(ExportFormat.official))
    load_model(tmp_path / "out")


def test_score_makes_the_folder_that_it_writes_to(run, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat")
    out = tmp_path / "not" / "there" / "scores.npz"
    assert score.main([str(run), str(tmp_path / "text.txt"), "--out", str(out)]) == 0
    assert out.is_file()
