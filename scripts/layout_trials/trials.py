"""What ``scripts/layouts.py`` does in each process: the trials of one layout, beside one process.

Everything is built by ``train/build.py`` and run by ``train/step.py``, as a run is. One process
gives the reference: its weights, losses, gradients, the choices of its gates and indexers, how far
its fp32 gradients are from float64, and how far it is from itself when it adds up its rows in
another order.
"""

# Legend: B rows, T tokens, N tokens of all rows, K experts or entries chosen
from __future__ import annotations

import hashlib
import inspect
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import repeat
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from data.batch import Batch, BatchCounts
from data.global_batch import GlobalBatch
from data.loader import Loader, build_loader
from data.prepare import build_tokenizer
from data.progress import end_with_parent
from model.transformer import DeepSeekV4
from parallel.collectives import whole
from parallel.config import EngineName
from parallel.deepspeed_engine import DeepSpeedEngine
from parallel.engine import Engine, Shares, Update
from parallel.launch import launched_world_size
from quant.config import QuantConfig
from train.build import build_compiled, build_engine, build_layout, build_model
from train.config.schema import RunConfig
from train.phase import PhaseSwitch
from train.stages import StagePlan, check_rows, resolve
from train.step import StepPlan, microbatches, objective_of, plan_step, train_step

Tensors = dict[str, Tensor]
RowKey = str
Choices = list[dict[RowKey, Tensors]]  # for every step and row: FQN -> indices [T, K]
ROW = "row"  # beside them: token and document ids [T, 2]


# ---- one process or one rank ---------------------------------------------------------------------
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


# ---- choices of gates and indexers ---------------------------------------------------------------
@contextmanager
def recording(model: nn.Module, into: Choices, rows: int) -> Iterator[None]:
    """Keep what gates and indexers of a whole model choose, row by row.

    Args:
        model: of one process.
        into: one entry a step is added.
        rows: of a step.
    """
    records: list[Tensors] = []

    def before(module: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = _arguments(module, args, named)
        records.append({})
        return (), given | {"objective": replace(given["objective"], record=records[-1])}

    def after(module: nn.Module, args: Any, named: dict[str, Any], _: Any) -> None:
        given, record = _arguments(module, args, named), records.pop()
        keys = row_keys(given["input_ids_BT"], given["document_ids_BT"])
        if not into or len(into[-1]) == rows:
            into.append({})
        rows_BT2 = torch.stack(
            (given["input_ids_BT"].cpu(), given["document_ids_BT"].cpu()), dim=-1
        )
        for i, key in enumerate(keys):
            into[-1][key] = {n: _rows_of(t, len(keys))[i].cpu() for n, t in record.items()}
            into[-1][key][ROW] = rows_BT2[i]

    hooks = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replaying(engine: Engine, choices: Choices) -> Iterator[None]:
    """Let gates and indexers choose what was recorded for each row, in whatever step it comes."""
    model = engine.model
    by_row: dict[RowKey, Tensors] = {}
    shard = next(iter(getattr(model, "stages", [model]))).kv_exchange.shard
    for chosen in (chosen for step in choices for chosen in step.values()):
        row_T2 = chosen[ROW]
        here = shard.tokens(len(row_T2))
        (key,) = row_keys(row_T2[None, here, 0], row_T2[None, :, 1])
        by_row[key] = {name: t[here] for name, t in chosen.items() if name != ROW}
    if isinstance(engine, DeepSpeedEngine):  # calls the model past its hooks
        forward = engine._forward

        def with_choices(batch: Batch, objective: Any) -> Any:
            keys = row_keys(batch.input_ids_BT, batch.document_ids_BT)
            rows = [by_row[key] for key in keys]
            replay = {name: _together(name, rows).to(engine.device) for name in rows[0]}
            return forward(batch, replace(objective, replay=replay))

        engine._forward = with_choices
        yield
        return

    def before(module: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = _arguments(module, args, named)
        ids_BT = given["input_ids_BT"]
        rows = [by_row[key] for key in row_keys(ids_BT, given["document_ids_BT"])]
        replay = {name: _together(name, rows).to(ids_BT.device) for name in rows[0]}
        stage: Any = module
        if "objective" not in given:  # a pipeline stage was told it before
            stage.objective = replace(stage.objective, replay=replay)
            return args, named
        return (), given | {"objective": replace(given["objective"], replay=replay)}

    stages: Any = getattr(model, "stages", [model])  # of a pipeline's rank
    hooks = [stage.register_forward_pre_hook(before, with_kwargs=True) for stage in stages]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _arguments(module: nn.Module, args: Any, named: dict[str, Any]) -> dict[str, Any]:
    """What a forward pass was given, by name."""
    return dict(inspect.signature(module.forward).bind(*args, **named).arguments)


def _rows_of(index: Tensor, num_rows: int) -> Tensor:
    """[N, K] of a gate or [B, T, K] of an indexer as [B, T, K]."""
    return index.view(num_rows, -1, index.shape[-1])


def _together(name: str, rows: list[Tensors]) -> Tensor:
    index_BTK = torch.stack([row[name] for row in rows])
    return index_BTK.flatten(0, 1) if name.endswith(".gate") else index_BTK


# ---- whole tensors -------------------------------------------------------------------------------
def gathered(named: Tensors) -> Tensors:
    """Whole tensors on the CPU by name, also those that only other ranks have. Collective."""
    mine = {name: whole(tensor).cpu().clone() for name, tensor in named.items()}
    if not dist.is_initialized():
        return mine
    names: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(names, set(mine))
    seen: set[str] = set()
    for rank, theirs in enumerate(names):
        new, seen = theirs - seen, seen | theirs
        if all(new <= other for other in names):
            continue
        parts = [{name: mine[name] for name in sorted(new)} if rank == dist.get_rank() else None]
        dist.broadcast_object_list(parts, src=rank, device=torch.device("cpu"))
        mine |= parts[0] or {}
    return mine


def gradients(engine: Engine) -> Tensors:
    """Whole gradients by name; a parameter without one has none."""
    return gathered({name: gradient.clone() for name, gradient in engine.gradients()})


def weights(engine: Engine) -> Tensors:
    """Whole parameters and saved buffers by name."""
    return gathered({n: t for n, t in engine.state().items() if n.startswith("model.")})


def set_gradients(engine: Engine, grads: Tensors) -> None:
    """Give every parameter its part of the same gradients; copies, which clipping scales."""
    for name, parameter in engine.model.named_parameters():
        grad = grads[name].to(engine.device, copy=True)
        if isinstance(parameter, DTensor):
            grad = distribute_tensor(
                grad, parameter.device_mesh, parameter.placements, src_data_rank=None
            )
        parameter.grad = grad


# ---- the reference -------------------------------------------------------------------------------
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
    context = get_context("spawn")
    with ProcessPoolExecutor(max(1, workers), context, end_with_parent) as pool:
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


# ---- the trials ----------------------------------------------------------------------------------
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
        out["loss"] = max(_relative(again[0][n], value) for n, value in ref.losses[0].items())
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


# ---- distances -----------------------------------------------------------------------------------
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
        "losses": max(_relative(a["total"], b["total"]) for a, b in pairs),
        "weights": math.sqrt(apart / way),
    }


def _same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def _norm(x: Tensor) -> float:
    return float(x.double().norm())


def _relative(a: float, b: float) -> float:
    return abs(a - b) / max(abs(b), 1e-300)
