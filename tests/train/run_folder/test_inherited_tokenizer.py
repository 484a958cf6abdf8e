"""Weights are read with the tokenizer that they were trained with; another one is refused."""

from pathlib import Path

import pytest

from data.config import SourceConfig, SourceKind, TextUnit
from scripts.prepare import main as prepare
from tests.integration.small_run import fit, metrics_of, small_run
from train.errors import USER_ERRORS, ExitCode, UserError
from train.preflight.checks import check_run
from train.run_folder.tokenizer import check_tokenizer, inherited_tokenizer

WORDS = {"a": "one two three four five six ", "b": "quick brown foxes jump over lazy dogs "}


@pytest.fixture
def begun(tmp_path):
    """A run with a tokenizer trained on its text, and a config for another text."""

    def run(name, init_from=""):
        path = tmp_path / f"{name}.txt"
        path.write_text("\n".join(f"{WORDS[name]}{i * i} {i % 7}" * 4 for i in range(300)))
        made = small_run(tmp_path / f"run_{name}", path, steps=2, eval_every=0)
        made.model.vocab_size = made.data.vocab_size = 600
        made.data.tokenizer, made.init_from = "bpe", init_from
        source = SourceConfig(kind=SourceKind.text, path=str(path), unit=TextUnit.line)
        made.data.sources = {"t": source}
        made.sample.tokens = 0
        return made

    first = run("a")
    assert fit(first)[0] == ExitCode.finished
    return first, run


def test_other_text_is_read_with_the_tokenizer_of_the_weights(begun):
    first, make = begun
    (of_first,) = {fit(first)[1].state.loader.tokenizer.hash}
    for source in (first.run_dir, f"{first.run_dir}/checkpoints/step_00000002"):
        assert inherited_tokenizer(make("b", source)).hash == of_first
    second = make("b", first.run_dir)
    code, trainer = fit(second)
    assert code == ExitCode.finished
    assert trainer.state.loader.tokenizer.hash == of_first
    assert inherited_tokenizer(make("a")) is None
    longer = make("b")  # goes on, and does not name where it came from
    longer.train.steps = 3
    assert fit(longer)[1].state.loader.tokenizer.hash == of_first
    assert [record["step"] for record in metrics_of(longer)] == [1, 2, 3]


def test_another_tokenizer_is_refused(begun):
    first, make = begun
    other = make("b", first.run_dir)
    other.data.tokenizer = "byte"
    with pytest.raises(USER_ERRORS, match=r"tokenizer.*weights mean something only"):
        fit(other)


def test_another_tokenizer_is_refused_before_any_text_is_read(begun, tmp_path):
    first, make = begun
    other = make("b", f"{first.run_dir}/checkpoints/step_00000002")
    assert check_run(other, alone=True)[0] == other  # bpe: that of the weights
    other.data.tokenizer = "byte"
    (tmp_path / "b.txt").write_bytes(b"\xff")  # which no tokenizer reads
    told = r"data.tokenizer=byte has 260 ids, but the weights .* of 600 ids: leave data.tokenizer="
    with pytest.raises(UserError, match=told):
        check_run(other, alone=True)
    other.data.tokenizer = f"{first.run_dir}"
    assert check_run(other, alone=True)[0] == other


def test_a_store_of_another_tokenizer_is_refused_with_the_way_to_make_it_anew(begun, tmp_path):
    first, make = begun
    (tmp_path / "b.txt").write_text("\n".join(f"{WORDS['b']}{i}" for i in range(200)))
    for tokenizer in ("byte", first.run_dir):
        words = [str(tmp_path / "b.txt"), "--unit", "line", "--tokenizer", str(tokenizer), "--out"]
        store = tmp_path / f"store_{Path(tokenizer).name}"
        assert prepare([*words, str(store), "--validation-bytes", "500", "--no-summary"]) == 0
        run = make("b", str(first.run_dir))
        run.data.sources = {"t": SourceConfig(kind=SourceKind.store, path=str(store))}
        if tokenizer == "byte":
            told = f"of 260 ids.*v4 prepare with --tokenizer {first.run_dir} makes a store"
            with pytest.raises(UserError, match=told):
                check_tokenizer(run)
        else:
            check_tokenizer(run)
