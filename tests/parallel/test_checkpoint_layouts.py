"""A checkpoint written under one layout loads under any other: every tensor bitwise, gathered.

The next step's loss agrees to 1e-5: sums over ranks have another order.
"""

import pytest
import torch
import torch.distributed as dist

from parallel.collectives import whole
from tests.helpers import random_rows, run_distributed
from tests.parallel.ranks import SEQ_LEN, alone, forward_backward, spread
from train.checkpoint import reader as checkpoint_reader
from train.checkpoint.manager import Checkpoints

ROWS = 8


def advance(engine, rows):
    engine.optimizer.zero_grad()
    forward_backward(engine, rows, ROWS, micro=2)
    assert engine.optimizer_step(1e-2, finite=True).applied


def gathered(engine):
    """Every tensor of every pipeline stage."""
    mine = {name: whole(tensor).clone() for name, tensor in engine.state().items()}
    return {name: tensor for some in engine.gather(mine) for name, tensor in some.items()}


def next_loss(engine, rows):
    return float(forward_backward(engine, rows, ROWS, micro=2).total)


def write_and_read(rank, world, folder, written, read):
    reference = alone()
    rows = random_rows(ROWS, SEQ_LEN, reference.model.config.vocab_size)
    writer, _ = spread(reference, written)
    advance(writer, rows)
    path = Checkpoints(folder).save(1, writer.state(), {})
    reader, _ = spread(reference, read)
    checkpoint_reader.read(path, reader.state())
    saved, loaded = gathered(writer), gathered(reader)
    assert saved.keys() == loaded.keys()
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor), name
    losses = [next_loss(engine, rows) for engine in (writer, reader)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    if rank == 0:
        torch.save(saved, folder / "gathered.pt")
    dist.barrier()


def load_here(folder):
    """Load what other ranks wrote, in one process."""
    engine = alone()
    checkpoint_reader.read(Checkpoints(folder).path(1), engine.state())
    saved = torch.load(folder / "gathered.pt", weights_only=True)
    for name, tensor in engine.state().items():
        assert torch.equal(tensor, saved[name]), name


def pass_on(rank, world, folder, layouts):
    """Each layout reads what the one before it wrote, and writes its own next step."""
    reference = alone()
    rows = random_rows(ROWS, SEQ_LEN, reference.model.config.vocab_size)
    for number, layout in enumerate(layouts, start=2):
        saved, loss = torch.load(folder / f"{number - 1}.pt", weights_only=True)
        engine, _ = spread(reference, layout)
        checkpoint_reader.read(Checkpoints(folder).path(number - 1), engine.state())
        loaded = gathered(engine)
        assert loaded.keys() == saved.keys()
        for name, tensor in loaded.items():
            assert torch.equal(tensor, saved[name]), (layout, name)
        assert next_loss(engine, rows) == pytest.approx(loss, abs=1e-5), layout
        advance(engine, rows)
        Checkpoints(folder).save(number, engine.state(), {})
        expected = gathered(engine), next_loss(engine, rows)
        if rank == 0:
            torch.save(expected, folder / f"{number}.pt")
        dist.barrier()


def compare_chain(folder, world, layouts):
    """From one process through all layouts; one process reads what each of them wrote."""
    engine = alone()
    rows = random_rows(ROWS, SEQ_LEN, engine.model.config.vocab_size)
    advance(engine, rows)
    Checkpoints(folder).save(1, engine.state(), {})
    torch.save((gathered(engine), next_loss(engine, rows)), folder / "1.pt")
    run_distributed(pass_on, world, folder, layouts)
    for number, layout in enumerate(layouts, start=2):
        engine = alone()
        checkpoint_reader.read(Checkpoints(folder).path(number), engine.state())
        saved, loss = torch.load(folder / f"{number}.pt", weights_only=True)
        state = engine.state()
        assert saved.keys() == state.keys(), layout
        for name, tensor in saved.items():
            assert torch.equal(tensor, state[name]), (layout, name)
        assert next_loss(engine, rows) == pytest.approx(loss, abs=1e-5), layout


def test_checkpoint_goes_from_one_process_through_layouts_of_two_ranks_and_back(tmp_path):
    compare_chain(tmp_path, 2, [{"ep": 2}, {"cp": 2}, {"pp": 2}])


@pytest.mark.slow
def test_checkpoint_goes_from_one_process_through_layouts_of_four_ranks_and_back(tmp_path):
    layouts = [
        {}, {"ep": 2}, {"pp": 2, "ep": 2}, {"ep": 4}, {"dp_replicate": 2}, {"pp": 2}, {"pp": 4},
        {"pp": 2, "ep": 2, "schedule": "zbvzerobubble"},
    ]  # fmt: skip
    compare_chain(tmp_path, 4, layouts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "written",
    [{}, {"ep": 4}, {"ep": 2}, {"dp_replicate": 2}, {"pp": 2, "ep": 2}],
    ids=str,
)
@pytest.mark.parametrize("read", [{"ep": 2}, {"dp_replicate": 2}, {"pp": 2, "ep": 2}], ids=str)
def test_checkpoint_of_four_ranks_loads_under_another_layout(tmp_path, written, read):
    run_distributed(write_and_read, 4, tmp_path, written, read)
    load_here(tmp_path)
