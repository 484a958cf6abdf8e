"""Steps of a run in this process, from what its config builds, and what its rows held.

Everything is built by ``train/build.py`` and run by ``train/step.py``, as a run is.
"""

# Legend: B rows, T tokens, K prediction depths
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch.distributed as dist
from torch import Tensor

from data.batch import Batch, BatchCounts
from data.global_batch import GlobalBatch
from data.loader import Loader, build_loader
from data.prepare import build_tokenizer
from parallel.engine import Engine, Shares, Update
from scripts.layout_trials.whole_tensors import Tensors, gradients
from train.build import build_compiled, build_engine, build_layout, build_model
from train.config.schema import RunConfig
from train.phase import PhaseSwitch
from train.stages import StagePlan, check_rows, resolve
from train.step import StepPlan, plan_step, train_step

RowKey = str


@dataclass
class Bench:
    """A run's engine and data in this process."""

    run: RunConfig
    plan: StagePlan
    engine: Engine
    loader: Loader
    phase: PhaseSwitch


def build_bench(run: RunConfig, alone: bool) -> Bench:
    """Build what a run builds.

    Args:
        run: the config.
        alone: as the only process, whatever world this is.
    """
    plan = resolve(run)
    mesh = None if alone else build_layout(run)
    if mesh is not None:
        check_rows(plan, mesh.layout.data_degree)
    depths = 1 + run.model.num_nextn_predict_layers
    loader = build_loader(run.data, build_tokenizer(run.data), run.seed, depths)
    engine = build_engine(run, build_model(run, loader, mesh, build_compiled(run)), mesh)
    return Bench(run, plan, engine, loader, PhaseSwitch(engine, run.quant))


@dataclass
class Watch:
    """What a trial keeps of a run of steps.

    Attributes:
        rows: row keys of every step, in the order of the global batch.
        grads: whether to keep the first step's gradients.
        first: those gradients, whole, by name.
    """

    rows: list[list[RowKey]] = field(default_factory=list)
    grads: bool = False
    first: Tensors = field(default_factory=dict)


@dataclass
class _Observer:
    engine: Engine
    watch: Watch
    step: StepPlan

    def after_backward(self, shares: Shares) -> None:
        if self.watch.grads and self.step.number == 1:
            self.watch.first = gradients(self.engine)

    def after_update(self, update: Update) -> None:
        assert update.applied, f"step {self.step.number} was not finite"


@dataclass(frozen=True)
class _SeenRows:
    """A global batch that notes which of its rows are read, and what they hold."""

    rows: GlobalBatch
    seen: dict[int, RowKey]

    @property
    def counts(self) -> BatchCounts:
        return self.rows.counts

    def batch(self, start: int, stop: int) -> Batch:
        batch = self.rows.batch(start, stop)
        keys = row_keys(batch.input_ids_BT, batch.document_ids_BT, batch.labels_BTK)
        self.seen.update(zip(range(start, stop), keys, strict=True))
        return batch


def row_keys(*tensors_BT: Tensor) -> list[RowKey]:
    """A hash for every row of some tensors [B, ...]."""
    rows = zip(*(tensor.cpu().unbind(0) for tensor in tensors_BT), strict=True)
    return [
        hashlib.blake2b(b"".join(t.numpy().tobytes() for t in row), digest_size=8).hexdigest()
        for row in rows
    ]


def steps(
    bench: Bench, count: int, order: Sequence[int] = (), watch: Watch | None = None
) -> list[dict[str, float]]:
    """Train ``count`` steps from where the bench stands.

    Args:
        bench: fresh.
        count: optimizer steps.
        order: take the rows of each global batch in this order; empty: as they are.
        watch: filled.

    Returns:
        The losses of every step, ``total`` among them.
    """
    watch = watch or Watch()
    losses, tokens = [], 0
    for number in range(1, count + 1):
        step = plan_step(number, tokens, bench.plan, bench.run.train, bench.run.optim)
        bench.phase.enter(step)
        rows = bench.loader.plan(step.num_rows, step.stage.seq_len)
        if order:
            rows = replace(rows, rows=[rows.rows[i] for i in order])
        seen = _SeenRows(rows, {})
        result = train_step(bench.engine, seen, step, _Observer(bench.engine, watch, step))
        shares = result.shares
        assert shares.total is not None
        losses.append(
            {"total": float(shares.total)} | {n: float(v) for n, v in shares.losses.items()}
        )
        watch.rows.append(_everyones(seen.seen, step.num_rows))
        tokens += step.batch_tokens
    return losses


def _everyones(seen: dict[int, RowKey], num_rows: int) -> list[RowKey]:
    """Row keys of the whole batch: where ranks read the same row, they must have read the same."""
    everyone = [seen]
    if dist.is_initialized():
        everyone = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, seen)
    found: list[set[RowKey]] = [
        {some[i] for some in everyone if i in some} for i in range(num_rows)
    ]
    return ["|".join(sorted(keys)) for keys in found]
