"""What the layout tests share: one step of a layout beside the same step of one process."""

# Legend: B rows, T tokens
from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from model.loss import Objective
from model.transformer import DeepSeekV4
from optim.build import build_optimizer
from optim.config import MatmulDtype, MuonConfig, OptimConfig
from parallel.collectives import whole
from parallel.config import ParallelConfig
from parallel.distributed import DistributedEngine
from parallel.engine import TorchEngine
from parallel.mesh import Mesh, build_mesh, check_layout
from parallel.pipeline_engine import PipelineEngine
from parallel.pipeline_stage import ModelPart
from parallel.sharded_model import build_sharded_model
from tests.helpers import Rows, relative, small_model, tiny_model
from train.step import microbatches

SEQ_LEN = 32
CPU = torch.device("cpu")
OPTIM = OptimConfig(lr=1e-2, muon=MuonConfig(dtype=MatmulDtype.fp32))


def alone(size: str = "small", optim: OptimConfig = OPTIM, **changes: Any) -> TorchEngine:
    """The engine of one process."""
    model = (small_model if size == "small" else tiny_model)(**changes)
    optimizer = build_optimizer(
        model.named_parameters(), optim, split_counts={"o_groups": model.config.o_groups}
    )
    return TorchEngine(model, optimizer, CPU, optim.grad_clip)


def spread(
    reference: TorchEngine,
    degrees: dict[str, Any],
    optim: OptimConfig = OPTIM,
    precision: str = "fp32",
    checkpoint: str = "none",
) -> tuple[DistributedEngine, Mesh]:
    """The engine of this rank for the same model."""
    model = reference.model
    assert isinstance(model, DeepSeekV4)
    layout = ParallelConfig(**degrees).resolve(dist.get_world_size())
    check_layout(layout, model.config)
    mesh = build_mesh(layout, "cpu")
    mine = build_sharded_model(model.config, mesh, CPU, precision, checkpoint, seq_len=4 * SEQ_LEN)
    mine.compute_dtype = model.compute_dtype
    optimizer = build_optimizer(
        mine.named_parameters(), optim, split_counts={"o_groups": model.config.o_groups},
        group=mesh.data.get_group(),
    )  # fmt: skip
    if isinstance(mine, ModelPart):
        return PipelineEngine(mine, optimizer, CPU, optim.grad_clip, mesh), mesh
    return DistributedEngine(mine, optimizer, CPU, optim.grad_clip, mesh), mesh


def objective(rows: Rows) -> Objective:
    """Every loss is on."""
    counts = rows.counts
    return Objective(
        tuple(map(float, counts.targets_K)), float(counts.tokens),
        mtp_weight=0.3, indexer_weight=0.1, balance_weight=0.1, monitors=True,
    )  # fmt: skip


def forward_backward(engine: TorchEngine, rows: Rows, num_rows: int, micro: int = 8) -> Any:
    """Gradients of the whole global batch."""
    batches = microbatches(rows, num_rows, micro, engine.data_rank, engine.data_degree)
    return engine.forward_backward(batches, objective(rows))


def gradients(engine: TorchEngine) -> dict[str, torch.Tensor]:
    """Whole gradients, by name."""
    return {
        name: whole(p.grad) for name, p in engine.model.named_parameters() if p.grad is not None
    }


def worst_gradient(mine: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, str]:
    """The largest relative distance of any gradient.

    A tensor whose whole gradient is below 1e-4 of the global norm is measured against that: it is
    a difference of equal numbers (see tests/train/test_step.py).
    """
    assert mine.keys() == theirs.keys()
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in theirs.values()))
    found = []
    for name, expected in theirs.items():
        distance = relative(mine[name], expected)
        if float(expected.norm()) < 1e-4 * norm:
            distance = float((mine[name] - expected).norm()) / (1e-4 * norm)
        found.append((distance, name))
    return max(found)
