"""A finished run that is started again says so at once, and names what would let it go on."""

import logging
import os
import re
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from omegaconf import OmegaConf

import train.build
from tests.helpers import run_distributed
from tests.integration.small_run import final_tensors, small_run, write_corpus
from train.config.load import dump
from train.config.schema import StageConfig
from train.errors import ExitCode, UserError
from train.pretrain import main


@pytest.fixture
def start(tmp_path, caplog, monkeypatch):
    """Start a run in one folder; gives whether a model was made, and what was said."""
    corpus = write_corpus(tmp_path)
    real = train.build.build_model

    def run(steps=2, prompt="the", into="run", init_from="", dry_run=False, **more):
        made = []
        monkeypatch.setattr(train.build, "build_model", lambda *a: made.append(a) or real(*a))
        run = small_run(tmp_path / into, corpus, steps=steps, **more)
        run.init_from, run.dry_run = init_from, dry_run
        run.sample.prompt = prompt
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert main(OmegaConf.create(dump(run))) == ExitCode.finished
        return bool(made), caplog.text

    return run


def test_the_same_command_says_so_and_makes_nothing(start, tmp_path):
    start()
    receipt = (tmp_path / "run" / "receipt.json").read_bytes()
    began = time.perf_counter()
    made, said = start()
    assert not made
    assert time.perf_counter() - began < 5
    assert re.search(
        r"run_dir=\S+ is finished: step 2 of 2, .*bits_per_byte \d.* train\.steps above 2", said
    )
    assert (tmp_path / "run" / "receipt.json").read_bytes() == receipt


def test_a_dry_run_of_a_finished_run_says_so(start, tmp_path):
    start()
    made, said = start(dry_run=True)
    assert not made
    assert "is finished: step 2 of 2" in said
    assert "evaluated once more" not in said
    assert "nothing was trained" not in said
    made, said = start(dry_run=True, steps=3)
    assert not made
    assert "is finished" not in said
    assert "dry_run=true: nothing was trained" in said


def _dry_run(rank, world_size, text):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    assert main(OmegaConf.create(text)) == ExitCode.finished
    # One that took no part would meet the collectives of the others here.
    dist.barrier()


def test_all_ranks_take_part_in_a_dry_run(start, tmp_path):
    run = small_run(tmp_path / "run", tmp_path / "corpus.jsonl", steps=2)
    run.dry_run, run.parallel.dp_shard = True, 2
    run_distributed(_dry_run, 2, dump(run))


def test_the_key_that_it_names_goes_on(start, tmp_path):
    start()
    made, said = start(steps=3)
    assert made
    assert "is finished" not in said
    assert "resuming after step 2" in said
    assert "step 3/3" in said


def test_a_run_of_stages_names_what_goes_on_elsewhere(start, tmp_path):
    """Its plan is part of what it is: no later end is taken in its folder."""
    stages = [StageConfig(name="a", until_tokens=192), StageConfig(name="b", until_tokens=384)]
    start(steps=0, stages=stages)
    _, said = start(steps=0, stages=stages)
    assert f"init_from={tmp_path / 'run'} with stages of its own" in said
    longer = [stages[0], StageConfig(name="b", until_tokens=576)]
    with pytest.raises(UserError, match="another run_dir"):
        start(steps=0, stages=longer)
    made, said = start(steps=0, stages=longer, into="other", init_from=str(tmp_path / "run"))
    assert made
    assert "step 3/3" in said


def test_what_is_asked_for_anew_is_done(start, tmp_path):
    start()
    before = (tmp_path / "run" / "sample.txt").read_text()
    made, said = start(prompt="of")
    assert made
    assert "is finished" in said
    assert "sample.prompt changed" in said
    assert (tmp_path / "run" / "sample.txt").read_text() != before


@pytest.mark.parametrize("harm", ["receipt", "checkpoint"])
def test_results_or_weights_that_are_gone_are_made_again(start, tmp_path, harm):
    """A run killed in its last evaluation is not finished, nor is one of damaged weights."""
    start(checkpoint_every=1)
    folder = tmp_path / "run"
    if harm == "receipt":
        (folder / "receipt.json").unlink()
    else:
        (victim,) = Path(folder / "checkpoints" / "step_00000002").glob("*.distcp")
        victim.write_bytes(victim.read_bytes()[:-1])
    made, said = start(checkpoint_every=1)
    assert made
    assert "is finished" not in said
    assert (folder / "receipt.json").is_file()
    assert final_tensors(small_run(folder, tmp_path / "corpus.jsonl"))


def test_dry_run_checks_all_and_leaves_nothing(start, tmp_path, caplog):
    corpus = tmp_path / "corpus.jsonl"
    run = small_run(tmp_path / "a" / "run", corpus, steps=2)
    run.dry_run = True
    with caplog.at_level(logging.INFO):
        assert main(OmegaConf.create(dump(run))) == ExitCode.finished
    assert not (tmp_path / "a").exists()
    assert "parameters" in caplog.text
    assert "training tokens" in caplog.text
    assert "step 1/2" not in caplog.text
