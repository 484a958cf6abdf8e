"""A training step reads no value back from the device: traced on meta tensors, which have none.

``item``, ``tolist``, ``int()``, boolean masks, ``nonzero``, ``bincount`` and ``.cpu()`` all raise
there. Token ids live on the device, document ids on the host, where the plan is built.
"""

from dataclasses import replace

import pytest
import torch

from model.config import IndexerPhase, Kernels, ModelConfig
from model.kernels import routing
from model.kernels.triton import pool
from model.loss import Objective
from model.transformer import DeepSeekV4
from parallel.activation_checkpoint import checkpoint_blocks
from tests.model.test_isolation import ALL_KINDS

T, B = 96, 2
DOCUMENTS = torch.tensor([[0] * 31 + [1] * 50 + [-1] * 15, [2] * T])


def step(config: ModelConfig, phase: IndexerPhase, recompute: str = "none") -> None:
    """Forward and backward with every loss, on meta tensors."""
    with torch.device("meta"):
        model = DeepSeekV4(config)
    checkpoint_blocks(model, recompute)
    model.compute_dtype = torch.bfloat16
    ids = torch.zeros(B, T, dtype=torch.int64, device="meta")
    depths = 1 + config.num_nextn_predict_layers
    labels = torch.zeros(B, T, depths, dtype=torch.int64, device="meta")
    objective = Objective((100.0,) * depths, 150.0, indexer_phase=phase, monitors=True)
    model(ids, DOCUMENTS, labels, objective).total.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
@pytest.mark.parametrize("phase", list(IndexerPhase))
def test_step_reads_nothing_from_the_device(phase, recompute):
    if phase is IndexerPhase.full:  # no indexer loss: its parameters have no gradient
        phase = IndexerPhase.warmup
    step(ALL_KINDS, phase, recompute)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: torch.bincount(x.flatten()),
        lambda x: x.tolist(),
    ],
)
def test_a_planted_read_is_seen(read, monkeypatch):
    count = routing.count

    def reading(index, size):
        read(index)
        return count(index, size)

    monkeypatch.setattr(routing, "count", reading)
    with pytest.raises((RuntimeError, NotImplementedError)):
        step(ALL_KINDS, IndexerPhase.sparse)


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x.cpu()])
def test_a_read_beside_a_launch_is_seen(read, monkeypatch):
    launch = pool.launch

    def reading(kernel, grid, *args, **constants):
        read(args[0])
        launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(pool, "launch", reading)
    with pytest.raises((RuntimeError, NotImplementedError)):
        step(replace(ALL_KINDS, kernels=Kernels.triton), IndexerPhase.sparse)


@pytest.mark.parametrize("kernels", [Kernels.reference, Kernels.triton])
def test_other_kernels_read_nothing_either(kernels):
    step(replace(ALL_KINDS, kernels=kernels), IndexerPhase.sparse)
