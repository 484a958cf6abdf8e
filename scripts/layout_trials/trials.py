"""What ``scripts/layouts.py`` does in each process: the trials of one layout, beside one process.

Everything is built by ``train/build.py`` and run by ``train/step.py``, as a run is. One process
gives the reference (``reference.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from parallel.config import EngineName
from parallel.deepspeed_engine import DeepSpeedEngine
from parallel.launch import launched_world_size
from scripts.layout_trials.choices import replaying
from scripts.layout_trials.reference import (
    Reference,
    from_gradients,
    from_reference,
    from_update,
    relative,
)
from scripts.layout_trials.steps import Bench, Watch, build_bench, steps
from scripts.layout_trials.whole_tensors import Tensors, set_gradients, weights
from train.config.schema import RunConfig
from train.step import microbatches, objective_of, plan_step


def trials(run: RunConfig, ref: Reference, which: Sequence[str]) -> dict[str, Any]:
    """Every trial of a layout; the same on all ranks. Collective.

    Args:
        run: config of the layout.
        ref: of one process.
        which: of ``start``, ``update``, ``replay``, ``free``, ``bf16``.
    """
    alone, count = _alone(run), len(ref.losses)
    out: dict[str, Any] = {"ranks": launched_world_size()}
    if "start" in which:
        bench, watch = build_bench(run, alone), Watch(grads=True)
        out["same_bits"] = _same(weights(bench.engine), ref.start)
        again = steps(bench, count if "free" in which else 1, watch=watch)
        out["same_order"] = watch.rows == ref.rows[: len(again)]
        out["loss"] = max(relative(again[0][n], value) for n, value in ref.losses[0].items())
        out |= from_gradients(ref, watch.first)
        if "free" in which:
            found = from_reference(ref, again, weights(bench.engine))
            out |= {"free_losses": found["losses"], "free_weights": found["weights"]}
    if "update" in which:
        bench = build_bench(run, alone)
        if isinstance(bench.engine, DeepSpeedEngine):
            _leave_gradients(bench)
            bench.engine.set_gradients(ref.grads)
        else:
            set_gradients(bench.engine, ref.grads)
        bench.engine.optimizer_step(run.optim.lr, finite=True)
        out |= from_update(ref, weights(bench.engine))
    if "replay" in which:
        bench = build_bench(run, alone)
        with replaying(bench.engine, ref.choices):
            again = steps(bench, count)
        found = from_reference(ref, again, weights(bench.engine))
        out |= {"replay_losses": found["losses"], "replay_weights": found["weights"]}
    return out


def last_loss(run: RunConfig, count: int) -> float:
    """Main loss of the last of ``count`` steps."""
    return steps(build_bench(run, _alone(run)), count)[-1]["loss"]


def _leave_gradients(bench: Bench) -> None:
    """Run a backward pass: DeepSpeed's gradients have places only after one."""
    run, engine = bench.run, bench.engine
    step = plan_step(1, 0, bench.plan, run.train, run.optim)
    bench.phase.enter(step)
    rows = bench.loader.plan(step.num_rows, step.stage.seq_len)
    micro = step.stage.micro_batch_size
    batches = microbatches(rows, step.num_rows, micro, engine.data_rank, engine.data_degree)
    engine.forward_backward(batches, objective_of(step, rows.counts))


def _alone(run: RunConfig) -> bool:
    """Whether the run is one process of plain torch."""
    one = run.parallel.resolve(launched_world_size()).world_size == 1
    return one and run.engine.name is EngineName.torch


def _same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
