"""Every layout trains as one process does (reference P.2, Layout-free).

Bounds: step-1 losses within 1e-6, gradients within 1e-5 relative Frobenius per tensor, Muon's
update within 1e-6 from identical gradients with fp32 Newton-Schulz. Initial weights are bitwise.
Two ranks in CI, one spawn each; the rest is slow.
"""

import pytest
import torch

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
from train.checkpoint.average import WeightAverage
from train.step import microbatches

ROWS = 8


def compare_step(rank, world, degrees, size, micro, checkpoint):
    reference = alone(size)
    config = reference.model.config
    rows = random_rows(ROWS, 4 * SEQ_LEN if size == "tiny" else SEQ_LEN, config.vocab_size)
    engine, mesh = spread(reference, degrees, checkpoint=checkpoint)
    expected = dict(reference.model.named_parameters())
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(whole(parameter), expected[name]), name
    for name, buffer in engine.model.named_buffers():
        assert torch.equal(buffer, reference.model.get_buffer(name)), name

    averages = [WeightAverage(e.model.named_parameters(), 0.5) for e in (engine, reference)]
    one = forward_backward(reference, rows, ROWS)
    many = forward_backward(engine, rows, ROWS, micro)
    assert abs(float(many.total - one.total)) <= 1e-6 * max(1.0, float(one.total)), (many, one)
    for name, value in one.losses.items():
        assert relative(many.losses[name], value) < 1e-5, name
    for name, load in one.expert_load.items():
        assert torch.equal(many.expert_load[name], load), name
    for name, value in one.monitors.items():
        if not name.startswith("stream_gain"):  # a mean over microbatches
            assert relative(many.monitors[name], value) < 1e-4, name
    distance, name = worst_gradient(gradients(engine), gradients(reference))
    assert distance < 1e-5, (distance, name)
    compare_update(engine, reference, mesh)
    compare_average((engine, reference), averages, rows)


def compare_average(engines, averages, rows):
    """Ranks evaluate the average that one process does, and have their weights back."""
    losses = []
    for engine, average in zip(engines, averages, strict=True):
        average.update()
        found = [evaluate(engine, rows)]
        with average.in_place():
            found.append(evaluate(engine, rows))
        assert evaluate(engine, rows) == found[0]
        losses.append(found)
    (model, average), expected = losses
    assert average == pytest.approx(expected[1], rel=1e-6)
    assert abs(average - model) > 1e-3 * model


def evaluate(engine, rows):
    batches = microbatches(rows, ROWS, 4, engine.data_rank, engine.data_degree)
    return float(engine.evaluate(batches, objective(rows)).losses["loss"])


def compare_update(engine, reference, mesh):
    """From the very same gradients: every update, every norm, and no matrix twice."""
    for name, parameter in engine.model.named_parameters():
        whole_grad = reference.model.get_parameter(name).grad
        parameter.grad = torch.distributed.tensor.distribute_tensor(
            whole_grad.clone(), parameter.device_mesh, parameter.placements
        )
    before = {n: p.detach().clone() for n, p in reference.model.named_parameters()}
    norms = [e.optimizer_step(1e-2, finite=True) for e in (reference, engine)]
    assert norms[0].applied
    assert norms[1].applied
    assert norms[1].grad_norm == pytest.approx(norms[0].grad_norm, rel=1e-12)
    for name, parameter in engine.model.named_parameters():
        now = reference.model.get_parameter(name).detach()
        update = float((whole(parameter) - now).norm() / (now - before[name]).norm())
        assert update < 1e-6, (name, update)
    states = engine.optimizer.state_dict()
    for name, state in reference.optimizer.state_dict().items():
        for key, tensor in state.items():
            assert relative(whole(states[name][key]), tensor) < 1e-6, (name, key)
    done = [None] * mesh.data.size()
    muon = next(e for e in engine.optimizer._engines.values() if e.algorithm == "muon")
    torch.distributed.all_gather_object(done, muon.orthogonalised)
    counted = [matrix for some in done for matrix in some]
    total = sum(record.num_matrices for record in engine.optimizer.table)
    assert len(counted) == len(set(counted)) == total
    assert max(map(len, done)) < 0.75 * total


@pytest.mark.parametrize(
    ("world", "degrees", "micro"),
    [(2, {}, 2), (2, {"ep": 2}, 4)],
    ids=["dp2", "ep2"],
)
def test_layout_trains_as_one_process(world, degrees, micro):
    run_distributed(compare_step, world, degrees, "small", micro, "none")


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["none", "block", "selective"])
@pytest.mark.parametrize(
    ("world", "degrees", "micro"),
    [
        (2, {}, 4),
        (2, {}, 1),
        (4, {}, 2),
        (4, {"dp_replicate": 2, "dp_shard": 2}, 1),
        (2, {"ep": 2}, 4),
        (4, {"ep": 4}, 2),
        (4, {"ep": 2}, 1),
        (4, {"dp_replicate": 4, "dp_shard": 1, "ep": 2}, 2),
    ],
    ids=["dp2", "dp2-accumulated", "dp4", "hsdp2x2", "ep2", "ep4", "ep2xdp2", "ddp4xep2"],
)
def test_layout_of_v4_tiny_trains_as_one_process(world, degrees, micro, checkpoint):
    run_distributed(compare_step, world, degrees, "tiny", micro, checkpoint)
