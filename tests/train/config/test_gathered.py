"""Faults that are planted together are told together; none is told that was not planted."""

import random
import re

import pytest

from train.config.command_line import composed, normalise
from train.config.gathered import all_problems
from train.config.load import parse
from train.errors import DoesNotFitError, UserError
from train.pretrain import cli

# One fault a line: what is typed, and what its line says. Each is refused by itself, and none
# speaks of a key of another: pairs that do are below.
FAULTS = {
    "--steps=3": "unknown flag --steps",
    "lr=3": "give optim.lr",
    "train.stepz=3": "did you mean train.steps?",
    "model.hidden_size=63": "model.hidden_size=63 must be a multiple of",
    "model.o_groups=0": "model.o_groups=0 must be",
    "model.qk_rope_head_dim=7": "model.qk_rope_head_dim=7 must be even",
    "model.layer_kinds=swa": "model.layer_kinds=swa must be a list",
    "train.global_batch_tokens=100": "global_batch_tokens=100 must be a multiple",
    "train.precision=fp8": "train.precision=fp8 must be one of",
    "train.ema_decay=1.5": "train.ema_decay=1.5 must",
    "train.profile_steps=-1": "train.profile_steps=-1 must",
    "parallel.ep=3": "parallel.ep=3 must divide",
    "parallel.dp_shard=5": "dp_shard=5 * cp=1 = 5 ranks",
    "parallel.offload=all": "parallel.offload=all is none of",
    "optim.adamw.eps=1": "optim.adamw.eps=1.0 must",
    "optim.schedule.kind=linear": "optim.schedule.kind=linear must be one of",
    "optim.muon.newton_schulz=[]": "needs at least one stage",
    "data.fim.rate=2": "data.fim.rate=2.0 must",
    "data.tokenizer=/nowhere/t.json": "data.tokenizer=/nowhere/t.json",
    "data.validation.bytes=-1": "data.validation.bytes=-1 must",
    "init_from=/nowhere/run": "/nowhere/run holds no complete checkpoint",
    "seed=x": "seed=x must be a whole number",
    "sample.temperature=-1": "sample.temperature=-1.0 must",
    "engine.zero_stage=3": "engine.zero_stage=3 needs",
    "quant.engine=none_such": "quant.engine=none_such must be one of",
}  # fmt: skip
SHARED = [  # one hides the other: they are of one calculation
    {"model.hidden_size=63", "train.precision=fp8"},  # the multiple depends on the precision
    {"parallel.ep=3", "parallel.dp_shard=5"},  # ranks that share experts are among the data ranks
    {"parallel.dp_shard=5", "train.global_batch_tokens=100"},
]


def told(words, capsys, folder):
    code = cli(["model=v4_tiny", *words, f"run_dir={folder}/run"])
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    assert not (folder / "run").exists()
    return [line for line in lines if line.startswith("error: ")]


def plant(rng, number):
    chosen = rng.sample(sorted(FAULTS), number)
    return [w for w in chosen if not any({w, v} in SHARED for v in chosen if v < w)]


def planted_are_told(seed, capsys, folder):
    rng = random.Random(seed)
    words = plant(rng, rng.randint(2, 9))
    lines = told(words, capsys, folder)
    for word in words:
        assert any(FAULTS[word] in line for line in lines), (word, words, lines)
    for line in lines:
        assert any(FAULTS[word] in line for word in words), (line, words)


@pytest.mark.parametrize(
    "words",
    [
        ["sample.temperature=-1", "parallel.ep=3"],  # a range hides the layout, inside Hydra's job
        ["--steps=3", "data.fim.rate=2"],  # a flag hides all keys
        ["quant.engine=none_such", "engine.zero_stage=3"],  # the last part of one key is another
        ["model.hidden_size=63", "train.global_batch_tokens=100", "parallel.ep=3"],
    ],
)
def test_what_one_refusal_hides_is_told(words, capsys, tmp_path):
    lines = told(words, capsys, tmp_path)
    assert len(lines) == len(words)
    assert all(any(FAULTS[word] in line for line in lines) for word in words), lines


@pytest.mark.parametrize("seed", range(2))
def test_planted_faults_are_all_told_and_no_others(seed, capsys, tmp_path):
    planted_are_told(seed, capsys, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 160))
def test_planted_faults_are_all_told_and_no_others_many_times(seed, capsys, tmp_path):
    planted_are_told(seed, capsys, tmp_path)


# ---- the rule by itself --------------------------------------------------------------------------
def gathered(words, rules, readable=None):
    """Problems of words under rules: each is words that must all be there, and its line."""

    def check(left):
        for needed, line in rules:  # the first alone, as a check that hides all others
            if all(word in left or word.startswith("!") for word in needed) and not any(
                word[1:] in left for word in needed if word.startswith("!")
            ):
                raise UserError(line)

    try:
        check(words)
    except UserError as first:
        return list(all_problems(first, words, readable or words, check).args)
    return []


def test_what_hides_behind_a_refusal_is_told_but_not_what_follows_from_taking_it_off():
    rules = [
        (["a.x=1"], "a.x=1 must be 2"),
        (["b.y=3", "!a.x=1"], "b.y=3 needs a.x"),
        (["c.z=4"], "c.z=4 is none of 5"),
    ]
    assert gathered(["a.x=1", "b.y=3", "c.z=4"], rules) == ["a.x=1 must be 2", "c.z=4 is none of 5"]


def test_a_group_takes_its_keys_with_it():
    rules = [
        (["model=big"], "model.name=big needs 9 GB"),
        (["model.width=7", "!model=big"], "model.width=7 exceeds model.most=5"),
        (["seed=-1"], "seed=-1 must be 0 or more"),
    ]
    words = ["model=big", "model.width=7", "seed=-1"]
    assert gathered(words, rules) == ["model.name=big needs 9 GB", "seed=-1 must be 0 or more"]


def test_a_misfit_behind_another_problem_is_told_with_its_table():
    def check(left):
        if "seed=-1" in left:
            raise UserError("seed=-1 must be 0 or more")
        raise DoesNotFitError("model.name=big needs 9 GB", table="9 > 8")

    first = UserError("seed=-1 must be 0 or more")
    error = all_problems(first, ["model=big", "seed=-1"], ["model=big", "seed=-1"], check)
    assert isinstance(error, DoesNotFitError)
    assert error.table == "9 > 8"
    assert list(error.args) == ["seed=-1 must be 0 or more", "model.name=big needs 9 GB"]


def test_a_failure_of_ours_in_a_later_look_does_not_hide_what_is_known():
    def check(left):
        raise RuntimeError(f"tripped over {left}")

    first = UserError("a.x=1 must be 2")
    assert all_problems(first, ["a.x=1", "b.y=2"], ["b.y=2"], check).args == first.args


# ---- wording -------------------------------------------------------------------------------------
RAW = re.compile(
    r"OmegaConf|DictConfig|ListConfig|Dict\[|NoneType|could not be converted|Optional|struct\b"
    r"|Traceback|Error\b.*raised|full_key|object_type|subclass|viable|Interpolation|Hydra\b"
    r"|Cannot (merge|convert|assign)|Invalid (value|type)|Ambiguous value|--multirun|Could not"
)
ODD = [
    "optim.muon.splits.q=2", "optim.muon.splits={q:whole}", "optim.muon.splits=[1]",
    "optim.adamw.betas=1", "optim.adamw.betas=[0.9,null]", "optim.adamw.betas={a:1}",
    "optim.adamw.betas.x=1", "optim.adamw.betas=", "optim.muon.newton_schulz=[{steps:x}]",
    "optim.muon.newton_schulz=[1]", "train.steps=[1,2]", "train.steps={a:1}", "train.steps=null",
    "train.steps=true", "train.steps=1e3", "train.steps=1,2", "train.steps=range(1,3)",
    "train.steps=glob(*)", "train.steps=sort(1,2)", "train.steps=foo(3)", "train.steps=${nowhere}",
    "train.steps=${nowhere", "train.steps=${oc.env:NO_SUCH_VARIABLE}", "train.steps=${foo:1}",
    "train.steps=???", "~train.steps", "~train.steps=3", "~optim=muon", "~optim", "~data.sources",
    "~", "=", "=3", "++=3", "train=null", "train=[1]", "train={nope:3}", "train=3", "model=null",
    "model=[v4_tiny,v4_nano]", "model={a:1}", "model@foo=v4_tiny", "+optim@train.x=muon",
    "train/steps=3", "experiment=null", "hydra=3", "train.precision=[fp32]",
    "train.eval_only=maybe", "train.eval_only=2", "train.eval_only=null", "data.sources.x=3",
    "data.sources.x=[1]", "data.sources.x={kind:nope,path:a}", "data.sources.x={nope:1}",
    "data.sources.x.weight=a", "data.sources=3", "data.sources=null", "~data.sources.x",
    "data.sources.x.packages=3", "data.tokenizer=[a]", "data.tokenizer={a:b}",
    "data.validation={bytes:x}", "model.layer_kinds=swa", "model.layer_kinds=[1]",
    "model.compress_ratios=[a]", "train.stages=3", "train.stages=[1]",
    "train.stages=[{until_tokens:x}]", "train.stages=[{lr:[1]}]", "train.stages={a:1}",
    "train.stages.0.lr=3", "seed=[1]", "seed=1.5", "run_dir=[a]", "run_dir=null",
    "engine={name:foo}", "sample.prompt=[1]", "model.bogus=1", "model.scale=big",
    "data.sources={a:{kind:text,path:x}},b",
]  # fmt: skip


@pytest.mark.parametrize("word", ODD)
def test_what_no_key_takes_is_told_in_one_line_of_our_own(word):
    with pytest.raises(UserError) as caught:
        parse(composed(["model=v4_tiny", word]))
    (line,) = caught.value.args
    assert "\n" not in line
    assert not RAW.search(line), line
    assert re.split(r"[=.@/{]", word.lstrip("+~"))[0] in line


def test_a_key_like_none_is_not_guessed_at():
    with pytest.raises(UserError) as caught:
        normalise(["model.bogus=1"])
    (line,) = caught.value.args
    assert "did you mean" not in line
    assert "--cfg job --package model shows them" in line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--cfg"], "--cfg needs a value"),
        (["--cfg", "foo"], "--cfg foo is none of job, hydra, all"),
        (["--cfg=foo"], "--cfg foo is none of job, hydra, all"),
        (["--cfg", "job", "--package", "nope"], "--package nope: the config has run_dir"),
        (["--resolve"], "--resolve acts on what --cfg job"),
        (["-sc", "query"], "unknown flag -sc: "),
        (["--lr", "3"], "unknown flag --lr: give optim.lr"),
        (["-"], "unknown flag -: see --help"),
    ],
)
def test_flags_are_told_beside_all_else(words, told):
    with pytest.raises(UserError) as caught:
        normalise([*words, "train.stepz=3"])
    first, second = caught.value.args
    assert first.startswith(told)
    assert "did you mean train.steps?" in second


@pytest.mark.parametrize(
    "words",
    [["--cfg", "job", "-p", "train.recovery"], ["--cfg=hydra", "--package=hydra.run"], ["-m"],
     ["--cfg", "job", "--resolve"], ["--info"], ["--info=defaults"]],
)  # fmt: skip
def test_flags_that_are_right_pass(words):
    assert normalise([*words, "seed=3"])[-1] == "seed=3"
