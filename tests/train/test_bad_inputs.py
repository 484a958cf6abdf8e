"""Thirty and more inputs that cannot be: each one clear line, exit code 2, nothing lost.

Most run through the entry's ``cli`` in this process, which is what ``__main__`` calls; a few go
through a real process, to see the exit code and that nothing else is printed.
"""

import argparse
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.config.command_line import compose_run
from train.config.load import dump
from train.errors import ROOT, ExitCode
from train.preflight.checks import check_run
from train.pretrain import PATIENCE, cli

# (what, arguments, what the line must say)
CASES = [
    ("model that does not exist", ["model=v4_nan"], "did you mean v4_nano?"),
    ("model without its group", ["v4_flash"], "did you mean model=v4_flash?"),
    ("optimizer that does not exist", ["optim=sgd"], "optim=sgd"),
    ("experiment that does not exist", ["experiment=debug"], "did you mean debug_cpu?"),
    ("recipe that does not exist", ["train=tiny"], "did you mean v4_tiny?"),
    ("misspelt key", ["train.stepz=3"], "did you mean train.steps?"),
    ("misspelt section", ["trainer.steps=3"], "did you mean train?"),
    ("key that nothing knows, added", ["+foo=1"], "unknown config key foo=1"),
    ("key that nothing knows, forced", ["++train.foo=1"], "unknown config key train.foo=1"),
    ("flag that does not exist", ["--steps=3"], "unknown flag --steps"),
    ("search path that is not there", ["hydra.searchpath=[file:///no/such]"],
     "there is no folder /no/such"),
    ("search path of no package", ["hydra.searchpath=[pkg://no_such.conf]"],
     "there is no installed package no_such.conf"),
    ("search path that is no list", ["hydra.searchpath=/tmp"], "hydra.searchpath is a list"),
    ("flag with a value", ["--multirun=3"], "--multirun takes no value, got '3'"),
    ("unreadable override", ["train.steps=[1"], "cannot read the argument 'train.steps=[1'"),
    ("path that is not quoted", ["data.sources.x.path=/data/lang=en/a.txt"],
     """quoted, for the shell and in it: 'data.sources.x.path="/data/lang=en/a.txt"'"""),
    ("path with a letter beyond ASCII", ["init_from=a/\u00fc"], """'init_from="a/\u00fc"'"""),
    ("path with a parenthesis", ["data.tokenizer=a (1).json"], """'data.tokenizer="a (1).json"'"""),
    ("path with a range", ["wandb.name=[0-3].txt"], """'wandb.name="[0-3].txt"'"""),
    ("text with both quotes", ["sample.prompt=it's \"so\""],
     """'sample.prompt="it'"'"'s \\"so\\""'"""),
    ("text that is read as a number", ["wandb.name=1_000"], """read as 1000: a text is quoted"""),
    ("text that is read as a power", ["sample.prompt=1e3"], """'sample.prompt="1e3"'"""),
    ("bytes of another encoding", ['wandb.name="\udcff"'], "wandb.name='\\udcff' is not UTF-8"),
    ("word for a number", ["train.steps=abc"], "train.steps=abc"),
    ("nothing for a number", ["train.steps="], "train.steps="),
    ("fraction for a count", ["train.steps=1.5"], "train.steps=1.5"),
    ("unknown precision", ["train.precision=fp8"], "fp32, bf16"),
    ("unknown schedule", ["optim.schedule.kind=linear"], "optim.schedule.kind=linear"),
    ("no steps", ["train.steps=0"], "train.steps=0"),
    ("negative learning rate", ["optim.lr=-1"], "optim.lr=-1"),
    ("batch that rows do not fill", ["train.seq_len=100"], "multiple of seq_len=100"),
    ("microbatch that rows do not fill", ["train.micro_batch_size=3"], "micro_batch_size=3"),
    ("rows beyond the model",
     ["model.max_position_embeddings=64", "sample.tokens=0"], "max_position_embeddings"),
    ("heads that groups do not divide", ["model.o_groups=3"], "model.o_groups=3"),
    ("more active experts than there are", ["model.num_experts_per_tok=99"], "n_routed_experts"),
    ("odd rope dims", ["model.qk_rope_head_dim=7"], "model.qk_rope_head_dim=7"),
    ("ratios shorter than layers", ["model.compress_ratios=[0,4]"], "compress_ratios has 2"),
    ("engine and layout that do not go together",
     ["engine=deepspeed", "parallel.offload=optimizer"], "say engine=torch"),
    ("frozen parameters under DeepSpeed", ["engine=deepspeed", "train.indexer_loss_weight=0"],
     "say engine=torch"),
    ("DeepSpeed JSON that is absent", ["engine=deepspeed", "engine.config=/absent/ds.json"],
     "engine.config=/absent/ds.json cannot be read as JSON"),
    ("the same, tried out",
     ["engine=deepspeed", "engine.config=/absent/ds.json", "dry_run=true"], "/absent/ds.json"),
    ("sequence shards", ["parallel.cp=2"], "parallel.cp=2"),
    ("balanced scoring of whole rows", ["parallel.cp_scoring=balanced"],
     "parallel.cp_scoring=balanced needs a stage with cp above 1"),
    ("layout that the world is not", ["parallel.dp_shard=3"], "the world size is 1"),
    ("pipeline schedule without pipeline", ["parallel.schedule=gpipe"], "parallel.pp"),
    ("stage that ends before it begins",
     ["train.stages=[{until_tokens: 5, global_batch_tokens: 128, seq_len: 128},"
      "{until_tokens: 5}]"], "train.stages[1]"),
    ("stage with a misspelt key", ["train.stages=[{until: 5}]"], "until"),
    ("warm-up of an indexer that is absent",
     ["train.indexer_phase=warmup", "model.attention=swa"], "needs a csa layer"),
    ("decay behind the end", ["optim.schedule.decay_start_tokens=1000000000"], "tokens"),
    ("profile of step 0", ["train.profile_steps=1", "train.profile_start=0"], "must be 1 or more"),
    ("profile behind the end", ["train.profile_steps=9", "train.profile_start=13"], "20 steps"),
    ("fill-in-the-middle rate above one", ["data.fim.rate=2"], "data.fim.rate=2"),
    ("source without a path",
     ["+data.sources.mine.kind=text"], "data.sources.mine.path"),
    ("model that cannot fit", ["+model=v4_pro", "data.tokenizer=byte"], "model.name=v4_pro needs"),
    ("card that is absent", ["experiment=gpu_8gb"], "no CUDA device"),
]  # fmt: skip


@pytest.fixture
def one_line(capsys, monkeypatch):
    """Run a command line; give its exit code and the error line, and insist that it is one."""
    # Libraries keep log handlers on the stderr of an earlier test, which pytest has closed.
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def run(*args: str) -> tuple[int, str]:
        code = cli(args)
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.strip().splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1
        assert lines[-1] == errors[0]
        assert "Traceback" not in err
        return code, errors[0]

    return run


@pytest.mark.parametrize(("what", "args", "says"), CASES, ids=[case[0] for case in CASES])
def test_bad_input_is_one_line_and_leaves_nothing(what, args, says, one_line, tmp_path):
    if what == "card that is absent" and Path("/dev/nvidia0").exists():
        pytest.skip("this machine has the card")
    folder = tmp_path / "run"
    base = [] if args[0].startswith(("experiment", "+model", "model=")) else ["model=v4_tiny"]
    code, line = one_line(*base, *args, f"run_dir={folder}")
    assert code == ExitCode.user_error
    assert says in line
    assert not folder.exists()


# ---- run folders ------------------------------------------------------------------------------
def folder_with_a_run(path: Path, *args: str) -> dict[str, bytes]:
    """A folder as a run leaves it, and its bytes."""
    (path / "checkpoints" / "step_00000002").mkdir(parents=True)
    (path / "config.yaml").write_text(dump(compose_run([*args, f"run_dir={path}"])))
    (path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    return content(path)


def content(path: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model=v4_micro", "holds a run with model.name=v4_tiny, but now model.name=v4_micro"),
        ("optim=adamw", "optim.name=muon, but now optim.name=adamw"),
        ("seed=7", "seed=0, but now seed=7"),
        ("train.seq_len=64", "train.seq_len=128, but now train.seq_len=64"),
    ],
)
def test_folder_of_another_run_is_refused_and_kept(change, says, one_line, tmp_path):
    before = folder_with_a_run(tmp_path, "model=v4_tiny")
    args = [change] if change.startswith("model=") else ["model=v4_tiny", change]
    code, line = one_line(*args, f"run_dir={tmp_path}")
    assert code == ExitCode.user_error
    assert says in line
    assert content(tmp_path) == before


def test_folder_that_is_no_run_is_refused_and_kept(one_line, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    code, line = one_line("model=v4_tiny", f"run_dir={tmp_path}")
    assert (code, "is no run folder: it holds thesis.tex" in line) == (2, True)
    assert content(tmp_path) == {str(tmp_path / "thesis.tex"): b"years of work"}


def test_folder_with_a_damaged_config_is_refused_and_kept(one_line, tmp_path):
    folder_with_a_run(tmp_path, "model=v4_tiny")
    (tmp_path / "config.yaml").write_text("model: [unclosed")
    before = content(tmp_path)
    code, line = one_line("model=v4_tiny", f"run_dir={tmp_path}")
    assert (code, "config.yaml cannot be read" in line) == (2, True)
    assert content(tmp_path) == before


def test_folder_that_cannot_be_written_is_named(one_line, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    code, line = one_line("model=v4_tiny", f"run_dir={file}/run")
    assert (code, f"{file} is a file" in line) == (2, True)
    code, line = one_line("model=v4_tiny", "run_dir=/proc/run")
    assert (code, "run_dir=/proc/run cannot be written" in line) == (2, True)


def test_empty_run_dir_is_refused(one_line):
    code, line = one_line("model=v4_tiny", "run_dir=")
    assert (code, "run_dir" in line) == (2, True)


# ---- files of the data section ------------------------------------------------------------------
def source(kind: str, path: Path) -> list[str]:
    return [f"+data.sources.mine.kind={kind}", f"+data.sources.mine.path={path}"]


def good_source() -> list[str]:
    """A real text that every machine has, small enough to prepare at once."""
    return [*source("text", Path(argparse.__file__)), "data.sources.mine.unit=paragraph"]


FILES = [
    ("text that is absent", lambda p: source("text", p / "none.txt"), "none.txt"),
    ("text that is empty", lambda p: source("text", p / "empty.txt"), "empty"),
    ("json that is none", lambda p: source("jsonl", p / "bad.jsonl"), "bad.jsonl"),
    ("store that is absent", lambda p: source("store", p / "store"), "store"),
    ("store that is damaged", lambda p: source("store", p / "broken_store"), "broken_store"),
    ("tokenizer that is absent", lambda p: [f"data.tokenizer={p}/none.json"], "none.json"),
    ("tokenizer that is none", lambda p: [f"data.tokenizer={p}/bad.json"], "bad.json"),
    ("tokenizer larger than the model", lambda p: [*good_source(), "data.vocab_size=600"], "600"),
    ("init_from that is absent", lambda p: [*good_source(), f"init_from={p}/nowhere"], "nowhere"),
]


@pytest.mark.parametrize(("what", "args", "says"), FILES, ids=[case[0] for case in FILES])
def test_bad_file_is_one_line(what, args, says, one_line, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "broken_store").mkdir()
    (tmp_path / "broken_store" / "manifest.json").write_text("{")
    before, folder = content(tmp_path), tmp_path / "run"
    code, line = one_line(
        "model=v4_tiny", *args(tmp_path), f"run_dir={folder}", f"data.cache_dir={tmp_path}/cache"
    )
    assert code == ExitCode.user_error
    assert says in line
    assert {k: v for k, v in content(tmp_path).items() if k in before} == before
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_one_file_as_one_document_is_refused_unread_and_with_all_else(streaming, tmp_path, capsys):
    book = tmp_path / "book.txt"
    book.write_bytes(b"\xff" * 4096)  # no text: whoever reads it says so
    given = [
        "model=v4_tiny", "data=text", f"data.sources.text.path={book}", "init_from=nowhere",
        f"data.sources.text.streaming={streaming}", "data.sources.text.weight=1",
        f"run_dir={tmp_path}/run", f"data.cache_dir={tmp_path}/cache",
    ]  # fmt: skip
    assert cli(given) == ExitCode.user_error
    told = capsys.readouterr().err
    assert "unit=document: of one document nothing can be held out" in told
    assert "data.sources.text.unit=paragraph divides it" in told
    assert "init_from=nowhere" in told
    assert "UTF-8" not in told
    cli([*given, "data.validation.bytes=0"])
    assert "held out" not in capsys.readouterr().err


# ---- what others raise ---------------------------------------------------------------------------
def test_weights_and_biases_refusals_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no stored key either
    short = ["model=v4_tiny", "train.steps=1", "data.tokenizer=byte", "data=bytes"]
    for given, words in (
        (["wandb.mode=offline", "wandb.project=a/b"], "Invalid project name 'a/b'"),
        (["wandb.mode=online"], "there is no key"),
    ):
        monkeypatch.setenv("WANDB_MODE", "online")  # the config decides
        assert cli([*short, *given, f"run_dir={tmp_path}/run"]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("error: wandb.mode=")
        assert words in line


def test_names_longer_than_a_file_system_takes_are_one_line(tmp_path, capsys):
    assert cli(["model=v4_tiny", f"run_dir={tmp_path}/{'x' * 300}"]) == 2
    assert "cannot be written: [Errno 36] File name too long" in capsys.readouterr().err


def test_refused_run_leaves_no_folder(tmp_path):
    args = ["model=v4_tiny", "data.sources.mine.kind=text", "data.sources.mine.path=nowhere"]
    assert cli([*args, f"run_dir={tmp_path}/a/b/c"]) == 2
    assert os.listdir(tmp_path) == []


# ---- as a real process ---------------------------------------------------------------------------
@pytest.mark.parametrize("arg", ["modle=v4_nano", "train.steps=abc", "experiment=nope"])
def test_process_prints_one_line_and_leaves_with_2(arg, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "train" / "pretrain.py", arg],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


LAUNCHED = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 says that this is one of several processes, but RANK"),
        ({"RANK": "1"}, "RANK=1 says that this is one of several processes, but LOCAL_RANK"),
        ({**LAUNCHED, "RANK": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is no number"),
    ],
)
def test_variables_of_a_launcher_that_did_not_start_this_are_refused(
    given, words, capsys, monkeypatch
):
    for name in LAUNCHED:  # what a test of DeepSpeed in this process may have set
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert cli(["model=v4_tiny"]) == 2
    assert words in capsys.readouterr().err


def test_other_rank_leaves_the_word_to_rank_0_and_speaks_only_after_a_wait(capsys, monkeypatch):
    """torchrun ends it during the wait, once rank 0 has left (tests/parallel/test_torchrun.py)."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert cli(["modle=v4_nano"]) == 2
    assert waits == [PATIENCE]
    assert capsys.readouterr().err.startswith("error: rank 1: ")


# ---- shards of rows -----------------------------------------------------------------------------
SHARDED_MODEL = [
    "model=v4_tiny", "train.device=cpu", "train.precision=fp32", "train.micro_batch_size=1",
]  # fmt: skip
# (what, processes, arguments, what the line must say); by torchrun in tests/parallel, slow
SHARDS = [
    ("row that shards do not divide", 3, ["parallel.cp=3", "train.seq_len=128"],
     "seq_len=128 must be a multiple of cp=3, its shards"),
    ("stage's row that shards do not divide", 4,
     ["parallel.dp_shard=4", "train.stages=[{until_tokens: 8190, seq_len: 126, cp: 4,"
      " global_batch_tokens: 504}]"], "train.stages[0]: seq_len=126 must be a multiple of cp=4"),
    ("shards that do not divide the ranks", 4,
     ["parallel.dp_shard=4", "train.stages=[{until_tokens: 8192, cp: 3, seq_len: 96,"
      " global_batch_tokens: 768}]"],
     "train.stages[0] needs cp=3 (rows of 96 tokens in 3 shards), which must divide the"
     " parallel.dp_shard=4 * parallel.cp=1 ranks"),
    ("ranks that are not there", 2, ["parallel.cp=4"], "parallel.cp=4"),
    ("no shard at all", 2, ["parallel.cp=0"], "parallel.cp=0 must be 1 or more"),
    ("no shard at all, in a stage", 2,
     ["parallel.dp_shard=2", "train.stages=[{until_tokens: 8192, cp: 0}]"],
     "train.stages[0].cp=0 must be 1 or more"),
    ("half a shard", 2, ["parallel.cp=1.5"], "parallel.cp"),
    ("experts over ranks that are not there", 2, ["parallel.cp=2", "parallel.ep=3"],
     "parallel.ep=3 must divide the 2 data ranks"),
    ("a whole step as one graph", 2,
     ["parallel.cp=2", "train.compile=true", "model.kernels=reference"],
     "parallel.cp=2 exchanges between ranks"),
    ("a layer that needs whole rows", 2,
     ["parallel.cp=2", "sample.tokens=0", "model.num_hidden_layers=2",
      "model.layer_kinds=[csa,mha]", "model.compress_ratios=[4,0,0]"],
     "layer 1 of model.attention=hybrid is mha"),
    ("another engine", 2, ["parallel.cp=2", "engine=deepspeed"],
     "parallel.cp=2 does not go with engine.name=deepspeed"),
    ("another engine, in a stage", 2,
     ["engine=deepspeed", "parallel.dp_shard=2", "train.stages=[{until_tokens: 8192, cp: 2}]"],
     "train.stages[0].cp=2 does not go with engine.name=deepspeed"),
    ("halves that are no tokens", 2,
     ["parallel.cp=2", "parallel.cp_scoring=balanced", "train.seq_len=126",
      "train.global_batch_tokens=504"], "seq_len=126 must be a multiple of 2 * cp=4"),
    ("scores that are not shared", 2,
     ["parallel.cp=2", "parallel.cp_scoring=balanced", "model.attention=hca"],
     "has no layer of kind csa"),
    ("scores that nobody takes", 2,
     ["parallel.cp=2", "parallel.cp_scoring=balanced", "train.indexer_phase=full"],
     "needs a stage with cp above 1 whose indexer chooses"),
    ("fewer rows than ranks that share one", 4,
     ["parallel.dp_shard=2", "parallel.cp=2", "train.seq_len=128", "train.global_batch_tokens=128"],
     "train.global_batch_tokens=128"),
]  # fmt: skip


def launched(monkeypatch, processes):
    """As if rank 0 of so many, which never speak to each other: a refusal comes before that."""
    for name, value in {**LAUNCHED, "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", str(processes))


@pytest.mark.parametrize(
    ("what", "processes", "args", "says"), SHARDS, ids=[case[0] for case in SHARDS]
)
def test_shards_that_cannot_be_are_one_line(
    what, processes, args, says, one_line, tmp_path, monkeypatch
):
    launched(monkeypatch, processes)
    folder = tmp_path / "run"
    code, line = one_line(*SHARDED_MODEL, f"run_dir={folder}", *args)
    assert code == ExitCode.user_error
    assert says in line
    assert not folder.exists()


@pytest.mark.parametrize(
    ("kernels", "kind"), [("auto", "hybrid"), ("reference", "hybrid"), ("auto", "dense")]
)
def test_shards_shorter_than_what_is_read_before_them_are_no_bad_input(kernels, kind, monkeypatch):
    """8 tokens of 64 a rank, windows of 16: what a rank reads before its shard spans several."""
    launched(monkeypatch, 8)
    run = compose_run(
        ["model=v4_tiny", "train.device=cpu", "train.precision=fp32", "parallel.cp=8",
         "train.seq_len=64", f"model.kernels={kernels}", f"model.attention={kind}"]
    )  # fmt: skip
    assert run.model.sliding_window > run.train.seq_len // run.parallel.cp
    check_run(run, files=False)
