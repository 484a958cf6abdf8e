"""Checkpoints are complete or absent: any damage is found and named, and the newest whole one is
used.

Oracle: the tensors themselves, bit for bit.
"""

import logging
import random
import shutil

import pytest
import torch

from train import checkpoint
from train.checkpoint import Checkpoints, DamagedCheckpointError
from train.errors import UserError

STATE = {"tokens": 96, "loader": {"epoch": 0, "pool": 1, "row": 3}, "skipped_steps": 0}


def tensors(seed):
    g = torch.Generator().manual_seed(seed)
    return {
        "model.embed.weight": torch.randn(11, 3, generator=g),
        "model.gate.tid2eid": torch.randint(0, 9, (5, 2), generator=g),
        "optim.embed.weight.exp_avg": torch.randn(11, 3, generator=g).bfloat16(),
        "optim.embed.weight.step": torch.tensor(7),
    }


def empty_like(values):
    return {name: torch.zeros_like(value) for name, value in values.items()}


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


@pytest.fixture
def run(tmp_path):
    out = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    for step in (1, 2):
        out.save(step, tensors(step), STATE)
    return out


@pytest.mark.core
def test_checkpoint_round_trip_is_bitwise(run):
    target = empty_like(tensors(2))
    state = checkpoint.read(run.path(2), target)
    assert same(target, tensors(2))
    assert state == {**STATE, "step": 2}


def test_checkpoint_names_and_retention(run):
    run.save(30, tensors(3), STATE)
    assert [p.name for p in run.folder.iterdir() if p.name.startswith("step")] == [
        p.name for p in run.folder.iterdir()
    ]
    assert [p.name for p in run.published()] == ["step_00000002", "step_00000030"]


def truncate(folder):
    path = next(folder.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-1])


def flip(name):
    def damage(folder):
        path = next(folder.glob(name))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    return damage


def delete(name):
    return lambda folder: next(folder.glob(name)).unlink()


def empty_manifest(folder):
    (folder / "manifest.json").write_bytes(b"")


def swap_with_older(folder):
    shutil.copy(folder.parent / "step_00000001" / "__0_0.distcp", folder / "__0_0.distcp")


def other_step(folder):
    older = folder.parent / "step_00000001"
    shutil.rmtree(folder)
    shutil.copytree(older, folder)


DAMAGES = {
    "truncated shard": (truncate, "__0_0.distcp has"),
    "flipped shard": (flip("*.distcp"), "__0_0.distcp has sha256"),
    "flipped index": (flip(".metadata"), ".metadata has sha256"),
    "flipped state": (flip("state.json"), "state.json has sha256"),
    "flipped manifest": (flip("manifest.json"), "manifest.json"),
    "no shard": (delete("*.distcp"), "__0_0.distcp is missing"),
    "no index": (delete(".metadata"), ".metadata is missing"),
    "no manifest": (delete("manifest.json"), "manifest.json is missing"),
    "empty manifest": (empty_manifest, "manifest.json (0 bytes)"),
    "shard of another step": (swap_with_older, "__0_0.distcp has"),
    "folder of another step": (other_step, "its manifest is of step 1"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_passed_over(run, caplog, name):
    damage, words = DAMAGES[name]
    damage(run.path(2))
    with pytest.raises(DamagedCheckpointError, match="step_00000002") as error:
        checkpoint.read(run.path(2), empty_like(tensors(2)))
    assert words in str(error.value)
    with caplog.at_level(logging.WARNING):
        assert run.newest_good() == run.path(1)
    assert words in caplog.text


@pytest.mark.core
def test_random_damage_is_never_loaded(run, tmp_path):
    rng = random.Random(0)
    for trial in range(60):
        folder = tmp_path / f"step_{2:08d}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(run.path(2), folder)
        path = rng.choice(sorted(folder.iterdir()))
        data = bytearray(path.read_bytes())
        at = rng.randrange(len(data))
        if trial % 3 == 0:
            del data[at]
        elif trial % 3 == 1:
            data[at] ^= 1 << rng.randrange(8)
        else:
            data.insert(at, rng.randrange(256))
        path.write_bytes(data)
        with pytest.raises(DamagedCheckpointError):
            checkpoint.verify(folder)


def test_nothing_is_unpickled_before_the_manifest_verifies(run, monkeypatch):
    flip(".metadata")(run.path(2))

    def unpickled(*_):
        raise AssertionError("the index was read from a folder that does not verify")

    monkeypatch.setattr(checkpoint.dcp.FileSystemReader, "read_metadata", unpickled)
    with pytest.raises(DamagedCheckpointError):
        checkpoint.read(run.path(2), empty_like(tensors(2)))


def test_kill_inside_a_save_leaves_the_older_one(run, monkeypatch):
    """The same call that publishes is cut before its rename, as by a SIGKILL: nothing is cleaned
    up."""
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *a, **k: None)
    monkeypatch.setattr(
        Checkpoints, "_publish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        run.save(3, tensors(3), STATE)
    monkeypatch.undo()
    assert (run.folder / ".writing_step_00000003").is_dir()
    assert run.newest_good() == run.path(2)
    run.clean()
    assert not (run.folder / ".writing_step_00000003").exists()
    assert run.save(3, tensors(3), STATE) == run.newest_good()


def test_failed_save_leaves_the_older_ones_untouched(run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_fsync", full)
    with pytest.raises(OSError, match="No space"):
        run.save(3, tensors(3), STATE)
    assert [p.name for p in run.folder.iterdir()] == ["step_00000001", "step_00000002"]
    assert run.newest_good() == run.path(2)


def test_damaged_folder_of_the_same_step_is_moved_aside(run):
    truncate(run.path(2))
    run.save(2, tensors(5), STATE)
    target = empty_like(tensors(5))
    checkpoint.read(run.path(2), target)
    assert same(target, tensors(5))
    assert (run.folder / "damaged_step_00000002").is_dir()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.gate.tid2eid"), "model.gate.tid2eid is not in this run"),
        (lambda t: t.update({"model.x": torch.zeros(1)}), "model.x is not in it"),
        (
            lambda t: t.update({"model.embed.weight": torch.zeros(12, 3)}),
            r"\[11, 3\] there and \[12, 3\]",
        ),
    ],
)
def test_checkpoint_of_another_model_is_refused(run, change, words):
    target = empty_like(tensors(2))
    change(target)
    with pytest.raises(UserError, match=words):
        checkpoint.read(run.path(2), target)


def test_part_of_a_checkpoint_can_be_loaded(run):
    target = {"model.embed.weight": torch.zeros(11, 3)}
    checkpoint.read(run.path(2), target, partial=True)
    assert torch.equal(target["model.embed.weight"], tensors(2)["model.embed.weight"])


def test_locate_takes_runs_and_checkpoints(run, tmp_path):
    assert checkpoint.locate(str(run.path(1))) == run.path(1)
    assert checkpoint.locate(str(tmp_path)) == run.path(2)
    with pytest.raises(UserError, match=r"init_from=.*no complete checkpoint"):
        checkpoint.locate(str(tmp_path / "nowhere"))
