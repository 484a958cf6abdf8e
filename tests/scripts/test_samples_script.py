"""``scripts/samples.py``: the texts that it shows are those that were trained on."""

import json

import pytest

from scripts.samples import main
from tests.integration.poisoned_run import FIRST_SPIKE, poisoned_run, write_poisoned
from tests.integration.small_run import fit, small_run, write_corpus

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    corpus = write_corpus(folder, documents=3)
    run = small_run(folder / "run", corpus, 3, log_samples=True, eval_every=0, eval_tokens=0)
    run.data.validation.bytes = 0
    fit(run)
    return folder


def test_step_shows_each_piece_with_its_text(folder, capsys):
    assert main([str(folder / "run"), "--step", "2", "--text"]) == 0
    shown = capsys.readouterr().out
    assert {line.split()[3] for line in shown.splitlines() if line.startswith("step 2")} == set(
        "0123"
    )
    texts = [
        json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()
    ]
    for piece in shown.split("step 2 row ")[1:]:
        name, text = piece.split("\n", 1)
        document, (start, stop) = name.split()[1], name.split()[-1].split("-")
        whole = texts[int(document.removeprefix("words:"))]
        assert text.rstrip("\n") == whole[int(start) : int(stop)]


def test_document_is_found_in_its_rows(folder, capsys):
    assert main([str(folder / "run"), "--document", "words:1"]) == 0
    assert all(" words:1 pass 0 " in line for line in capsys.readouterr().out.splitlines())
    assert main([str(folder / "run"), "--document", "words:99"]) == 1
    assert "nothing found" in capsys.readouterr().err


def test_spike_that_was_rolled_back_shows_its_texts(tmp_path, capsys):
    run = poisoned_run(tmp_path / "run", write_poisoned(tmp_path))
    fit(run)
    assert main([run.run_dir, "--step", str(FIRST_SPIKE), "--abandoned"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[1] for line in lines} == {"1", "2"}
    assert main([run.run_dir, "--step", str(FIRST_SPIKE)]) == 0
    kept = capsys.readouterr().out.splitlines()
    assert not {line.split()[6] for line in lines} & {line.split()[4] for line in kept}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "1", "--abandoned"], "samples_abandoned.jsonl does not exist: nothing was"),
        (["--document", "words"], "--document words: not SOURCE:NUMBER"),
    ],
)
def test_what_cannot_be_is_one_line(folder, capsys, words, message):
    assert main([str(folder / "run"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_other_data_is_refused(folder, tmp_path, capsys):
    text = (folder / "run" / "samples.jsonl").read_text()
    (tmp_path / "config.yaml").write_text((folder / "run" / "config.yaml").read_text())
    hash_now = json.loads(text.splitlines()[0])["data"]
    (tmp_path / "samples.jsonl").write_text(text.replace(hash_now, "0123456789abcdef"))
    assert main([str(tmp_path), "--step", "1"]) == 2
    assert "its hash was 0123456789abcdef, now it is" in capsys.readouterr().err
