"""``engine=deepspeed`` trains as one process does, and what it must not do is found by name.

Bounds are those of test_layouts.py. Muon's update is held to 1e-6 of its size; AdamW runs on flat
shards, where the vector kernel takes other elements in its scalar tail, so a weight may come out
one rounding of fp32 away. All cases of a world share one spawn: DeepSpeed takes seconds to import.
"""

import itertools
import json
import math
import os

import pytest
import torch

from model.config_json import official_config
from optim.groups import Owner, build_table
from parallel.activation_checkpoint import checkpoint_blocks
from parallel.collectives import whole
from parallel.config import EngineConfig, EngineName, OffloadTo, ParallelConfig
from parallel.deepspeed_engine import DeepSpeedEngine, DeepSpeedError
from parallel.mesh import build_mesh
from tests.forked import run_forked
from tests.helpers import random_rows, relative, run_distributed, small_model, tiny_model
from tests.parallel.ranks import CPU, OPTIM, SEQ_LEN, alone, forward_backward, worst_gradient
from train.checkpoint.reader import load_each

ROWS = 8
LINEAR = torch.nn.functional.linear
EPS = torch.finfo(torch.float32).eps
CASES = list(itertools.product((1, 2, 3), (OffloadTo.none, OffloadTo.cpu)))


def zero(stage, offload, size="small", micro=2, checkpoint="none", engine=None, **changes):
    """The engine of this rank for the model of :func:`alone`."""
    model = (small_model if size == "small" else tiny_model)(**changes)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    table = build_table(shapes, OPTIM, model.config.split_counts)
    mesh = build_mesh(ParallelConfig(dp_shard=torch.distributed.get_world_size()), "cpu")
    config = engine or EngineConfig(EngineName.deepspeed, stage, offload)
    checkpoint_blocks(model, checkpoint)
    return DeepSpeedEngine(model, table, OPTIM, config, CPU, mesh, micro)


def live(engine):
    return {name: whole(tensor) for name, tensor in engine.weights().items()}


def compare(rank, world, cases, size, micro, checkpoint):
    """Yields the engine of each case, when it was compared."""
    os.environ["LOCAL_RANK"] = str(rank)
    for stage, offload in cases:
        reference = alone(size)
        engine = zero(stage, offload, size, micro, checkpoint)
        start = dict(reference.model.named_parameters())
        assert all(torch.equal(tensor, start[name]) for name, tensor in live(engine).items())
        seq_len = 4 * SEQ_LEN if size == "tiny" else SEQ_LEN
        rows = random_rows(ROWS, seq_len, reference.model.config.vocab_size)
        compare_step(engine, reference, rows, micro)
        compare_engines(engine, reference, rows, micro)
        assert torch.nn.functional.linear is LINEAR  # the release would replace it
        yield engine


def compare_all(*args):
    assert sum(1 for _ in compare(*args)) == len(args[2])


def compare_step(engine, reference, rows, micro):
    """A step from equal weights; the update from the very same gradients."""
    one = forward_backward(reference, rows, ROWS)
    many = forward_backward(engine, rows, ROWS, micro)
    assert abs(float(many.total - one.total)) <= 1e-6 * max(1.0, float(one.total)), (many, one)
    for name, load in one.expert_load.items():
        assert torch.equal(many.expert_load[name], load), name
    exact = {name: gradient.clone() for name, gradient in reference.gradients()}
    mine = {name: gradient.clone() for name, gradient in engine.gradients()}
    distance, name = worst_gradient(mine, exact)
    assert distance < 1e-5, (distance, name)
    engine.set_gradients(exact)
    before = {name: p.detach().clone() for name, p in reference.model.named_parameters()}
    updates = [e.optimizer_step(1e-2, finite=True) for e in (reference, engine)]
    assert updates[1].grad_norm == pytest.approx(updates[0].grad_norm, rel=1e-12)
    assert engine.stale() == []
    owners = {record.name: record.owner for record in engine.optimizer.table}
    assert engine.optimizer.moved == {name: owner.value for name, owner in owners.items()}
    for name, tensor in live(engine).items():
        now = reference.model.get_parameter(name).detach()
        allowed = 1e-6 * float((now - before[name]).norm())
        if owners[name] is Owner.adamw:
            allowed += EPS * float(now.norm())
        assert float((tensor - now).norm()) <= allowed, name
    done = engine.gather(engine._muon.orthogonalised)
    counted = [matrix for some in done for matrix in some]
    assert len(counted) == len(set(counted))
    assert len(counted) == sum(
        r.num_matrices for r in engine.optimizer.table if r.owner is Owner.muon
    )
    assert max(map(len, done)) <= math.ceil(len(counted) / engine.data_degree) + len(
        engine._muon._rounds
    )


def compare_engines(engine, reference, rows, micro):
    """Weights and state go over bit for bit, and the next pass reads them."""
    saved = {name: tensor.clone() for name, tensor in reference.state().items()}
    engine.take_up(saved)
    back = {name: whole(tensor) for name, tensor in engine.state().items()}
    assert back.keys() == saved.keys()
    differing = [name for name, tensor in saved.items() if not torch.equal(tensor, back[name])]
    assert differing == []
    assert engine.stale() == []
    one = forward_backward(reference, rows, ROWS)
    many = forward_backward(engine, rows, ROWS, micro)
    assert relative(many.total, one.total) < 1e-6
    skipped = engine.optimizer_step(1e-2, finite=False)
    assert not skipped.applied
    after = {name: whole(tensor) for name, tensor in engine.state().items()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in back.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "cases", "size", "checkpoint"),
    [
        (1, CASES, "small", "none"), (4, CASES, "small", "none"), (2, CASES, "tiny", "none"),
        (2, CASES, "small", "block"), (2, CASES, "small", "selective"),
    ],
)  # fmt: skip
def test_zero_trains_as_one_process_everywhere(world, cases, size, checkpoint):
    run_distributed(compare_all, world, cases, size, 1, checkpoint)


def planted(engine):
    """What a release could do to an engine, and what then says so."""
    rows = random_rows(ROWS, SEQ_LEN, engine.model.config.vocab_size)
    # averaged twice
    optimizer = engine._zero_engine.optimizer
    told = optimizer.sequence_parallel_size
    optimizer.sequence_parallel_size = told / engine.data_degree
    forward_backward(engine, rows, ROWS, 2)
    with pytest.raises(
        DeepSpeedError, match=r"gradient of norm.weight is .* times the ranks' mean"
    ):
        engine.optimizer_step(1e-2, finite=True)
    optimizer.sequence_parallel_size = told
    engine._adamw.skip()
    engine.optimizer.zero_grad()
    # masters set after DeepSpeed's step
    late, set_master = [], engine.partitions.set_master
    engine.partitions.set_master = lambda name, value: late.append((name, value))
    forward_backward(engine, rows, ROWS, 2)
    engine.optimizer_step(1e-2, finite=True)
    for name, value in late:
        set_master(name, value)
    assert "layers.0.attn.wq_a.weight" in engine.stale()
    engine.partitions.set_master = set_master
    engine.partitions.renew_live()


def saves(engine, folder):
    """What a user of DeepSpeed has: its own checkpoint folder, and config.json."""
    stage = engine._stage
    rows = random_rows(ROWS, SEQ_LEN, engine.model.config.vocab_size)
    forward_backward(engine, rows, ROWS, 2)
    engine.optimizer_step(1e-2, finite=True)
    engine._zero_engine.save_checkpoint(str(folder / f"zero{stage}"))
    tensors = {name: whole(tensor) for name, tensor in engine.state().items()}
    if engine.rank == 0:
        model = {n: t for n, t in tensors.items() if n.startswith("model.")}
        torch.save(model, folder / f"zero{stage}.pt")
        config = folder / f"zero{stage}.json"
        config.write_text(json.dumps(official_config(engine.model.config)))


def imported(folder):
    """In a process of its own: DeepSpeed's import warns, which pytest takes for an error."""
    commands = [
        [str(folder / name) for name in (f"zero{stage}", f"zero{stage}.json", f"imported{stage}")]
        for stage in (2, 3)
    ]
    for words in commands:
        done = run_forked(["import_deepspeed", *words])
        assert done.returncode == 0, done.stderr
    for stage in (2, 3):
        expected = torch.load(folder / f"zero{stage}.pt")
        checkpoint = next((folder / f"imported{stage}" / "checkpoints").iterdir())
        found = dict(load_each(checkpoint, list(expected)))
        assert [n for n, tensor in expected.items() if not torch.equal(tensor, found[n])] == []


def two_ranks(rank, world, folder):
    for engine in compare(rank, world, CASES, "small", 2, "none"):
        if engine.config.offload_optimizer is OffloadTo.none and engine.config.zero_stage == 2:
            planted(engine)
        if engine.config.offload_optimizer is OffloadTo.none and engine.config.zero_stage > 1:
            saves(engine, folder)


def test_zero_trains_as_one_process_names_faults_and_is_imported(tmp_path):
    """In one world: faults of the release are planted, its own checkpoints imported."""
    run_distributed(two_ranks, 2, tmp_path)
    imported(tmp_path)
