"""Weights are read with the tokenizer that they were trained with; another one is refused."""

import pytest

from data.config import SourceConfig, SourceKind, TextUnit
from tests.integration.small_run import fit, metrics_of, small_run
from train.errors import USER_ERRORS, ExitCode
from train.run_folder.tokenizer import inherited_tokenizer

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
