"""The recipes run as typed, one after the other, in a folder of their own; steps are fewer.

Ranks are forked with the variables that torchrun sets: README's line runs under torchrun itself.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from scripts.__main__ import main
from tests.forked import run_ranks
from tests.helpers import ROOT

GUIDE = ROOT / "docs" / "guide" / "recipes.md"
SHORT = ["train.eval_tokens=512", "sample.tokens=0", "train.device=cpu"]


def commands():
    blocks = re.findall(r"```\w*\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def cache():
    """Absolute: a relative one is of the repository."""
    return str(Path.cwd() / "cache")


def shortened(words):
    """Two steps, or two beyond those of the run that goes on."""
    steps = next((w for w in words if w.startswith("train.steps=")), None)
    staged = any(w.startswith("train.stages=") for w in words)
    more = [] if staged else ["train.steps=4" if steps else "train.steps=2"]
    words = [w.replace("until_tokens: 5120", "until_tokens: 512") for w in words if w != steps]
    words = [w.replace("until_tokens: 10240", "until_tokens: 1024") for w in words]
    return [*words, *more, *SHORT, f"data.cache_dir={cache()}"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where all recipes have run; a folder that looks like a clone's."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "docs").symlink_to(ROOT / "docs")
    (folder / "train").symlink_to(ROOT / "train")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in commands():
            program, *rest = words
            if program == "cp":
                shutil.copytree(rest[1], rest[2])
            elif program == "torchrun":
                option, ranks, entry, *rest = rest
                assert (option, entry) == ("--nproc-per-node", "train/pretrain.py")
                for done in run_ranks(["pretrain", *shortened(rest)], int(ranks), folder):
                    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
            elif rest[0] == "pretrain":
                assert main(["pretrain", *shortened(rest[1:])]) == 0, rest
            else:
                assert main([*rest, "--cache-dir", cache()]) == 0, rest
    return folder


def receipt(place, name):
    return json.loads((place / "runs" / name / "receipt.json").read_text())


def test_every_recipe_ends_in_a_finished_run(place):
    names = {w.split("/")[1] for words in commands() for w in words if w.startswith("run_dir=runs")}
    assert len(names) == 6
    for name in names:
        assert receipt(place, name)["finished"], name


def test_what_each_asks_for_took_place(place):
    def config(name):
        return (place / "runs" / name / "config.yaml").read_text()

    def tokenizer(name):
        return (place / "runs" / name / "tokenizer.json").read_text()

    assert "recipe: fp4_qat" in config("quantised")
    assert tokenizer("quantised") == tokenizer("base")
    lines = (place / "runs" / "two_phases" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == ["plain", "fp4"]
    assert "  seq_len: 256" in config("long_rows")
    assert receipt(place, "moved")["progress"]["step"] == 4
    assert receipt(place, "base")["progress"]["step"] == 2


def test_the_folder_of_the_first_run_refuses_and_names_the_recipe(place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    for change in ("quant=fp4_qat", "train.seq_len=256 train.micro_batch_size=2"):
        words = [*shortened(commands()[0][2:]), *change.split()]
        assert main(["pretrain", *words]) == 2
        (line,) = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error:")]
        assert "init_from=runs/base goes on from the weights" in line
