"""Runs of a study: what each is, its config and command line, where it lies when finished."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from scripts.studies.config import AGAIN, StudyConfig
from scripts.studies.store import FinishedRun, Store, identity_of
from train.config.command_line import compose_run
from train.config.schema import Precision, RunConfig
from train.errors import ROOT, UserError
from train.preflight.forecast import run_flops
from train.stages import resolve

AGAIN_OFFSET = 1_000_003  # init_seed_offset of the A/A arm


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        arm: it belongs to.
        steps: optimizer steps.
        lr: learning rate.
        seed: of data order and initialisation.
        source: folder of the weights that it evaluates; empty: it trains.
        settings: overrides that the search tries, or has chosen.
    """

    arm: str
    steps: int
    lr: float
    seed: int
    source: str = ""
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sweep:
    """Runs of one arm that differ in one thing: one call of ``train/pretrain.py``.

    Attributes:
        title: for the plan.
        cells: the runs.
        swept: ``seed`` or ``optim.lr``.
    """

    title: str
    cells: tuple[Cell, ...]
    swept: str


def from_root(path: Path) -> str:
    """A path as a config holds it: from the repository's root where it lies below it."""
    absolute = path.resolve()
    return str(absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else absolute)


def flops_per_token(run: RunConfig) -> float:
    """Forward and backward, per trained token, over all stages of a run."""
    plan = resolve(run)
    return run_flops(run, plan) / plan.end_tokens


@dataclass
class StudyRuns:
    """Runs of one study by their cells.

    Args:
        study: the config.
        store: finished runs.
        out: folder below which runs are made.
        recorded: which run was which cell's when the study was archived; None: runs are found by
            the configs that today's defaults give.
    """

    study: StudyConfig
    store: Store
    out: Path
    recorded: Mapping[Cell, FinishedRun] | None = None
    _configs: dict[tuple[str, tuple[str, ...]], RunConfig] = field(default_factory=dict)
    _identities: dict[Cell, str] = field(default_factory=dict)

    def find(self, cell: Cell) -> FinishedRun | None:
        """The finished run of a cell, or None."""
        if self.recorded is not None:
            return self.recorded.get(replace(cell, source=""))
        cell = replace(cell, source="")
        if cell not in self._identities:
            self._identities[cell] = identity_of(self.config(cell), self.evaluates(cell.arm))
        return self.store.runs.get(self._identities[cell])

    def config(self, cell: Cell) -> RunConfig:
        """The config of a cell, up to its folder."""
        key = cell.arm, cell.settings
        if key not in self._configs:
            run = self._configs[key] = compose_run(self.overrides(cell))
            if Precision.auto in (run.train.precision, run.train.head_precision):
                raise UserError(
                    f"base: train.precision={run.train.precision.value},"
                    f" train.head_precision={run.train.head_precision.value} depend on the machine;"
                    " a study compares runs in one precision: give fp32 or bf16"
                )
        run = self._configs[key]
        train = replace(run.train, steps=cell.steps, eval_every=self._eval_every(cell))
        return replace(run, seed=cell.seed, optim=replace(run.optim, lr=cell.lr), train=train)

    def _eval_every(self, cell: Cell) -> int:
        return math.ceil(cell.steps / min(cell.steps, self.study.evaluations))

    def overrides(self, cell: Cell) -> list[str]:
        """Everything that the command line of a cell says but its folder."""
        study = self.study
        again = cell.arm == AGAIN
        arm = study.arms[study.baseline if again else cell.arm]
        own = [*study.base, *study.overrides_of(study.baseline if again else cell.arm)]
        own += cell.settings
        own += [f"train.steps={cell.steps}", f"train.eval_every={self._eval_every(cell)}"]
        own += [f"optim.lr={cell.lr!r}", f"seed={cell.seed}"]
        own += [f"init_seed_offset={AGAIN_OFFSET}"] if again else []
        # on the rows of the others' last evaluation
        own += ["train.eval_only=true", "train.final_eval_tokens=null"] if arm.evaluates else []
        own += [f"init_from='{cell.source}'"] if cell.source else []
        return own

    def command(self, batch: Sweep, launcher: Sequence[str] = ()) -> list[str]:
        """Arguments of ``train/pretrain.py`` for what a batch lacks.

        Args:
            batch: its runs.
            launcher: overrides that choose Hydra's launcher; empty: in turn.
        """
        first, swept = batch.cells[0], batch.swept
        fixed = [word for word in self.overrides(first) if not word.startswith(f"{swept}=")]
        stem = self._stem(first, swept)
        values = [repr(cell.lr if swept == "optim.lr" else cell.seed) for cell in batch.cells]
        if len(values) == 1:
            return [*fixed, f"{swept}={values[0]}", f"run_dir='{stem}/{swept}={values[0]}'"]
        return ["-m", *launcher, *fixed, f"{swept}={','.join(values)}", f"run_dir='{stem}'"]

    def _stem(self, cell: Cell, swept: str) -> Path:
        """Folder of a batch, named by what its runs share."""
        shared = replace(self.config(cell), seed=0)
        shared = replace(shared, optim=replace(shared.optim, lr=1.0))
        name = f"{cell.arm}_{cell.steps}_{identity_of(shared, self.evaluates(cell.arm))}"
        fixed = f"seed{cell.seed}" if swept == "optim.lr" else f"lr{cell.lr!r}"
        return self.out / name / fixed

    def evaluates(self, arm: str) -> bool:
        """Whether an arm trains nothing, and evaluates what another one trained."""
        return arm != AGAIN and bool(self.study.arms[arm].evaluates)
