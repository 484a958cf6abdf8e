"""A pipeline trains as one process does, whatever the schedule (reference P.2, Layout-free).

Bounds as in test_layouts.py: step-1 losses within 1e-6, reduced gradients within 1e-5 relative
Frobenius, side losses and MTP's second embedding included; updates within 1e-6 from identical
gradients; initial weights and checkpoints bitwise. ``forward_backward`` runs twice: buffers that a
schedule keeps must not carry anything over. Two ranks and two schedules in CI, in one spawn.
"""

import pytest
import torch
import torch.distributed as dist

from model.loss import Objective
from parallel.collectives import whole
from tests.helpers import random_rows, relative, run_distributed
from tests.parallel.ranks import (
    SEQ_LEN,
    alone,
    forward_backward,
    gradients,
    objective,
    spread,
    worst_gradient,
)
from train.checkpoint import reader as checkpoint_reader
from train.checkpoint.manager import Checkpoints
from train.step import microbatches

ROWS = 16
SCHEDULES = ("gpipe", "1f1b", "interleaved1f1b", "interleavedzerobubble", "zbvzerobubble",
             "dualpipev")  # fmt: skip


def compare(rank, world, layouts, size, micro, recompute, folder):
    """Each layout against one process; the first writes a checkpoint that every other reads."""
    reference = alone(size)
    rows = random_rows(
        ROWS, 4 * SEQ_LEN if size == "tiny" else SEQ_LEN, reference.model.config.vocab_size
    )
    one = forward_backward(reference, rows, ROWS)
    expected = gradients(reference)
    weights = {n: p.detach().clone() for n, p in reference.model.named_parameters()}
    evaluated = evaluate(reference, rows)
    norm = reference.optimizer_step(1e-2, finite=True).grad_norm
    reference.update_biases(one.expert_load, 0.01)
    for layout in layouts:
        engine, _ = spread(reference, layout, checkpoint=recompute)
        compare_start(engine, weights)
        for losses in (evaluate(engine, rows), evaluate(engine, rows)):
            assert losses == pytest.approx(evaluated, abs=1e-6)
        for _ in range(2):
            engine.optimizer.zero_grad()
            many = forward_backward(engine, rows, ROWS, micro)
        compare_step(many, one, engine, expected, folder)
        compare_update(engine, expected, norm, weights, reference, many)
        path = Checkpoints(folder).path(1)
        if path.exists():
            compare_loaded(engine, path, folder)
        else:
            write(engine, folder, rank)


def evaluate(engine, rows):
    """Loss without gradients; the last microbatch is smaller."""
    batches = microbatches(rows, ROWS, 3, engine.data_rank, engine.data_degree)
    o = objective(rows)
    plain = Objective(o.targets_K, o.tokens, 0.0, 0.0, 0.0)
    return float(engine.evaluate(batches, plain).losses["loss"])


def compare_start(engine, weights):
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(whole(parameter), weights[name]), name
    names = [
        n for some in engine.gather(sorted(dict(engine.model.named_parameters()))) for n in some
    ]
    assert set(names) == set(weights)
    assert len(names) == len(weights) * engine.data_degree


def compare_step(many, one, engine, expected, folder):
    assert abs(float(many.total - one.total)) <= 1e-6 * max(1.0, float(one.total)), (many, one)
    for name, value in one.losses.items():
        assert relative(many.losses[name], value) < 1e-5, name
    assert many.expert_load.keys() == one.expert_load.keys()
    for name, load in one.expert_load.items():
        assert torch.equal(many.expert_load[name], load), name
    assert many.monitors.keys() == one.monitors.keys()
    for name, value in one.monitors.items():
        if not name.startswith("stream_gain"):  # a mean over microbatches
            assert relative(many.monitors[name], value) < 1e-4, name
    mine = gradients(engine)
    assert mine.keys() == dict(engine.model.named_parameters()).keys()
    distance, name = worst_gradient(mine, {n: expected[n] for n in mine})
    assert distance < 1e-5, (distance, name)
    figures = f"{engine.pipeline.schedule_name} rank {dist.get_rank()}: {distance:.1e} {name}"
    with (folder / "figures.txt").open("a") as file:
        file.write(figures + "\n")


def compare_update(engine, expected, norm, weights, reference, shares):
    """From the very same gradients: every update, the norm over all stages, every bias."""
    for name, parameter in engine.model.named_parameters():
        parameter.grad = torch.distributed.tensor.distribute_tensor(
            expected[name].clone(), parameter.device_mesh, parameter.placements
        )
    update = engine.optimizer_step(1e-2, finite=True)
    assert update.applied
    assert update.grad_norm == pytest.approx(norm, rel=1e-12)
    for name, parameter in engine.model.named_parameters():
        now = reference.model.get_parameter(name).detach()
        moved = float((whole(parameter) - now).norm() / (now - weights[name]).norm())
        assert moved < 1e-6, (name, moved)
    engine.update_biases(shares.expert_load, 0.01)
    for name, buffer in engine.model.named_buffers():
        assert torch.equal(buffer, reference.model.get_buffer(name)), name


def write(engine, folder, rank):
    Checkpoints(folder).save(1, engine.state(), {})
    some = engine.gather({n: whole(t).clone() for n, t in engine.state().items()})
    if rank == 0:
        torch.save({n: t for rank_s in some for n, t in rank_s.items()}, folder / "gathered.pt")
    dist.barrier()


def compare_loaded(engine, path, folder):
    checkpoint_reader.read(path, engine.state())
    saved = torch.load(folder / "gathered.pt", weights_only=True)
    for name, tensor in engine.state().items():
        assert torch.equal(whole(tensor), saved[name]), name
    rows = random_rows(ROWS, SEQ_LEN, engine.model.config.vocab_size)
    evaluate(engine, rows)
    assert not engine._copy.differs()
    for stage in engine.model.stages:
        if stage.copies_embedding:
            assert torch.equal(whole(stage.embed.weight), saved["model.embed.weight"])


def load_alone(folder, size="small"):
    engine = alone(size)
    checkpoint_reader.read(Checkpoints(folder).path(1), engine.state())
    saved = torch.load(folder / "gathered.pt", weights_only=True)
    assert saved.keys() == engine.state().keys()
    for name, tensor in engine.state().items():
        assert torch.equal(tensor, saved[name]), name


def test_two_stages_train_as_one_process(tmp_path):
    layouts = [{"pp": 2}, {"pp": 2, "schedule": "dualpipev"}]
    run_distributed(compare, 2, layouts, "small", 4, "none", tmp_path)
    load_alone(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
def test_every_schedule_of_two_stages(tmp_path, recompute):
    layouts = [{"pp": 2, "schedule": schedule} for schedule in SCHEDULES]
    run_distributed(compare, 2, layouts, "tiny", 4, recompute, tmp_path)
    load_alone(tmp_path, "tiny")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "degrees", "micro"),
    [
        (4, {"pp": 4}, 2),
        (4, {"pp": 2, "dp_shard": 2}, 2),
        (4, {"pp": 2, "ep": 2}, 2),
        (8, {"pp": 2, "dp_shard": 4, "ep": 2}, 1),
        (8, {"pp": 2, "dp_replicate": 2, "dp_shard": 2, "ep": 2}, 1),
    ],
    ids=str,
)
def test_every_schedule_of_a_layout(tmp_path, world, degrees, micro):
    layouts = [{**degrees, "schedule": schedule} for schedule in SCHEDULES]
    run_distributed(compare, world, layouts, "tiny", micro, "none", tmp_path)
    load_alone(tmp_path, "tiny")
