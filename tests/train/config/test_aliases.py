"""What people type is answered by what is meant, and every problem of a config is told at once."""

import re

import pytest

from tests.train.test_bad_inputs import CASES
from train.config.aliases import FLAGS, KEYS
from train.config.command_line import compose_run, options
from train.config.schema import RunConfig
from train.config.values import unknown_key
from train.errors import UserError
from train.pretrain import cli


@pytest.fixture
def errors(capsys, tmp_path):
    """The error lines of a command line that cannot be."""

    def run(*args):
        assert cli([*args, f"run_dir={tmp_path}/run"] if "run_dir=" not in args else args) == 2
        lines = capsys.readouterr().err.splitlines()
        assert all(line.startswith("error: ") for line in lines)
        assert not (tmp_path / "run").exists()
        return lines

    return run


@pytest.mark.core
@pytest.mark.parametrize(("typed", "meant"), KEYS.items())
def test_what_an_alias_means_exists_and_the_alias_does_not(typed, meant):
    problem = unknown_key(typed.split("."), RunConfig)
    assert problem or typed in RunConfig.__dataclass_fields__  # a section, given a word
    for name, option in re.findall(r"([a-z_]+(?:\.[a-z_]+)*)(?:=([a-z0-9_]+))?", meant)[:1]:
        if name in ("data", "optim", "quant", "model") and option:
            assert option in options(name)
        else:
            assert unknown_key(name.split("."), RunConfig) is None, name


def test_an_alias_is_answered_by_what_is_meant(errors):
    for typed, meant in [*KEYS.items()][::7]:
        (line,) = errors(f"{typed}=true")
        assert meant in line
    for flag, meant in FLAGS.items():
        (line,) = errors(flag)
        assert meant in line
    (line,) = errors("--learning-rate=3")
    assert "give optim.lr" in line


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("data=NAME/OF-HUB", "data=hub data.sources.hub.path=NAME/OF-HUB"),
        ("data={folder}/text", "data=text data.sources.text.path={folder}/text"),
        ("data={folder}/lines.jsonl", "data=jsonl data.sources.jsonl.path={folder}/lines.jsonl"),
        ("data={folder}/table", "data=parquet data.sources.parquet.path={folder}/table"),
        ("model=deepseek-ai/DeepSeek-V4", "v4 import_hf"),
        ("model={folder}/text", "init_from={folder}/text"),
    ],
)
def test_a_path_for_an_option_is_answered_by_where_it_belongs(typed, meant, errors, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("words")
    (tmp_path / "lines.jsonl").write_text("{}")
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "0.parquet").write_text("")
    (line,) = errors(typed.format(folder=tmp_path))
    assert meant.format(folder=tmp_path) in line


# Of the cases that are refused one by one, those that stand in the config's own sections.
APART = ("odd rope dims", "heads that groups do not divide", "ratios shorter than layers",
         "pipeline schedule without pipeline", "source without a path",
         "more active experts than there are")  # fmt: skip
AT_ONCE = ("misspelt key", "word for a number", "unknown precision",
           "key that nothing knows, added", "recipe that does not exist",
           "fraction for a count")  # fmt: skip
RANGES = ("negative learning rate", "fill-in-the-middle rate above one", "profile of step 0")


@pytest.mark.parametrize("names", [APART, AT_ONCE, RANGES, (*AT_ONCE, "odd rope dims")])
def test_every_problem_is_told_in_one_go(names, errors):
    chosen = [case for case in CASES if case[0] in names]
    assert len(chosen) == len(names)
    given = {}
    for _, args, _ in chosen:
        for arg in args:
            given.setdefault(arg.partition("=")[0], []).append(arg)
    words = [some[0] for some in given.values()]
    lines = errors("model=v4_tiny", *words)
    text = "\n".join(lines)
    for _, args, says in chosen:
        if all(arg in words for arg in args):
            assert says in text, (says, text)
    assert len(lines) >= len(chosen) - 1  # two of them may name one key


def test_what_only_the_plan_the_machine_or_the_files_refuse_is_told_in_the_same_go(
    errors, tmp_path
):
    """Each line from another check: range, sections, plan, layout, reach, text, weights, typing."""
    words = (
        "model=v4_tiny", "train.stepz=3", "train.seq_len=96", "train.recovery.skip_steps=2",
        "parallel.pp=7", "train.profile_steps=9", "train.profile_start=13", "data=text",
        f"data.sources.text.path={tmp_path}/none.txt", f"init_from={tmp_path}/nowhere",
    )  # fmt: skip
    lines = errors(*words)
    for says in ("did you mean train.steps?", "multiple of seq_len=96", "skip_steps=2 acts after",
                 "parallel.pp=7 does not divide", "profile_steps=9 end behind", "none.txt",
                 "nowhere holds no complete checkpoint"):  # fmt: skip
        assert len([line for line in lines if says in line]) == 1, says
    assert len(lines) == 7
    assert any("optim.lr=-1" in line for line in errors(*words, "optim.lr=-1"))


def test_a_model_that_does_not_fit_does_not_hide_what_else_is_wrong(capsys, tmp_path):
    args = ["+model=v4_pro", "data.tokenizer=byte", "train.profile_steps=1",
            "train.profile_start=100000000", f"run_dir={tmp_path}/run"]  # fmt: skip
    assert cli(args) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-3] == ""
    assert "profile_start=100000000" in lines[-2]
    assert lines[-1].startswith("error: model.name=v4_pro needs ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("optim.schedule=cosine", "optim.schedule is a section; give optim.schedule.kind"),
        ("sample=hello", "sample is a section; give sample.prompt"),
        ("data.tokenizer.path=x", "data.tokenizer is one value, no section"),
        ("seed.x=1", "seed is one value, no section"),
    ],
)
def test_value_for_a_section_and_section_for_a_value_are_told_in_our_words(word, told):
    with pytest.raises(UserError, match=re.escape(told)):
        compose_run(["model=v4_tiny", word])
