"""One optimizer step: microbatches in, one update and one record out.

Every loss is normalised by counts of the whole global batch that are known before the first
forward pass, so the gradient does not depend on how the rows are cut into microbatches. A step
whose loss or gradient norm is not finite changes nothing: weights, optimizer state and expert bias
stay as they were, on every rank, and the step is counted as skipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from data.batch import Batch, BatchCounts
from model.loss import Objective
from optim.config import OptimConfig
from optim.schedule import decay_started, learning_rate
from parallel.engine import Engine, Shares, Update
from train.config.schema import TrainConfig
from train.stages import LossWeights, Stage, StagePlan, loss_weights


class StepRows(Protocol):
    """The rows of one step, planned but not yet made into tensors (``data/loader.py``)."""

    @property
    def counts(self) -> BatchCounts:
        """Normalisers of the whole batch."""
        ...

    def batch(self, start: int, stop: int) -> Batch:
        """Tensors of some of the rows."""
        ...


@dataclass(frozen=True)
class StepPlan:
    """What one step does, as a function of where the run stands.

    Attributes:
        number: of the step; the first is 1.
        tokens: position at which it begins.
        stage: the stage it belongs to.
        num_rows: rows of the global batch.
        lr: learning rate.
        weights: of the side losses, and the speed of the expert bias.
        monitors: whether the costly monitors are computed.
    """

    number: int
    tokens: int
    stage: Stage
    num_rows: int
    lr: float
    weights: LossWeights
    monitors: bool

    @property
    def batch_tokens(self) -> int:
        """Positions of the global batch, padding included."""
        return self.num_rows * self.stage.seq_len


class StepObserver(Protocol):
    """Looks at a step from inside (the audit); must change nothing."""

    def after_backward(self, shares: Shares) -> None:
        """Gradients are complete, not yet clipped; weights are those of before the step."""
        ...

    def after_update(self, update: Update) -> None:
        """The update and the expert biases are done; gradients are gone."""
        ...


class Judge(Protocol):
    """Has a say before the update (``train/recovery/judge.py``); decides alike on all ranks."""

    def accepts(self, step: StepPlan, shares: Shares) -> bool:
        """Whether a finite update may be applied."""
        ...


@dataclass(frozen=True)
class StepResult:
    """What came of a step.

    Attributes:
        shares: losses, expert load and monitors of the global batch.
        update: gradient norm, and whether the step was applied.
    """

    shares: Shares
    update: Update


def plan_step(
    number: int, tokens: int, plan: StagePlan, train: TrainConfig, optim: OptimConfig
) -> StepPlan:
    """Look up what the step that begins at position ``tokens`` does.

    Args:
        number: of the step; the first is 1.
        tokens: trained before it.
        plan: of the run.
        train: the ``train`` section.
        optim: the ``optim`` section.
    """
    stage = plan.stage(tokens)
    decaying = decay_started(optim.schedule, tokens, plan.total_tokens)
    scheduled = learning_rate(optim, step=number, tokens=tokens, total_tokens=plan.total_tokens)
    return StepPlan(
        number=number,
        tokens=tokens,
        stage=stage,
        num_rows=stage.batch_tokens(tokens) // stage.seq_len,
        lr=scheduled if stage.lr is None else stage.lr,
        weights=loss_weights(stage, train, decaying),
        monitors=train.monitor_every > 0 and (number == 1 or number % train.monitor_every == 0),
    )


def objective_of(step: StepPlan, counts: BatchCounts) -> Objective:
    """The objective of a step over a batch with these counts."""
    return Objective(
        targets_K=tuple(float(n) for n in counts.targets_K),
        tokens=float(counts.tokens),
        mtp_weight=step.weights.mtp,
        indexer_weight=step.weights.indexer,
        balance_weight=step.weights.balance,
        indexer_phase=step.stage.indexer_phase,
        monitors=step.monitors,
    )


def microbatches(
    rows: StepRows, num_rows: int, micro_batch_size: int, rank: int = 0, degree: int = 1
) -> Iterator[Batch]:
    """Cut one data rank's share of the rows into microbatches, in order.

    Args:
        rows: of the global batch.
        num_rows: how many there are.
        micro_batch_size: rows of a microbatch; the last may be smaller.
        rank: which share.
        degree: number of shares; divides ``num_rows``.
    """
    assert num_rows % degree == 0, (num_rows, degree)
    share = num_rows // degree
    begin, end = rank * share, (rank + 1) * share
    for start in range(begin, end, micro_batch_size):
        yield rows.batch(start, min(start + micro_batch_size, end))


def train_step(
    engine: Engine,
    rows: StepRows,
    step: StepPlan,
    observer: StepObserver | None = None,
    judge: Judge | None = None,
) -> StepResult:
    """Run one step.

    Args:
        engine: runs the model and the update.
        rows: of the global batch.
        step: what to do.
        observer: looks on.
        judge: may refuse the update.
    """
    batches = microbatches(
        rows, step.num_rows, step.stage.micro_batch_size, engine.data_rank, engine.data_degree
    )
    shares = engine.forward_backward(batches, objective_of(step, rows.counts))
    if observer:
        observer.after_backward(shares)
    assert shares.total is not None
    finite = math.isfinite(float(shares.total))
    accepted = finite and (judge is None or judge.accepts(step, shares))
    update = engine.optimizer_step(step.lr, finite=accepted)
    if update.applied and step.weights.bias_update_speed > 0:
        engine.update_biases(shares.expert_load, step.weights.bias_update_speed)
    if observer:
        observer.after_update(update)
    return StepResult(shares, update)
