"""Checkpoints of two ranks: both write, one that fails costs the save on both, files cannot be
swapped.

Oracle: the tensors themselves, bit for bit.
"""

import logging
import resource

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.helpers import run_distributed
from tests.train.checkpoint.folders import newest_good
from train.checkpoint import reader as checkpoint_reader
from train.checkpoint.files import DamagedCheckpointError
from train.checkpoint.manager import CheckpointFailedError, Checkpoints

ROWS, COLUMNS = 64, 50


def state_of(mesh, step):
    """One tensor of each kind: sharded, sharded with an uneven end, copied, plain."""
    g = torch.Generator().manual_seed(step)
    return {
        "model.a": distribute_tensor(torch.randn(ROWS, COLUMNS, generator=g), mesh, [Shard(0)]),
        "model.b": distribute_tensor(torch.randn(7, 3, generator=g).bfloat16(), mesh, [Shard(0)]),
        "model.c": distribute_tensor(torch.randn(5, generator=g), mesh, [Replicate()]),
        "model.d": torch.randint(0, 9, (4,), generator=g),
    }


def assert_loads(path, mesh, step):
    target = state_of(mesh, 0)
    checkpoint_reader.read(path, target)
    for name, tensor in state_of(mesh, step).items():
        assert type(target[name]) is type(tensor)
        if isinstance(tensor, DTensor):
            tensor, target[name] = tensor.to_local(), target[name].to_local()
        assert torch.equal(target[name], tensor), name


def small_files_on_rank_1(rank, num_bytes):
    if rank == 1:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))


def save_on_two(rank, world, folder):
    mesh = init_device_mesh("cpu", (world,))
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("train").addHandler(handler)
    saves = Checkpoints(folder / "checkpoints", background=True)
    for step in (1, 2):
        saves.start(step, state_of(mesh, step), {"tokens": step})
        total = torch.ones(3)
        dist.all_reduce(total)  # as a step does, while threads write
        assert total.eq(world).all()
    saves.require(2)
    assert_loads(newest_good(saves), mesh, 2)
    assert_loads(newest_good(saves, upto=1), mesh, 1)

    small_files_on_rank_1(rank, 100)
    saves.start(3, state_of(mesh, 3), {})
    saves.wait()
    assert saves.saved_step == 2
    assert any("failed: rank 1: OSError: [Errno 27]" in m for m in messages), messages
    with pytest.raises(CheckpointFailedError, match="step_00000004 could not be written"):
        saves.save(4, state_of(mesh, 4), {})
    small_files_on_rank_1(rank, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert newest_good(saves) == saves.path(2)
    assert_loads(saves.save(5, state_of(mesh, 5), {}), mesh, 5)
    if rank == 0:
        assert [p.name for p in saves.folder.iterdir() if p not in saves.published()] == []


def read_damaged(rank, world, folder, words):
    mesh = init_device_mesh("cpu", (world,))
    saves = Checkpoints(folder / "checkpoints")
    with pytest.raises(DamagedCheckpointError, match=words):
        checkpoint_reader.read(saves.path(5), state_of(mesh, 0))
    assert newest_good(saves) == saves.path(2)


def test_two_ranks_save_behind_the_steps_and_one_that_fails_costs_the_save(tmp_path):
    run_distributed(save_on_two, 2, tmp_path)
    folder = tmp_path / "checkpoints" / "step_00000005"
    files = sorted(p.name for p in folder.iterdir())
    assert files == [".metadata", "__0_0.distcp", "__1_0.distcp", "manifest.json", "state.json"]
    first, second = (folder / f"__{rank}_0.distcp" for rank in (0, 1))
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)
    run_distributed(read_damaged, 2, tmp_path, r"step_00000005: file __[01]_0\.distcp has")
