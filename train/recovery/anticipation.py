"""Anticipatory routing: experts chosen by the weights of some steps before (reference C.3, B.9).

At step t features and routing weights come from the weights of step t; which experts a token goes
to was decided ``lag`` steps earlier: that step fetched the batch of step t, ran it forward and kept
the choices of the learned gates, MTP's included. The choices that wait for their step are part of a
checkpoint, one tensor [rows, tokens, experts per token] of the global batch for each gate, so a run
resumes to the bit and under another layout.

The first ``lag`` steps of the mode, and those of a stage, choose for themselves.
"""

# Legend: R rows of this process, T tokens of them that it computes, K experts per token
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.batch import Batch, BatchCounts
from data.loader import Loader
from model.config import Router
from model.moe.router import Gate
from parallel.engine import Engine
from train.config.schema import RunConfig
from train.stages import StagePlan
from train.step import StepPlan, StepRows, microbatches, objective_of, plan_step

PREFIX = "anticipated"
_STORED = torch.int16  # a choice while it waits


@dataclass(frozen=True)
class RoutedRows:
    """Rows whose experts are chosen.

    Attributes:
        rows: of the global batch.
        first: the first row that this process computes.
        chosen: gate -> experts [R, T, K] of its rows, of the tokens that it computes.
    """

    rows: StepRows
    first: int
    chosen: Mapping[str, Tensor]

    @property
    def counts(self) -> BatchCounts:
        """Normalisers of the whole batch."""
        return self.rows.counts

    def batch(self, start: int, stop: int) -> Batch:
        """Tensors of some of this process's rows."""
        here = slice(start - self.first, stop - self.first)
        routing = {name: e_RTK[here].flatten(0, 1).long() for name, e_RTK in self.chosen.items()}
        return replace(self.rows.batch(start, stop), routing=routing)


class Anticipation:
    """Looks ahead, keeps choices until their step.

    Args:
        run: the config.
        plan: its stages.
        engine: runs the model.
        loader: plans batches.
        wanted: whether a step, by its number, is to be routed by earlier weights.
    """

    def __init__(
        self,
        run: RunConfig,
        plan: StagePlan,
        engine: Engine,
        loader: Loader,
        wanted: Callable[[int], bool],
    ) -> None:
        self._run, self._plan, self._engine, self._loader = run, plan, engine, loader
        self._wanted, self._lag = wanted, run.train.recovery.anticipatory_lag
        self._chosen: dict[int, dict[str, Tensor]] = {}

    def rows(self, step: StepPlan, rows: StepRows) -> StepRows:
        """Look ahead with the weights of before ``step``; give ``rows`` their experts, if chosen.

        Args:
            step: that comes now.
            rows: its rows, just taken from the loader.
        """
        if self._wanted(step.number + self._lag):
            self._look_ahead(step)
        chosen = self._chosen.pop(step.number, None)
        if chosen is None or not self._wanted(step.number):
            return rows
        return RoutedRows(rows, self._first(step), chosen)

    def forget(self) -> None:
        """Drop what was chosen: other batches come."""
        self._chosen = {}

    def state(self, step: int) -> dict[str, Tensor]:
        """Tensors of a checkpoint: choices of steps to come, of the global batch.

        Args:
            step: that was just done. Names count from it, so that all checkpoints have the same.
        """
        return {
            f"{PREFIX}.+{number - step}.{name}": self._engine.spread_rows(chosen_RTK)
            for number, chosen in self._chosen.items()
            for name, chosen_RTK in chosen.items()
        }

    def allocate(self, saved: Mapping[str, Sequence[int]], step: int) -> dict[str, Tensor]:
        """Make room for the choices that a checkpoint holds, and return what is to be filled.

        Args:
            saved: name -> shape of all its tensors.
            step: of the checkpoint.
        """
        engine, self._chosen = self._engine, {}
        engine.cut_rows(self._plan.stage(self._plan.tokens_at(step)).cp)  # as when they were chosen
        fill: dict[str, Tensor] = {}
        for full_name, shape in saved.items():
            if full_name.startswith(f"{PREFIX}."):
                _, number, name = full_name.split(".", 2)
                # Without "+" the number is of the step itself: as checkpoints had it before.
                target = step + int(number) if number.startswith("+") else int(number)
                rows, tokens, experts = shape
                mine = (rows // engine.data_degree, tokens // engine.shard.count, experts)
                empty = torch.empty(mine, dtype=_STORED, device=engine.device)
                self._chosen.setdefault(target, {})[name] = empty
                fill[full_name] = engine.spread_rows(empty)
        return fill

    def _first(self, step: StepPlan) -> int:
        return step.num_rows // self._engine.data_degree * self._engine.data_rank

    def _look_ahead(self, step: StepPlan) -> None:
        """Choose for the step ``lag`` steps on, if it is in this stage and nothing is chosen."""
        target, rows = step, None
        for ahead in range(1, self._lag + 1):
            target = plan_step(
                target.number + 1, target.tokens + target.batch_tokens, self._plan,
                self._run.train, self._run.optim,
            )  # fmt: skip
            if target.stage is not step.stage or target.number > self._plan.steps:
                return
            rows = self._loader.plan_ahead(ahead, target.num_rows, target.stage.seq_len)
        if rows is not None and target.number not in self._chosen:
            self._chosen[target.number] = self._choose(target, rows)

    def _choose(self, target: StepPlan, rows: StepRows) -> dict[str, Tensor]:
        engine = self._engine
        objective = replace(
            objective_of(target, rows.counts),
            indexer_weight=0.0,
            balance_weight=0.0,
            monitors=False,
            losses=False,
        )
        batches = microbatches(
            rows, target.num_rows, target.stage.micro_batch_size,
            engine.data_rank, engine.data_degree,
        )  # fmt: skip
        records = engine.choices(batches, objective)
        T = target.stage.seq_len // engine.shard.count
        return {
            name: torch.cat([r[name].view(-1, T, r[name].shape[-1]) for r in records]).to(_STORED)
            for name in records[0]
            if self._is_learned_gate(name)
        }

    def _is_learned_gate(self, name: str) -> bool:
        """Not an indexer, and not a table, which chooses alike at all times."""
        module = self._engine.model.get_submodule(name)
        return isinstance(module, Gate) and module.router is Router.learned
