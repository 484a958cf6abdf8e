"""``scripts/checkpoints.py``: what it says and with which exit code it leaves."""

import re
import sys

import pytest
import torch

import scripts.checkpoints
from scripts.checkpoints import main
from train.checkpoint.hold import Hold
from train.checkpoint.manager import Checkpoints
from train.checkpoint.retention import remove
from train.run_folder import lock as folder_lock
from train.run_folder.lock import owned


def tensors(step):
    return {"model.a": torch.full((4, 3), float(step)), "optim.a.step": torch.tensor(step)}


@pytest.fixture
def run(tmp_path):
    """Steps 10 to 40; the lowest validation loss is at 20."""
    saves = Checkpoints(tmp_path / "run" / "checkpoints")
    for step, loss in ((10, 3.0), (20, 1.0), (30, None), (40, 2.0)):
        state = {"progress": {"tokens": 64 * step}, "loader": {"row": step}, "val_loss": loss}
        saves.save(step, tensors(step), state)
    return saves


def damage(run, step, name="__0_0.distcp"):
    path = run.path(step) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_list_has_a_line_each(run, tmp_path, capsys):
    damage(run, 30, "manifest.json")
    assert main(["list", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["10", "20", "30", "40"]
    assert re.match(r"\s+20\s+1,280\s+0\.0\s+1\.0000\s+.*step_00000020$", lines[1])
    assert "damaged" in lines[2]
    assert "manifest.json" in lines[2]


def test_verify_names_the_damage_and_leaves_with_1(run, tmp_path, capsys):
    assert main(["verify", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count("whole ") == 4
    damage(run, 20)
    assert main(["verify", str(tmp_path / "run"), str(run.path(10))]) == 1
    out = capsys.readouterr().out
    assert out.count("whole ") == 4
    assert "DAMAGED" in out
    assert "step_00000020: file __0_0.distcp has sha256" in out


def test_show_takes_the_newest_whole_one(run, tmp_path, capsys):
    damage(run, 40)
    assert main(["show", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "step_00000030" in out
    assert "loader.row = 30" in out
    assert re.search(r"model\.a\s+float32\s+\[4, 3\]\s+norm 103\.923", out)
    assert "2 tensors" in out
    assert main(["show", str(run.path(40))]) == 1
    assert "step_00000040: file __0_0.distcp has sha256" in capsys.readouterr().err


def test_compare_names_what_differs_and_by_how_much(run, capsys):
    first, second = str(run.path(10)), str(run.path(20))
    assert main(["compare", first, first]) == 0
    assert "2 tensors in both: every bit is the same" in capsys.readouterr().out
    assert main(["compare", first, second]) == 1
    out = capsys.readouterr().out
    assert "state loader.row: 10 | 20" in out
    assert "model.a: max difference 10, relative 0.5, 12 of 12 elements" in out
    assert main(["compare", first, second, "--only", "optim."]) == 1
    out = capsys.readouterr().out
    assert "model.a" not in out
    assert "1 tensors in both: 1 differences" in out


def test_compare_of_other_names_and_shapes(run, tmp_path, capsys):
    other = Checkpoints(tmp_path / "other")
    other.save(10, {"model.a": torch.zeros(2), "model.b": torch.zeros(1)}, {})
    assert main(["compare", str(run.path(10)), str(other.path(10)), "--only", "model."]) == 1
    out = capsys.readouterr().out
    assert "model.b: only in b" in out
    assert "model.a: float32 [4, 3] | float32 [2]" in out


def test_prune_says_what_it_would_do_and_then_does_it(run, tmp_path, capsys):
    damage(run, 30)
    words = ["prune", str(tmp_path / "run"), "--last", "1", "--best", "1"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "left alone: checkpoint" in out
    assert f"would remove {run.path(10)}" in out
    assert len(run.published()) == 4
    assert main([*words, "--yes"]) == 0
    assert [p.name[-2:] for p in run.published()] == ["20", "30", "40"]


def test_prune_is_refused_where_a_run_trains(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(folder_lock, "_PATIENCE", 0.0)
    words = ["prune", str(tmp_path / "run"), "--last", "1"]
    with owned(tmp_path / "run"):
        assert main([*words, "--yes"]) == 2
        assert "is in use by process" in capsys.readouterr().err
        assert main(words) == 0, "looking is allowed"
    assert len(run.published()) == 4


def test_prune_leaves_what_is_being_read(run, tmp_path, capsys):
    with Hold(run.path(20)):
        assert main(["prune", str(run.folder), "--last", "1", "--yes"]) == 0
    out = capsys.readouterr().out
    assert f"being read, stays: {run.path(20)}" in out
    assert "2 whole checkpoints stay" in out
    assert [p.name[-2:] for p in run.published()] == ["20", "40"]


@pytest.mark.parametrize("command", ["list", "verify"])
def test_checkpoint_that_a_run_prunes_meanwhile_is_not_called_damaged(
    run, tmp_path, capsys, monkeypatch, command
):
    found = scripts.checkpoints.checkpoints_of

    def vanishing(folder):
        paths = found(folder)
        remove(paths[0])
        return paths

    monkeypatch.setattr(scripts.checkpoints, "checkpoints_of", vanishing)
    assert main([command, str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "damaged" not in out.lower()
    assert "step_00000010" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list", "{}/nowhere"], "is no checkpoint and holds none"),
        (["show", "{}/nowhere"], "holds no complete checkpoint"),
        (["prune", "{}/run", "--last", "0"], "--last 0 must be 1 or more"),
        (["show", "{}/run", "--only", "nothing"], "--only nothing: no tensor of"),
    ],
)
def test_input_that_cannot_be_is_one_line(run, tmp_path, capsys, words, message):
    assert main([word.format(tmp_path) for word in words]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert out == "", "a head without a table"


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("list", "verify", "show", "compare", "prune", "Exit codes"))
    assert str(sys.path[0]) not in out
