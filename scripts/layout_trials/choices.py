"""Choices of gates and indexers: recorded row by row in one process, and replayed in any layout."""

# Legend: B rows, T tokens, N tokens of all rows, K experts or entries chosen
from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from data.batch import Batch
from parallel.deepspeed_engine import DeepSpeedEngine
from parallel.engine import Engine
from scripts.layout_trials.steps import RowKey, row_keys
from scripts.layout_trials.whole_tensors import Tensors

Choices = list[dict[RowKey, Tensors]]  # for every step and row: FQN -> indices [T, K]
ROW = "row"  # beside them: token and document ids [T, 2]


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
