"""What one process does, and how far another layout is from it.

One process gives the reference: its weights, losses, gradients, the choices of its gates and
indexers, how far its fp32 gradients are from float64, and how far it is from itself when it adds up
its rows in another order.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from data.progress import end_with_parent
from model.transformer import DeepSeekV4
from quant.config import QuantConfig
from scripts.layout_trials.asked import warm_context
from scripts.layout_trials.choices import Choices, recording, replaying
from scripts.layout_trials.steps import Bench, RowKey, Watch, build_bench, steps
from scripts.layout_trials.whole_tensors import Tensors, gradients, set_gradients, weights
from train.config.schema import RunConfig
from train.step import microbatches, objective_of, plan_step


@dataclass
class Reference:
    """What one process does.

    Attributes:
        start: initial weights and buffers.
        rows: row keys of every step.
        losses: of every step.
        grads: of the first step, fp32.
        rounding: norm of what fp32 changes in each of them, against float64: the largest of the
            orders of rows that were tried. One alone may be near by chance, of a scalar above all.
        updated: weights after one update from ``grads``.
        end: weights after all steps.
        choices: of gates and indexers, with which ``end`` came about.
        noise: ``losses`` and ``weights``: distances from the same steps with rows added up in
            other orders, one an order.
        quantised: its run is.
    """

    start: Tensors
    rows: list[list[RowKey]]
    losses: list[dict[str, float]]
    grads: Tensors
    rounding: dict[str, float]
    updated: Tensors
    end: Tensors
    choices: Choices
    noise: dict[str, list[float]]
    quantised: bool = False


def reference(run: RunConfig, count: int, orders: int) -> Reference:
    """Run one process, in one microbatch a step, and once more for every other order of rows.

    Args:
        run: config of the layout of one process, all rows in one microbatch.
        count: steps.
        orders: accumulation orders that are tried.
    """
    rows = run.train.global_batch_tokens // run.train.seq_len
    bench, watch, choices = build_bench(run, alone=True), Watch(grads=True), []
    assert isinstance(bench.engine.model, DeepSeekV4)
    start = weights(bench.engine)
    with recording(bench.engine.model, choices, rows):
        losses = steps(bench, count, watch=watch)
    end = weights(bench.engine)
    bench = build_bench(run, alone=True)
    set_gradients(bench.engine, watch.first)
    bench.engine.optimizer_step(run.optim.lr, finite=True)
    plain, fp32, chosen = run, watch.first, choices[:1]
    if run.quant.active:  # its casts take no float64
        plain = replace(run, quant=QuantConfig())
        fp32, chosen = _first_gradients(plain)
    exact = exact_gradients(plain, chosen)
    out = Reference(
        start, watch.rows, losses, watch.first, _distances(fp32, exact),
        weights(bench.engine), end, choices, {"losses": [], "weights": []},
        run.quant.active,
    )  # fmt: skip
    on_cpu = bench.engine.device.type == "cpu"
    workers = min(os.cpu_count() or 1, orders) if on_cpu else 1
    with ProcessPoolExecutor(max(1, workers), warm_context(), end_with_parent) as pool:
        for found in pool.map(_reordered, range(orders), *map(repeat, (run, count, out))):
            for name, values in out.noise.items():
                values.append(found[name])
        given = map(repeat, (plain, exact, chosen))
        for moved in pool.map(_reordered_rounding, range(orders), *given):
            out.rounding = {n: max(norm, moved[n]) for n, norm in out.rounding.items()}
    return out


def _reordered(seed: int, run: RunConfig, count: int, ref: Reference) -> dict[str, float]:
    """Distance of one process from itself with its rows in another order, 1, 2 or 4 at once."""
    bench, order = _in_another_order(seed, run)
    return from_reference(ref, steps(bench, count, order), weights(bench.engine))


def _reordered_rounding(
    seed: int, run: RunConfig, exact: Tensors, choices: Choices
) -> dict[str, float]:
    """How far the same orders leave each gradient of the first step from float64."""
    (bench, order), watch = _in_another_order(seed, run), Watch(grads=True)
    with replaying(bench.engine, choices):
        steps(bench, 1, order, watch)
    return _distances(watch.first, exact)


def _in_another_order(seed: int, run: RunConfig) -> tuple[Bench, list[int]]:
    torch.set_num_threads(1)
    rows = run.train.global_batch_tokens // run.train.seq_len
    micro = min(rows, 2 ** (seed % 3))
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    train = replace(run.train, micro_batch_size=micro)
    return build_bench(replace(run, train=train), alone=True), order


def _first_gradients(run: RunConfig) -> tuple[Tensors, Choices]:
    """Of the first step of one process, and what it chose."""
    bench, watch, choices = build_bench(run, alone=True), Watch(grads=True), []
    assert isinstance(bench.engine.model, DeepSeekV4)
    with recording(bench.engine.model, choices, run.train.global_batch_tokens // run.train.seq_len):
        steps(bench, 1, watch=watch)
    return watch.first, choices


def exact_gradients(run: RunConfig, choices: Choices) -> Tensors:
    """The gradients of the first step in float64, with equal choices.

    Some gradients are differences of equal numbers: in a fresh model the streams are nearly
    parallel and the norm after hc_head is blind to their length, so the gradient of hc_head is
    1e-9 of the global norm and has no digit that fp32 could hold.
    """
    model = replace(run.model, kernels="reference")
    bench = build_bench(replace(run, model=model), alone=True)
    exact = bench.engine.model
    assert isinstance(exact, DeepSeekV4)
    exact.double()
    exact.compute_dtype = exact.head_dtype = torch.float64
    step = plan_step(1, 0, bench.plan, run.train, run.optim)
    bench.phase.enter(step)
    rows = bench.loader.plan(step.num_rows, step.stage.seq_len)
    batches = microbatches(rows, step.num_rows, step.stage.micro_batch_size)
    with replaying(bench.engine, choices):
        bench.engine.forward_backward(batches, objective_of(step, rows.counts))
    return gradients(bench.engine)


def _distances(grads: Tensors, exact: Tensors) -> dict[str, float]:
    return {name: _norm(grad - exact[name]) for name, grad in grads.items()}


def from_gradients(ref: Reference, grads: Tensors) -> dict[str, Any]:
    """The farthest gradient, as it is and beside what fp32 itself does to it.

    ``gradient`` is ``|g - g1| / max(|g1|, |g1 - g64| * 3e5)``: 1e-5 means a relative distance of
    1e-5, or thrice the distance of one process's fp32 gradient from float64, whichever is larger.
    """
    assert grads.keys() == ref.grads.keys(), grads.keys() ^ ref.grads.keys()
    plain: list[tuple[float, str]] = []
    judged: list[tuple[float, str]] = []
    for name, one in ref.grads.items():
        distance, size = _norm(grads[name] - one), _norm(one)
        plain.append((distance / max(size, 1e-300), name))
        judged.append((distance / max(size, 3e5 * ref.rounding[name], 1e-300), name))
    worst, raw = max(judged), max(plain)
    return {
        "gradient": worst[0], "gradient_name": worst[1],
        "gradient_raw": raw[0], "gradient_raw_name": raw[1],
        "gradient_raw_rounding": ref.rounding[raw[1]] / max(_norm(ref.grads[raw[1]]), 1e-300),
    }  # fmt: skip


def from_update(ref: Reference, after: Tensors) -> dict[str, Any]:
    """The farthest update, relative to its own size."""
    found = [
        (_norm(after[n] - now) / max(_norm(now - ref.start[n]), 1e-300), n)
        for n, now in ref.updated.items()
        if now.is_floating_point() and not torch.equal(now, ref.start[n])
    ]
    worst, name = max(found)
    return {"update": worst, "update_name": name.removeprefix("model.")}


def from_reference(
    ref: Reference, losses: list[dict[str, float]], end: Tensors
) -> dict[str, float]:
    """The largest relative distance of any step's total loss, and of the way the weights went."""
    pairs = zip(losses, ref.losses, strict=True)
    apart = way = 0.0
    for name, now in ref.end.items():
        if now.is_floating_point():
            apart += _norm(end[name] - now) ** 2
            way += _norm(now - ref.start[name]) ** 2
    return {
        "losses": max(relative(a["total"], b["total"]) for a, b in pairs),
        "weights": math.sqrt(apart / way),
    }


def _norm(x: Tensor) -> float:
    return float(x.double().norm())


def relative(a: float, b: float) -> float:
    """Distance of a from b, beside the size of b."""
    return abs(a - b) / max(abs(b), 1e-300)
