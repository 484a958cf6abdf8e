"""Checkpoints are complete or absent: any damage is found and named, and the newest whole one is
used.

Oracle: the tensors themselves, bit for bit.
"""

import contextlib
import logging
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.train.checkpoint.folders import locate, newest_good
from train.checkpoint import reader as checkpoint_reader
from train.checkpoint import retention as checkpoint_retention
from train.checkpoint import writer as checkpoint_writer
from train.checkpoint.files import DamagedCheckpointError, step_of
from train.checkpoint.manager import CheckpointFailedError, Checkpoints
from train.checkpoint.retention import Retention
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
    out = Checkpoints(tmp_path / "checkpoints", Retention(last=2))
    for step in (1, 2):
        out.save(step, tensors(step), STATE)
    return out


@pytest.mark.core
def test_checkpoint_round_trip_is_bitwise(run):
    target = empty_like(tensors(2))
    state = checkpoint_reader.read(run.path(2), target)
    assert same(target, tensors(2))
    assert state == {**STATE, "step": 2}


def test_saved_checkpoint_is_found_after_a_loss_of_power(tmp_path, monkeypatch):
    """Every folder on the way to it has its name on the disk, the new ones too."""
    synced, fsync = set(), os.fsync

    def note(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    saved = Checkpoints(tmp_path / "checkpoints").save(1, tensors(1), STATE)
    assert {path.stat().st_ino for path in (tmp_path, saved.parent, saved)} <= synced


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
        checkpoint_reader.read(run.path(2), empty_like(tensors(2)))
    assert words in str(error.value)
    with caplog.at_level(logging.WARNING):
        assert newest_good(run) == run.path(1)
    assert words in caplog.text


@pytest.mark.core
def test_random_damage_is_never_loaded(run, tmp_path):
    damage_at_random(run, tmp_path, trials=60, seed=0)


@pytest.mark.slow
def test_200_random_damages_are_never_loaded(run, tmp_path):
    damage_at_random(run, tmp_path, trials=200, seed=1)


def damage_at_random(run, tmp_path, trials, seed):
    """Drop, flip or insert one byte or bit anywhere in any file; the older one is used."""
    rng = random.Random(seed)
    for trial in range(trials):
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
            checkpoint_reader.verify(folder)


def test_nothing_is_unpickled_before_the_manifest_verifies(run, monkeypatch):
    flip(".metadata")(run.path(2))

    def unpickled(*_):
        raise AssertionError("the index was read from a folder that does not verify")

    monkeypatch.setattr(checkpoint_reader.dcp.FileSystemReader, "read_metadata", unpickled)
    with pytest.raises(DamagedCheckpointError):
        checkpoint_reader.read(run.path(2), empty_like(tensors(2)))


@pytest.mark.parametrize("place", ["start", "own files", "manifest", "rename", "retention"])
def test_sigkill_inside_a_save_leaves_a_whole_checkpoint(run, monkeypatch, place):
    """A forked process saves and kills itself on the way; nothing of it can clean up."""

    def die(path=Path("/"), *_, **__):
        if not isinstance(path, Path) or path.exists():  # rmtree is called for what is not there
            os.kill(os.getpid(), signal.SIGKILL)

    owner, name = {
        "start": (checkpoint_writer.ShardAssignment, "write"),
        "own files": (checkpoint_writer, "describe_file"),
        "manifest": (checkpoint_writer, "seal"),
        "rename": (Checkpoints, "_publish"),
        "retention": (checkpoint_retention.shutil, "rmtree"),
    }[place]
    child = os.fork()
    if not child:
        monkeypatch.setattr(owner, name, die)
        run.save(3, tensors(3), STATE)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert newest_good(run) == run.path(3 if place == "retention" else 2)
    assert list(run.folder.glob(".*"))
    run.clean()
    assert list(run.folder.glob(".*")) == []
    assert run.save(4, tensors(4), STATE) == newest_good(run)


@contextlib.contextmanager
def files_up_to(num_bytes):
    """The kernel lets no file grow beyond this, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("num_bytes", [0, 100, 5000])
def test_failed_save_leaves_the_older_ones_untouched(run, caplog, num_bytes):
    """Limits hit in the tensors' file at its start and inside, and in the index."""
    with files_up_to(num_bytes), pytest.raises(CheckpointFailedError, match="step_00000003"):
        run.save(3, tensors(3), STATE)
    assert "checkpoint of step 3 failed: OSError: [Errno 27] File too large" in caplog.text
    assert sorted(p.name for p in run.folder.iterdir()) == ["step_00000001", "step_00000002"]
    assert newest_good(run) == run.path(2)


def test_folder_that_cannot_be_made_costs_the_save(tmp_path, caplog):
    (tmp_path / "checkpoints").write_text("a file stands here")
    behind = Checkpoints(tmp_path / "checkpoints", background=True)
    behind.start(1, tensors(1), STATE)
    behind.wait()
    assert "checkpoint of step 1 failed: [Errno 17] File exists" in caplog.text
    assert behind.saved_step == -1


def test_save_behind_the_steps_holds_the_state_at_its_start(tmp_path):
    """The tensors change as soon as start returns, while nothing is written yet."""
    behind = Checkpoints(tmp_path, background=True)
    for step in (1, 2, 3):
        values = tensors(step)
        behind.start(step, values, STATE)
        for value in values.values():
            value.zero_()
        target = empty_like(values)
        behind.wait()
        checkpoint_reader.read(behind.path(step), target)
        assert same(target, tensors(step))
        assert behind.saved_step == step
        assert behind.background_seconds() > 0
        assert behind.background_seconds() == 0


def test_two_saves_never_run_at_once_and_leaving_waits(tmp_path, monkeypatch):
    began, ended = [], []
    write = checkpoint_writer.ShardAssignment.write

    def slow(*args):
        assert len(began) == len(ended)
        began.append(1)
        time.sleep(0.2)
        report = write(*args)
        ended.append(1)
        return report

    monkeypatch.setattr(checkpoint_writer.ShardAssignment, "write", slow)
    saves = Checkpoints(tmp_path, background=True)

    def run():
        with saves:
            for step in (1, 2, 3):
                saves.start(step, tensors(step), STATE)
            raise RuntimeError("of the run")

    with pytest.raises(RuntimeError, match="of the run"):
        run()
    assert [p.name for p in saves.published()] == [f"step_{n:08d}" for n in (1, 2, 3)]
    for path in saves.published():
        checkpoint_reader.verify(path)


RETENTIONS = {
    "all": (Retention(), [1, 2, 3, 4, 5, 6]),
    "last": (Retention(last=2), [5, 6]),
    "every": (Retention(last=1, every=2), [2, 4, 6]),
    "best": (Retention(last=1, best=2), [1, 3, 6]),
    "together": (Retention(last=2, every=4, best=1), [3, 4, 5, 6]),
}


@pytest.mark.parametrize("name", RETENTIONS)
def test_retention_keeps_what_has_a_reason(tmp_path, name):
    """Losses: lowest at step 3, then 1; steps 2 and 4 were not evaluated."""
    retention, kept = RETENTIONS[name]
    losses = [2.0, None, 1.0, None, 2.5, 3.0]
    saves = Checkpoints(tmp_path, retention)
    for step, loss in enumerate(losses, start=1):
        saves.save(step, tensors(step), {**STATE, "val_loss": loss})
    assert [step_of(p) for p in saves.published()] == kept


def test_going_back_takes_later_checkpoints_out_of_the_row(run):
    assert newest_good(run, upto=1) == run.path(1)
    run.set_aside(after=1)
    assert newest_good(run) == run.path(1)
    assert (run.folder / "abandoned_step_00000002").is_dir()
    assert run.saved_step == 1
    run.save(2, tensors(7), STATE)
    target = empty_like(tensors(7))
    checkpoint_reader.read(run.path(2), target)
    assert same(target, tensors(7))


def test_damaged_folder_of_the_same_step_is_moved_aside(run):
    truncate(run.path(2))
    run.save(2, tensors(5), STATE)
    target = empty_like(tensors(5))
    checkpoint_reader.read(run.path(2), target)
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
        checkpoint_reader.read(run.path(2), target)


def test_part_of_a_checkpoint_can_be_loaded(run):
    target = {"model.embed.weight": torch.zeros(11, 3)}
    checkpoint_reader.read(run.path(2), target, partial=True)
    assert torch.equal(target["model.embed.weight"], tensors(2)["model.embed.weight"])


def test_locate_takes_runs_and_checkpoints(run, tmp_path):
    assert locate(str(run.path(1))) == run.path(1)
    assert locate(str(tmp_path)) == run.path(2)
    with pytest.raises(UserError, match=r"init_from=.*no complete checkpoint"):
        locate(str(tmp_path / "nowhere"))
