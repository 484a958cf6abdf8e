"""A study's runs in order: search of learning rates, then fresh seeds, then the side questions.

Nothing is remembered between starts: every decision is a function of the study and of the finished
runs, so a study that was killed goes on where it was. Runs are started by ``train/pretrain.py``, a
batch of them (one arm, one thing swept) by Hydra's ``-m`` and its launcher, which names their
folders. The folder is the same whether one or several runs of a batch are left to do.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from scripts.studies.config import AGAIN, ArmConfig, StudyConfig
from scripts.studies.sequential import Design, Standing, design, take_look
from scripts.studies.store import FinishedRun, Store, identity_of
from train.config.command_line import compose_run
from train.config.schema import Precision, RunConfig
from train.errors import ROOT, UserError

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


@dataclass(frozen=True)
class Choice:
    """What the search found for an arm.

    Attributes:
        tried: learning rate -> validation loss of the search's run, ascending; only finished ones.
        missing: learning rates still to run, given what is known.
        best: the chosen one; None while runs are missing or where there is no answer.
        reason: why there is no answer.
    """

    tried: Mapping[float, float]
    missing: tuple[float, ...] = ()
    best: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Tuning:
    """What the search found behind the learning rate.

    Attributes:
        settings: the best overrides so far.
        tried: overrides -> validation loss of the search's run.
        missing: runs to do next; later keys depend on them.
    """

    settings: tuple[str, ...] = ()
    tried: Mapping[tuple[str, ...], float] = field(default_factory=dict)
    missing: tuple[Cell, ...] = ()


@dataclass(frozen=True)
class ArmStanding:
    """What is decided of an arm so far.

    Attributes:
        wanted: seeds it is to have by now.
        judged: seeds of the last look that is complete; 0: none yet.
        critical: |t| that was needed there.
        sign: +1 above the baseline, -1 below, 0 no verdict.
        end: why it gets no more seeds; empty while it is open.
    """

    wanted: int
    judged: int = 0
    critical: float = math.inf
    sign: int = 0
    end: str = ""


def from_root(path: Path) -> str:
    """A path as a config holds it: from the repository's root where it lies below it."""
    absolute = path.resolve()
    return str(absolute.relative_to(ROOT) if absolute.is_relative_to(ROOT) else absolute)


def choose(
    grid: Sequence[float], loss_of: Mapping[float, float], factor: float, extensions: int
) -> Choice:
    """Choose a learning rate that lies between others, extending the grid where the edge is best.

    Args:
        grid: ascending.
        loss_of: validation loss of what has been run; infinite for a run that diverged.
        factor: between a new learning rate and the edge.
        extensions: how many may be added.
    """
    rates = list(grid)
    while True:
        tried = {rate: loss_of[rate] for rate in rates if rate in loss_of}
        missing = tuple(rate for rate in rates if rate not in loss_of)
        if missing:
            return Choice(tried, missing)
        best = min(rates, key=lambda rate: loss_of[rate])
        if not math.isfinite(loss_of[best]):
            return Choice(tried, reason="every run of the search diverged")
        if best not in (rates[0], rates[-1]):
            return Choice(tried, best=best)
        if len(rates) - len(grid) >= extensions:
            side = "lowest" if best == rates[0] else "highest"
            return Choice(
                tried,
                reason=f"the best learning rate, {best:g}, is the {side} of {len(rates)} tried"
                f" ({rates[0]:g} to {rates[-1]:g})",
            )
        new = best / factor if best == rates[0] else best * factor
        rates = sorted([*rates, float(f"{new:.6g}")])


@dataclass
class Protocol:
    """The runs of one study.

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

    # ---- what to run -------------------------------------------------------------------------
    @property
    def search_steps(self) -> int:
        """Steps of a run of the baseline's search."""
        return self.shortened(self.study.search.fraction)

    def steps_of(self, arm: str) -> int:
        """Steps of an arm's runs."""
        config = self.study.arms[self.study.baseline if arm == AGAIN else arm]
        trained = self.study.arms[config.evaluates] if config.evaluates else config
        if trained.seconds_of:
            return self._steps_in_time(trained) or self.study.steps
        return trained.steps or self.shortened(trained.fraction)

    def _steps_in_time(self, arm: ArmConfig) -> int:
        """Steps that an arm makes in another's time; 0 while a search of theirs is not done."""
        theirs, own = self._pace(arm.seconds_of), self._pace(arm.like)
        if not theirs or not own:
            return 0
        return max(1, round(self.steps_of(arm.seconds_of) * theirs / own))

    def _pace(self, arm: str) -> float:
        """Seconds a step in an arm's search, median of runs; 0 while it is not done.

        Of the process's CPU time on a CPU, which other work there disturbs less; else wall-clock.
        """
        choice = self.choice(arm)
        if choice.missing:
            return 0.0
        cells = [self._search_cell(arm, rate) for rate in choice.tried]
        runs = [run for cell in cells if (run := self.find(cell)) is not None]
        return statistics.median(run.step_seconds for run in runs) if runs else 0.0

    @property
    def trained_arms(self) -> list[str]:
        """Arms that train, the baseline first."""
        names = [name for name, arm in self.study.arms.items() if not arm.evaluates]
        return sorted(names, key=lambda name: name != self.study.baseline)

    def choice(self, arm: str) -> Choice:
        """Where the search of an arm stands."""
        arm = self.study.baseline if arm == AGAIN else self.study.arms[arm].evaluates or arm
        search = self.study.search
        losses = {}
        grid = self.study.grid(arm)
        while True:
            choice = choose(grid, losses, search.factor, search.extensions)
            found = {
                rate: run
                for rate in choice.missing
                if (run := self.find(self._search_cell(arm, rate))) is not None
            }
            if not found:
                return choice
            losses |= {rate: run.val_loss for rate, run in found.items()}

    def tuning(self, arm: str) -> Tuning:
        """Where the search of an arm's other keys stands; nothing before the learning rate."""
        arm = self.study.baseline if arm == AGAIN else self.study.arms[arm].evaluates or arm
        choice = self.choice(arm)
        if choice.best is None:
            return Tuning()
        best: tuple[str, ...] = ()
        lowest, tried = choice.tried[choice.best], {}
        for key, values in self.study.tune_of(arm).items():
            asked = [(*best, f"{key}={value}") for value in values]
            cells = [self._search_cell(arm, choice.best, settings) for settings in asked]
            runs = [self.find(cell) for cell in cells]
            tried |= {c.settings: r.val_loss for c, r in zip(cells, runs, strict=True) if r}
            missing = tuple(c for c, run in zip(cells, runs, strict=True) if run is None)
            if missing:
                return Tuning(best, tried, missing)
            winner = min(asked, key=tried.__getitem__)
            if tried[winner] < lowest:
                best, lowest = winner, tried[winner]
        return Tuning(best, tried)

    def batches(self) -> Iterator[Sweep]:
        """Runs that can be started now and are not finished, in order; empty when all is done.

        Later ones depend on the results of earlier ones: ask again after each.
        """
        yield from self._search()
        if any(self.choice(arm).best is None for arm in self.trained_arms):
            return
        for arm in self.trained_arms:
            for cell in self.tuning(arm).missing:
                yield Sweep(f"tuning, {arm}, {cell.settings[-1]}", (cell,), "seed")
        if any(self.tuning(arm).missing for arm in self.trained_arms):
            return
        yield from self._seeds()

    def results(self, arm: str, steps: int = 0) -> dict[int, FinishedRun]:
        """Seed -> finished run of an arm at its chosen learning rate.

        Args:
            arm: its name, or :data:`AGAIN`.
            steps: of the runs; 0: the arm's own.
        """
        steps = steps or self.steps_of(arm)
        return self._found(arm, steps, self.seeds_by_now(arm, steps))

    def seeds_by_now(self, arm: str, steps: int = 0) -> list[int]:
        """Seeds that an arm is to have: all, or those up to the next look.

        Args:
            arm: its name, or :data:`AGAIN`.
            steps: of the runs; 0: the arm's own.
        """
        wanted = dict(self._wanted_seeds())
        return wanted.get((arm, steps or self.steps_of(arm)), list(self.study.seeds))

    def _found(self, arm: str, steps: int, seeds: Sequence[int]) -> dict[int, FinishedRun]:
        cells = self._seed_cells(arm, steps, seeds)
        found = {cell.seed: self.find(cell) for cell in cells}
        return {seed: run for seed, run in found.items() if run is not None}

    def _seed_cells(self, arm: str, steps: int, seeds: Sequence[int]) -> list[Cell]:
        """Runs of an arm as it was tuned; none before it is."""
        rate, tuning = self.choice(arm).best, self.tuning(arm)
        if rate is None or tuning.missing:
            return []
        return [Cell(arm, steps, rate, seed, settings=tuning.settings) for seed in seeds]

    # ---- looks -------------------------------------------------------------------------------
    @property
    def others(self) -> list[str]:
        """Arms that are compared with the baseline."""
        return [name for name in self.study.arms if name != self.study.baseline]

    @property
    def bounds(self) -> Design:
        """Looks and critical values."""
        study, asked = self.study, self.study.sequential
        return design(study.looks, study.level, len(self.others), asked.spending, asked.futility)

    def standings(self) -> dict[str, ArmStanding]:
        """Where the comparison of each arm stands, from the finished runs alone."""
        study, bounds = self.study, self.bounds
        standing = Standing.fresh(1, len(self.others))
        for look, n in enumerate(bounds.looks):
            if not standing.open_RA.any() or (found := self._losses(n, standing)) is None:
                break
            take_look(bounds, look, standing, *found)
        done = int(standing.seeds_RA.max(initial=0))
        coming = next((n for n in bounds.looks if n > done), len(study.seeds))
        return {
            arm: ArmStanding(
                coming if standing.open_RA[0, i] else int(standing.seeds_RA[0, i]),
                int(standing.seeds_RA[0, i]), float(standing.needed_RA[0, i]),
                int(standing.sign_RA[0, i]), _end(standing, i, len(study.seeds)),
            )
            for i, arm in enumerate(self.others)
        }  # fmt: skip

    def _losses(self, n: int, standing: Standing) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Differences of the open arms and of the A/A pair on the first n seeds; None: not yet."""
        study = self.study
        seeds = study.seeds[:n]
        wanted = [study.baseline, *([AGAIN] if study.again else [])]
        wanted += [
            arm for arm, is_open in zip(self.others, standing.open_RA[0], strict=True) if is_open
        ]
        losses: dict[str, np.ndarray] = {}
        for arm in wanted:
            runs = self._found(arm, self.steps_of(arm), seeds)
            if len(runs) < n:
                return None
            losses[arm] = np.array([runs[seed].val_loss for seed in seeds])
        base_N, nothing = losses[study.baseline], np.zeros(n)
        with np.errstate(invalid="ignore"):
            x_AN = np.stack([losses[a] - base_N if a in losses else nothing for a in self.others])
            again_N = losses[AGAIN] - base_N if study.again else None
        return x_AN[None], None if again_N is None else again_N[None]

    def _search_cell(self, arm: str, rate: float, settings: tuple[str, ...] = ()) -> Cell:
        steps = max(1, round(self.steps_of(arm) * self.study.search.fraction))
        return Cell(arm, steps, rate, self.study.search.seed, settings=settings)

    def _search(self) -> Iterator[Sweep]:
        for arm in self.trained_arms:
            timed = self.study.arms[arm]
            if timed.seconds_of and not self._steps_in_time(timed):
                continue  # its length depends on searches that are not done
            missing = self.choice(arm).missing
            cells = tuple(self._search_cell(arm, rate) for rate in missing)
            if cells:
                yield Sweep(f"search, {arm}", cells, "optim.lr")

    def _wanted_seeds(self, at_most: bool = False) -> list[tuple[tuple[str, int], list[int]]]:
        """(arm, steps) of everything that has the study's seeds, in order, and which seeds by now.

        Arms that evaluate what others trained come last.

        Args:
            at_most: what it would be if every open arm stayed open.
        """
        study, ask = self.study, self.study.catch_up
        wanted = dict.fromkeys([*study.arms, AGAIN], len(study.seeds))
        if study.is_sequential:
            for arm, standing in self.standings().items():
                ended = standing.end or not at_most
                wanted[arm] = standing.wanted if ended else len(study.seeds)
            for arm in self.others:  # what it evaluates must have been trained
                source = study.arms[arm].evaluates
                if source and source != study.baseline:
                    wanted[source] = max(wanted[source], wanted[arm])
            wanted[study.baseline] = max(wanted[arm] for arm in self.others)
            wanted[AGAIN] = wanted[study.baseline]
        found = [((arm, self.steps_of(arm)), wanted[arm]) for arm in self.trained_arms]
        if study.again:
            found.append(((AGAIN, self.steps_of(AGAIN)), wanted[AGAIN]))
        if ask.arm:
            both = min(wanted[ask.arm], wanted[ask.to])
            found += [((ask.arm, self.shortened(f)), both) for f in ask.fractions]
        found += [
            ((arm, self.steps_of(arm)), wanted[arm]) for arm in study.arms if self._evaluates(arm)
        ]
        return [(key, study.seeds[:n]) for key, n in found]

    def finished(self) -> dict[Cell, FinishedRun]:
        """Every run that the study's answer rests on, the search's too."""
        cells = [
            self._search_cell(arm, rate)
            for arm in self.trained_arms
            for rate in self.choice(arm).tried
        ]
        for arm in self.trained_arms:
            rate = self.choice(arm).best
            if rate is not None:
                cells += [self._search_cell(arm, rate, s) for s in self.tuning(arm).tried]
        for (arm, steps), seeds in self._wanted_seeds():
            cells += self._seed_cells(arm, steps, seeds)
        found = {cell: self.find(cell) for cell in cells}
        return {cell: run for cell, run in found.items() if run is not None}

    def _seeds(self) -> Iterator[Sweep]:
        for (arm, steps), seeds in self._wanted_seeds():
            if self._evaluates(arm):
                continue
            cells = [c for c in self._seed_cells(arm, steps, seeds) if not self._is_done(c)]
            if cells:
                short = "" if steps == self.steps_of(arm) else f", {steps} steps"
                yield Sweep(f"seeds, {arm}{short}", tuple(cells), "seed")
        yield from self._evaluations()

    def _evaluations(self) -> Iterator[Sweep]:
        for name, arm in self.study.arms.items():
            if not arm.evaluates:
                continue
            for seed, source in self.results(arm.evaluates).items():
                steps = self.steps_of(name)
                (cell,) = self._seed_cells(name, steps, [seed])
                cell = replace(cell, source=from_root(source.folder))
                if self.find(cell) is None and source.has_weights:
                    yield Sweep(f"evaluation, {name}, seed {seed}", (cell,), "seed")

    def plan(self, at_most: bool = False) -> Iterator[tuple[str, Cell, int, int]]:
        """Title, an example, how many runs are wanted and how many are finished, in order.

        What depends on a learning rate that is not chosen yet is shown at the grid's middle.

        Args:
            at_most: with all seeds of every open arm; otherwise up to the next look.
        """
        study = self.study
        for arm in self.trained_arms:
            choice, grid = self.choice(arm), study.grid(arm)
            wanted = len(choice.tried) + len(choice.missing)
            example = self._search_cell(arm, grid[len(grid) // 2])
            yield f"search, {arm}", example, wanted, len(choice.tried)
            if tuned := study.tune_of(arm):
                wanted = sum(len(values) for values in tuned.values())
                yield f"tuning, {arm}", example, wanted, len(self.tuning(arm).tried)
        for (arm, steps), seeds in self._wanted_seeds(at_most):
            grid = study.grid(study.baseline if arm == AGAIN else arm)
            rate = self.choice(arm).best or grid[len(grid) // 2]
            done = len(self._found(arm, steps, seeds))
            yield f"seeds, {arm}", Cell(arm, steps, rate, study.seeds[0]), len(seeds), done

    def _is_done(self, cell: Cell) -> bool:
        """A run whose weights an arm still has to evaluate must have left them."""
        found = self.find(cell)
        if found is None or found.has_weights or cell.steps != self.steps_of(cell.arm):
            return found is not None
        evaluated_by = [n for n, arm in self.study.arms.items() if arm.evaluates == cell.arm]
        return all(self.find(replace(cell, arm=name)) is not None for name in evaluated_by)

    def shortened(self, fraction: float) -> int:
        """Steps of a run that takes this fraction of the study's."""
        return max(1, round(self.study.steps * fraction))

    # ---- a run's config ----------------------------------------------------------------------
    def find(self, cell: Cell) -> FinishedRun | None:
        """The finished run of a cell, or None."""
        if self.recorded is not None:
            return self.recorded.get(replace(cell, source=""))
        cell = replace(cell, source="")
        if cell not in self._identities:
            self._identities[cell] = identity_of(self.config(cell), self._evaluates(cell.arm))
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
        name = f"{cell.arm}_{cell.steps}_{identity_of(shared, self._evaluates(cell.arm))}"
        fixed = f"seed{cell.seed}" if swept == "optim.lr" else f"lr{cell.lr!r}"
        return self.out / name / fixed

    def _evaluates(self, arm: str) -> bool:
        return arm != AGAIN and bool(self.study.arms[arm].evaluates)


def _end(standing: Standing, arm: int, seeds: int) -> str:
    """Why an arm of one study gets no more seeds."""
    if standing.open_RA[0, arm]:
        return ""
    if standing.lost_RA[0, arm]:
        return "a run diverged"
    if standing.sign_RA[0, arm]:
        return "verdict"
    return "all seeds" if standing.seeds_RA[0, arm] == seeds else "hardly a verdict to come"
