"""Sweeps: keys of named items can be swept, names fit file systems, refused ones leave nothing."""

import os
import re

import pytest
from hydra.core.config_store import ConfigStore

from train.config import sweep
from train.config.command_line import normalise, parse
from train.config.sweep import folder_name, swept
from train.errors import UserError
from train.pretrain import _check_sweep, cli


def jobs(args):
    """Overrides of each job, as Hydra's own sweeper makes them of the swept ones."""
    asked = normalise(args)
    [dicts] = [o for o in parse(asked) if o.is_sweep_override()]
    key = dicts.get_key_element()
    return [swept([f"{key}={text}"], asked) for text in dicts.sweep_string_iterator()]


def test_keys_of_a_named_item_are_swept_and_name_their_jobs():
    args = ["-m", "data.sources.x.kind=text", "data.sources.x.path=a,b"]
    assert jobs(args) == [["data.sources.x.path=a"], ["data.sources.x.path=b"]]
    args = ["-m", "data.sources.x.weight=0.1,0.2", "data.sources.y.weight=0.9,0.8"]
    assert len(jobs(args)) == 4
    assert jobs(args)[1] == ["data.sources.x.weight=0.1", "data.sources.y.weight=0.8"]


def test_long_names_are_cut_and_stay_apart():
    names = {folder_name([f"data.sources.x.path={'/very/long' * 40}{n}"]) for n in range(3)}
    assert len(names) == 3
    assert all(len(name.encode()) <= 200 and "/" not in name for name in names)
    assert folder_name(["optim.lr=0.1", "seed=1"]) == "optim.lr=0.1,seed=1"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["hydra.nope=1"], "unknown config key hydra.nope"),
        (["hydra.launcher=nope"], "hydra.launcher=nope: .* give hydra/launcher=NAME"),
        (["hydra/launcher=nope"], "hydra/launcher=nope: Hydra has no such file"),
        (["hydra.run.dir=/proc/x"], "hydra.run.dir or hydra.sweep.dir: .*/proc/x"),
        (["-m", "hydra.sweep.dir=null", "seed=0,1"], "hydra.sweep.dir=null: "),
        (["--config-name", "nope"], "--config-name nope: there is no such file"),
        (["--config-dir", "/nope"], "--config-dir /nope: there is no such folder"),
        (["--config-path", "/nope"], "--config-path: there is no such folder"),
        (["-m", "seed=interval(0,3)"], "seed=interval.0,3.: no list of values"),
        (["-m", "model=glob(none_*)"], r"model=glob\(none_\*\): there is no such value"),
        (["-m", "optim.lr=glob(v4_*)"], r"optim.lr=glob\(v4_\*\): .* files of a group"),
        (
            ["-m", "hydra/sweeper=own", "data.sources.x.weight=interval(0,1)"],
            r"data.sources.x.weight=interval\(0,1\): .* no range",
        ),
    ],
)
def test_what_hydra_cannot_read_is_one_line_in_our_words(
    words, says, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli(["model=v4_tiny", "run_dir=x", *words]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: {says}.*\n", error)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("key", ["data.sources.x.path", "optim.lr"])
def test_several_values_without_m_are_refused_in_one_line(key, capsys):
    assert cli(["model=v4_tiny", f"{key}=1,2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_every_job_is_checked_before_the_first_trains(tmp_path, monkeypatch, capsys):
    """Ranges, what holds across keys, and files that are not there; each names job and key."""
    monkeypatch.chdir(tmp_path)
    words = ["-m", "model=v4_tiny", "train.device=cpu", "run_dir=study", "seed=0,1"]
    assert cli([*words, "optim.lr=1e-3,-1"]) == 2
    told = capsys.readouterr().err
    assert re.fullmatch(
        r"error: job 1 \(seed=0, optim.lr=-1\) and 1 more: optim.lr=-1\S* must .*\n", told
    )
    assert cli([*words[:-1], "data=text", "data.sources.text.path=here.txt", "seed=0,1",
                "train.micro_batch_size=8,3"]) == 2  # fmt: skip
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("error: data.sources.text.path=here.txt") for line in lines)
    assert any("job 1 (seed=0, train.micro_batch_size=3) and 1 more" in line for line in lines)
    assert os.listdir(tmp_path) == []


def test_glob_means_the_files_of_a_group():
    args = normalise(["-m", "model=glob(v4_m*,exclude=v4_medium)", "seed=0"])
    assert sweep.jobs(args) == [["model=v4_micro", "seed=0"], ["model=v4_mini", "seed=0"]]


def test_a_range_is_left_to_a_sweeper_that_is_named():
    args = ["-m", "hydra/sweeper=own", "optim.lr=interval(1e-4,1e-2)"]
    assert normalise(args)[-1] == args[-1]
    assert sweep.jobs(normalise(args)) == []


def test_jobs_of_another_machine_are_not_measured_by_this_one(tmp_path, monkeypatch):
    """A login node: no CUDA device, and less memory than the nodes. What is wrong anywhere is."""
    monkeypatch.chdir(tmp_path)
    own = {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"}
    ConfigStore.instance().store(group="hydra/launcher", name="elsewhere", node=own)
    monkeypatch.setattr("train.preflight.world.torch.cuda.is_available", lambda: False)
    words = ["-m", "model=v4_tiny", "train.device=cuda", "seed=0,1", "run_dir=study"]
    with pytest.raises(UserError, match=r"train\.device=cuda"):
        _check_sweep(normalise(words))
    elsewhere = normalise([*words, "hydra/launcher=elsewhere"])
    _check_sweep(elsewhere)
    with pytest.raises(UserError, match="profile_start"):
        _check_sweep([*elsewhere, "train.profile_steps=1", "train.profile_start=1000000"])


def test_refused_sweep_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (["optim.lr=-1,-2"], ["optim.lr=1,abc"], ["data.sources.x.path=a,b"]):
        assert cli(["-m", "model=v4_tiny", "run_dir=study", *words]) == 2
        assert os.listdir(tmp_path) == []
