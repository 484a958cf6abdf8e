"""Sweeps: keys of named items can be swept, names fit file systems, refused ones leave nothing."""

import os

import pytest

from train.config.command_line import normalise, parse
from train.config.sweep import folder_name, swept
from train.pretrain import cli


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


@pytest.mark.parametrize("key", ["data.sources.x.path", "optim.lr"])
def test_several_values_without_m_are_refused_in_one_line(key, capsys):
    assert cli(["model=v4_tiny", f"{key}=1,2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_refused_sweep_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in (["optim.lr=-1,-2"], ["optim.lr=1,abc"], ["data.sources.x.path=a,b"]):
        assert cli(["-m", "model=v4_tiny", "run_dir=study", *words]) == 2
        assert os.listdir(tmp_path) == []
