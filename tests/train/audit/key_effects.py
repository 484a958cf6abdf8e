"""What a config leads to, as values that can be compared: the effects that a key may have.

Each function takes a run and a folder and gives the plan, a table, one step's bits, what a run
leaves behind, or the arguments with which something outside is called. Two configs differ in an
effect when these values differ.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import pkgutil
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from data.epochs import planned_uses
from data.loader import build_loader
from data.prepare import build_tokenizer
from model.config import LayerKind
from model.linear import GroupedLinear
from model.parameter_counts import parameter_shapes
from optim.groups import build_table
from parallel.config import ParallelConfig
from parallel.zero_config import deepspeed_config
from scripts.benchmarks.launches import block_pass
from tests.helpers import random_rows
from train import build
from train.config.recovery import Remedy
from train.config.schema import Device, RunConfig
from train.display import console
from train.errors import USER_ERRORS
from train.phase import PhaseSwitch
from train.preflight import fit, world
from train.pretrain import _train
from train.record.metrics import read_metrics, unmeasured
from train.record.params_table import table_rows
from train.recovery.judge import Recovery
from train.stages import resolve
from train.step import plan_step, train_step

Effect = Callable[[RunConfig, Path], Any]
CPU = world.World(1, "cpu", 1 << 50)


def plan(run: RunConfig, _: Path) -> Any:
    """The stages, and what each step does."""
    found, steps, tokens = resolve(run), [], 0
    for number in range(1, found.steps + 1):
        steps.append(plan_step(number, tokens, found, run.train, run.optim))
        tokens += steps[-1].batch_tokens
    return found, steps


def params(run: RunConfig, _: Path) -> Any:
    """Rows of params.csv, without quantisation."""
    table = build_table(parameter_shapes(run.model), run.optim, run.model.split_counts)
    return table_rows(table, run.train, ())


def memory(run: RunConfig, _: Path) -> Any:
    """The fit table."""
    return fit.report(run, resolve(run), ParallelConfig(dp_shard=1), CPU)


def step(run: RunConfig, _: Path, count: int = 1) -> Any:
    """Bits of the model, optimizer and averaged weights after a step, or some, on made-up rows."""
    loader = SimpleNamespace(token_counts=lambda size: torch.ones(size, dtype=torch.int64))
    compiled = build.build_compiled(run)
    model = build.build_model(run, loader, None, compiled)  # pyright: ignore[reportArgumentType]
    engine = build.build_engine(run, model, None)
    average = build.build_average(run, model)
    stages = resolve(run)
    first = plan_step(1, 0, stages, run.train, run.optim)
    phase = PhaseSwitch(engine, run.quant)
    phase.enter(first)
    rows = random_rows(
        first.num_rows, first.stage.seq_len, 260, 1 + run.model.num_nextn_predict_layers
    )
    for number in range(1, count + 1):
        result = train_step(engine, rows, replace(first, number=number))
    state = engine.state()
    if average is not None:
        average.update()
        state |= average.state()
    ops = [
        m.op.__name__ for m in model.modules() if isinstance(m, GroupedLinear) and not phase.records
    ]
    return digest(state), result.update, {k: float(v) for k, v in result.shares.losses.items()}, ops


two_steps = partial(step, count=2)


def launches(run: RunConfig, _: Path) -> Any:
    """What one block that chooses entries starts on a GPU, forward and backward."""
    chooses = [run.model.kind(i) for i in range(run.model.num_hidden_layers)].index(LayerKind.csa)
    found = block_pass(run.model, chooses, 64)
    return found.forward, found.backward


def data(run: RunConfig, _: Path) -> Any:
    """What sources hold, the tokenizer, the first rows and the held-out ones."""
    tokenizer = build_tokenizer(run.data)
    loader = build_loader(run.data, tokenizer, run.seed, 2)
    first = loader.plan(8, 32).batch(0, 8)
    held = [b.batch(0, len(b.rows)).input_ids_BT.tolist() for b in loader.validation(32, 0)]
    return loader.manifest, first.input_ids_BT.tolist(), held


def foretold(run: RunConfig, _: Path) -> Any:
    """What is told of the sources before the first step."""
    loader = build_loader(run.data, build_tokenizer(run.data), run.seed, 2)
    found = planned_uses(loader.source_tokens, loader.weights, 1e4, loader.stated_tokens)
    return [(use.name, use.foretold_epochs) for use in found]


def recovery(run: RunConfig, _: Path) -> Any:
    """Verdicts over a series of losses with spikes and steps that are not finite."""
    judge, found = Recovery(run.train.recovery), []
    losses = [5 + 0.01 * (i % 3) for i in range(12)] + [5.3, 9.0, 9.0, 9.0, 9.0]
    losses += [5.0] * 8 + [math.inf] * 4 + [5.0, 9.0, 9.0, 9.0] + [5.0] * 8
    for number, loss in enumerate(losses, 1):
        planned = SimpleNamespace(number=number, stage=SimpleNamespace(name="all"))
        shares = SimpleNamespace(losses={"loss": torch.tensor(loss)}, total=torch.tensor(loss))
        taken = judge.accepts(planned, shares) and math.isfinite(loss)  # pyright: ignore
        update = SimpleNamespace(applied=taken, grad_norm=loss)
        verdict = judge.after(planned, SimpleNamespace(shares=shares, update=update))  # pyright: ignore
        found.append((taken, verdict, judge.anticipates(number), judge.skip_steps))
        if verdict.remedy is Remedy.rollback:
            judge.roll_back(number - 4, {"losses": judge.state.losses, "stage": "all"})
    return found


def outcome(run: RunConfig, folder: Path) -> Any:
    """What a whole run leaves: exit code, files, metrics, final evaluation, text, console lines."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = console.log
    before = logger.level
    logger.setLevel(logging.INFO)  # not by the attribute: loggers remember what they let pass
    logger.addHandler(handler)
    try:
        code = _train(run, None)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    found: dict[str, Any] = {"code": code, "lines": len(lines)}
    found["files"] = sorted(
        "events" if p.name.startswith("events.") else str(p.relative_to(folder))
        for p in folder.rglob("*") if "cache" not in p.parts
    )  # fmt: skip
    for path in folder.rglob("metrics.jsonl"):
        found["metrics"] = [unmeasured(record) for record in read_metrics(path)]
    for path in folder.rglob("receipt.json"):
        found["validation"] = json.loads(path.read_text()).get("validation")
    for path in folder.rglob("sample.txt"):
        found["text"] = path.read_text()
    for child in folder.iterdir():
        if child.name != "cache":
            shutil.rmtree(child)
    return found


def zero_json(run: RunConfig, _: Path) -> Any:
    """What DeepSpeed is told."""
    return deepspeed_config(run.engine, 1, run.optim.grad_clip, pin_memory=False)


class HandedError(BaseException):
    """Ends a call at the place that was asked about."""


def handed(target: str, call: Callable[[RunConfig], Any]) -> Effect:
    """With which arguments ``call`` reaches ``target``, which is not run."""

    def effect(run: RunConfig, _: Path) -> Any:
        seen: list[Any] = []

        def spy(*args: Any, **kwargs: Any) -> Any:
            seen.append((args, kwargs))
            raise HandedError

        with patch(target, spy):
            try:
                call(run, None) if call is _train else call(run)
            except HandedError:
                pass
        return repr(seen)

    return effect


def called(target: str) -> Effect:
    """The shapes with which one step calls ``target``, which is run."""

    def effect(run: RunConfig, folder: Path) -> Any:
        original, seen = pkgutil.resolve_name(target), []

        def spy(*args: Any, **kwargs: Any) -> Any:
            seen.append([tuple(a.shape) for a in args if isinstance(a, torch.Tensor)])
            return original(*args, **kwargs)

        with patch(target, spy):
            step(run, folder)
        assert seen, target
        return seen

    return effect


def or_refused(effect: Effect) -> Effect:
    """The effect, where one of the two values is refused: its line then."""

    def either(run: RunConfig, folder: Path) -> Any:
        try:
            return effect(run, folder)
        except USER_ERRORS as error:
            return f"refused: {error}"

    return either


def device(run: RunConfig, _: Path) -> Any:
    """Where the run would compute on a machine without CUDA."""
    with patch("torch.cuda.is_available", lambda: False):
        return world.this_world(Device(run.train.device))


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Hash of names, dtypes and bits."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
