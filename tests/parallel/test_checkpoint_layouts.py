"""A checkpoint written under one layout loads under any other: every tensor bitwise, gathered."""

import pytest
import torch
import torch.distributed as dist

from parallel.collectives import whole
from tests.helpers import random_rows, run_distributed
from tests.parallel.ranks import SEQ_LEN, alone, forward_backward, spread
from train import checkpoint
from train.checkpoint import Checkpoints

ROWS = 8


def advance(engine, rows):
    forward_backward(engine, rows, ROWS, micro=4)
    assert engine.optimizer_step(1e-2, finite=True).applied


def gathered(engine):
    return {name: whole(tensor).clone() for name, tensor in engine.state().items()}


def write_and_read(rank, world, folder, written, read):
    reference = alone()
    rows = random_rows(ROWS, SEQ_LEN, reference.model.config.vocab_size)
    writer, _ = spread(reference, written)
    advance(writer, rows)
    path = Checkpoints(folder).save(1, writer.state(), {})
    reader, _ = spread(reference, read)
    checkpoint.read(path, reader.state())
    saved, loaded = gathered(writer), gathered(reader)
    assert saved.keys() == loaded.keys()
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor), name
    losses = [float(forward_backward(e, rows, ROWS, micro=4).total) for e in (writer, reader)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    if rank == 0:
        torch.save(saved, folder / "gathered.pt")
    dist.barrier()


def load_here(folder):
    """Load what other ranks wrote, in one process."""
    engine = alone()
    checkpoint.read(Checkpoints(folder).path(1), engine.state())
    saved = torch.load(folder / "gathered.pt", weights_only=True)
    for name, tensor in engine.state().items():
        assert torch.equal(tensor, saved[name]), name


def test_checkpoint_of_two_ranks_loads_under_another_layout_and_alone(tmp_path):
    run_distributed(write_and_read, 2, tmp_path, {}, {"ep": 2})
    load_here(tmp_path)


def read_single(rank, world, folder, read):
    reference = alone()
    engine, _ = spread(reference, read)
    checkpoint.read(Checkpoints(folder).path(1), engine.state())
    saved = torch.load(folder / "gathered.pt", weights_only=True)
    for name, tensor in gathered(engine).items():
        assert torch.equal(tensor, saved[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("read", [{}, {"ep": 2}, {"ep": 4}, {"dp_replicate": 2}], ids=str)
def test_checkpoint_of_one_process_loads_on_four_ranks(tmp_path, read):
    engine = alone()
    advance(engine, random_rows(ROWS, SEQ_LEN, engine.model.config.vocab_size))
    Checkpoints(tmp_path).save(1, engine.state(), {})
    torch.save(gathered(engine), tmp_path / "gathered.pt")
    run_distributed(read_single, 4, tmp_path, read)


@pytest.mark.slow
@pytest.mark.parametrize("written", [{}, {"ep": 4}, {"ep": 2}, {"dp_replicate": 2}], ids=str)
@pytest.mark.parametrize("read", [{"ep": 2}, {"dp_replicate": 2}], ids=str)
def test_checkpoint_of_four_ranks_loads_under_another_layout(tmp_path, written, read):
    run_distributed(write_and_read, 4, tmp_path, written, read)
    load_here(tmp_path)
