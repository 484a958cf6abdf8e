"""Only whole checkpoints count as kept; pruning is no part of saving; what is set aside has an end.

Oracle: the names of the folders that are left.
"""

import json
import logging
import os
import shutil
import signal
import time

import pytest
import torch

from tests.train.checkpoint.folders import newest_good
from train.checkpoint import manager as checkpoint
from train.checkpoint import reader as checkpoint_reader
from train.checkpoint import retention as checkpoint_retention
from train.checkpoint import writer as checkpoint_writer
from train.checkpoint.files import step_of
from train.checkpoint.hold import Hold
from train.checkpoint.manager import Checkpoints
from train.checkpoint.retention import Retention


def tensors(step):
    return {"model.a": torch.full((4, 3), float(step)), "optim.a.step": torch.tensor(step)}


def saves(folder, last=0, **reasons):
    return Checkpoints(folder, Retention(last, **reasons))


def fill(folder, *steps, losses=None):
    for step in steps:
        state = {"val_loss": losses[step]} if losses else {}
        saves(folder).save(step, tensors(step), state)


def damage(folder, step):
    path = folder / f"step_{step:08d}" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def left(folder):
    return sorted(path.name for path in folder.iterdir())


def steps_left(folder):
    return [step_of(path) for path in checkpoint_retention.published(folder)]


@pytest.mark.core
def test_damaged_checkpoint_passed_over_at_the_start_is_not_kept_instead_of_a_good_one(tmp_path):
    """FAULTS A1: the newest is damaged, and the run goes on from before it."""
    fill(tmp_path, 2, 4, 6)
    damage(tmp_path, 6)
    run = saves(tmp_path, last=1)
    assert newest_good(run) == run.path(4)
    run.save(5, tensors(5), {})
    assert steps_left(tmp_path) == [5, 6]
    assert newest_good(saves(tmp_path)) == run.path(5)


def test_damaged_checkpoint_that_nobody_looked_at_does_not_count(tmp_path, caplog):
    fill(tmp_path, 1, 2, 3, 4)
    damage(tmp_path, 3)
    saves(tmp_path, last=3).save(5, tensors(5), {})
    assert steps_left(tmp_path) == [2, 4, 5]
    assert "step_00000003: file __0_0.distcp has sha256" in caplog.text
    assert "does not count as one of those that are kept" in caplog.text


def test_checkpoint_damaged_after_this_process_wrote_it_does_not_count(tmp_path):
    run = saves(tmp_path, last=2)
    for step in (1, 2, 3):
        run.save(step, tensors(step), {})
        if step == 2:
            damage(tmp_path, 2)
    assert steps_left(tmp_path) == [1, 2, 3]


def test_best_checkpoint_that_is_damaged_does_not_count(tmp_path):
    fill(tmp_path, 1, 2, 3, losses={1: 1.5, 2: 1.0, 3: 2.0})
    damage(tmp_path, 2)
    run = saves(tmp_path, last=1, best=1)
    run.save(4, tensors(4), {"val_loss": 3.0})
    run.save(5, tensors(5), {"val_loss": 3.0})
    assert steps_left(tmp_path) == [1, 5]


@pytest.mark.parametrize("loss", ["1.0", True, [1], {"a": 1}, None])
def test_loss_of_another_type_is_none(tmp_path, loss):
    fill(tmp_path, 1)
    (tmp_path / "step_00000001" / "state.json").write_text(json.dumps({"val_loss": loss}))
    assert checkpoint_retention.val_loss(tmp_path / "step_00000001") is None


def test_just_saved_checkpoint_is_never_removed(tmp_path):
    """Whatever lies behind it: a step that the run does again."""
    fill(tmp_path, 6, 8)
    saves(tmp_path, last=1).save(5, tensors(5), {})
    assert steps_left(tmp_path) == [5, 8]


def test_checkpoints_of_this_process_are_not_read_again_at_each_save(tmp_path, monkeypatch):
    run = saves(tmp_path, last=2)
    run.save(1, tensors(1), {})
    monkeypatch.setattr(checkpoint_retention, "verify", pytest.fail)
    for step in range(2, 6):
        run.save(step, tensors(step), {})
    assert steps_left(tmp_path) == [4, 5]
    assert len(run._known._whole) == 2


def test_checkpoint_that_cannot_be_removed_costs_one_warning(tmp_path, monkeypatch, caplog):
    """FAULTS A10: the save counts all the same, and is not done again."""

    def refuse(path):
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(checkpoint_retention, "remove", refuse)
    run = saves(tmp_path, last=1)
    for step in (1, 2, 3):
        assert run.save(step, tensors(step), {}) == run.path(step)
        assert run.saved_step == step
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert [w.split(" cannot")[0][-1] for w in warnings] == ["1", "2"]
    assert left(tmp_path) == [f"step_{n:08d}" for n in (1, 2, 3)]


def test_folder_that_cannot_be_listed_costs_no_save(tmp_path, monkeypatch, caplog):
    run = saves(tmp_path, last=1)

    def refuse(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint_retention, "published", refuse)
    run.save(1, tensors(1), {})
    assert run.saved_step == 1
    assert "cannot be removed and stays: [Errno 5] Input/output error" in caplog.text


def test_good_checkpoint_in_the_way_is_not_called_damaged(tmp_path):
    fill(tmp_path, 2)
    run = saves(tmp_path)
    run.save(2, tensors(7), {})
    assert left(tmp_path) == ["abandoned_step_00000002", "step_00000002"]


def test_whatever_stands_in_the_way_of_a_save_is_moved(tmp_path):
    (tmp_path / "step_00000001").symlink_to("nowhere")
    (tmp_path / "step_00000002").write_text("a file")
    (tmp_path / "damaged_step_00000002").write_text("another")
    run = saves(tmp_path)
    for step in (1, 2):
        run.save(step, tensors(step), {})
    assert steps_left(tmp_path) == [1, 2]
    assert {"damaged_step_00000002", "damaged_step_00000002_1"} <= set(left(tmp_path))


@pytest.mark.parametrize("reason", ["damaged", "abandoned"])
def test_what_is_set_aside_goes_when_later_ones_are_whole(tmp_path, reason, caplog):
    """FAULTS D3: at most two of a kind, and none behind as many good ones as are kept."""
    run = saves(tmp_path, last=2)
    for step in (3, 4, 5):
        shutil.copytree(source(tmp_path), tmp_path / f"{reason}_step_{step:08d}")
    caplog.set_level(logging.INFO)
    run.save(2, tensors(2), {})
    assert [n for n in left(tmp_path) if n.startswith(reason)] == [
        f"{reason}_step_00000004", f"{reason}_step_00000005",
    ]  # fmt: skip
    assert f"removing {tmp_path / f'{reason}_step_00000003'}" in caplog.text
    run.save(5, tensors(5), {})
    assert len([n for n in left(tmp_path) if n.startswith(reason)]) == 2
    run.save(6, tensors(6), {})
    assert [n for n in left(tmp_path) if n.startswith(reason)] == [f"{reason}_step_00000005"]
    run.save(7, tensors(7), {})
    assert left(tmp_path) == ["step_00000006", "step_00000007"]


def source(tmp_path):
    folder = tmp_path.parent / "source"
    if not folder.exists():
        fill(folder, 1)
    return folder / "step_00000001"


def test_unreadable_checkpoint_stays_until_as_many_later_ones_are_whole(tmp_path):
    fill(tmp_path, 1, 2, 3, 4)
    for step in (2, 3, 4):
        damage(tmp_path, step)
    run = saves(tmp_path, last=2)
    assert newest_good(run) == run.path(1)
    run.save(5, tensors(5), {})
    assert steps_left(tmp_path) == [1, 2, 3, 4, 5]
    run.save(6, tensors(6), {})
    assert steps_left(tmp_path) == [5, 6]


@pytest.mark.parametrize("kind", ["file", "link", "dangling", "folder"])
def test_anything_with_a_checkpoints_name_can_be_removed(tmp_path, kind):
    path, elsewhere = tmp_path / "step_00000001", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("stays")
    {
        "file": lambda: path.write_text(""),
        "link": lambda: path.symlink_to(elsewhere),
        "dangling": lambda: path.symlink_to("nowhere"),
        "folder": path.mkdir,
    }[kind]()
    assert checkpoint_retention.remove(path)
    assert left(tmp_path) == ["elsewhere"]
    assert left(elsewhere) == ["mine"]


def test_snapshot_keeps_no_buffers_that_a_save_does_not_use():
    """FAULTS D1: names that come and go."""
    snapshot = checkpoint_writer.Snapshot()
    fixed, first = torch.ones(3), []
    for step in range(5):
        copies = snapshot.take({"fixed": fixed, f"of.{step}": torch.full((100,), float(step))})
        assert copies[f"of.{step}"].eq(step).all()
        assert set(snapshot._buffers) == {"fixed", f"of.{step}"}
        first.append(copies["fixed"])
        assert copies["fixed"] is first[0]


def test_held_checkpoint_stays_until_the_next_save(tmp_path, caplog):
    """FAULTS C4: a reader is not overtaken by retention."""
    caplog.set_level(logging.INFO)
    run = saves(tmp_path, last=1)
    run.save(1, tensors(1), {})
    with Hold(run.path(1)), Hold(run.path(1)):
        run.save(2, tensors(2), {})
        assert steps_left(tmp_path) == [1, 2]
        assert "step_00000001 is being read: it stays until the next save" in caplog.text
    run.save(3, tensors(3), {})
    assert steps_left(tmp_path) == [3]


def test_readers_beside_a_run_that_saves_and_prunes_always_read_a_whole_one(tmp_path):
    """FAULTS C4, with real processes: one checkpoint is kept, and each save removes the other."""
    saves(tmp_path).save(1, tensors(1), {})
    child = os.fork()
    if not child:
        run, step = saves(tmp_path, last=1), 1
        while os.getppid() != 1:
            run.save(step := step + 1, tensors(step), {})
        os._exit(0)
    try:
        read = []
        while len(set(read)) < 6:
            with checkpoint.hold(str(tmp_path)) as found:
                for name, tensor in checkpoint_reader.load_each(found.folder, ["model.a"]):
                    time.sleep(0.05)  # long enough for a save
                    assert tensor.eq(step_of(found.folder)).all(), name
                assert checkpoint_reader.verify(found.folder)["step"] == step_of(found.folder)
                read.append(step_of(found.folder))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("seconds", [0.0, 30.0])
def test_rename_waits_for_readers_but_not_for_ever(tmp_path, monkeypatch, seconds, caplog):
    fill(tmp_path, 1, 2)
    run, hold = saves(tmp_path), Hold(tmp_path / "step_00000002")
    monkeypatch.setattr(checkpoint, "_READ_SECONDS", seconds)
    monkeypatch.setattr(checkpoint.time, "sleep", lambda _: hold.close())
    run.set_aside(after=1)
    assert left(tmp_path) == ["abandoned_step_00000002", "step_00000001"]
    assert ("is being read, and becomes" in caplog.text) == (seconds == 0)
    hold.close()


def test_reader_takes_the_next_newest_where_one_vanishes(tmp_path, monkeypatch):
    """Each time it has chosen one, another host removes it and saves the next."""
    fill(tmp_path, 1)
    looked = []

    class Vanishing(Hold):
        def __init__(self, folder):
            looked.append(step_of(folder))
            if len(looked) < 4:
                shutil.rmtree(folder)
                fill(tmp_path, step_of(folder) + 1)
            super().__init__(folder)

    monkeypatch.setattr(checkpoint, "Hold", Vanishing)
    with checkpoint.hold(str(tmp_path)) as found:
        assert looked == [1, 2, 3, 4]
        assert found.folder == tmp_path / "step_00000004"


def test_reader_reads_the_next_newest_where_one_vanishes_inside(tmp_path):
    fill(tmp_path, 1, 2)

    def read(folder):
        if step_of(folder) == 2:
            shutil.rmtree(folder)
        return checkpoint.verify_together(folder)["step"]

    assert checkpoint.read_held(lambda: checkpoint.hold(str(tmp_path)), read) == 1
