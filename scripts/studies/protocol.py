"""A study's runs in order: search of learning rates, then fresh seeds, then the side questions.

Nothing is remembered between starts: every decision is a function of the study and of the finished
runs, so a study that was killed goes on where it was. Runs are started by ``train/pretrain.py``, a
batch of them (one arm, one thing swept) by Hydra's ``-m`` and its launcher, which names their
folders. The folder is the same whether one or several runs of a batch are left to do.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

from scripts.studies.cells import Cell, StudyRuns, Sweep, flops_per_token, from_root
from scripts.studies.config import AGAIN
from scripts.studies.looks import ArmStanding, others, standings
from scripts.studies.search import Choice, Tuning, choose
from scripts.studies.sections import ArmConfig
from scripts.studies.store import FinishedRun


class Protocol(StudyRuns):
    """The runs of one study, in order: which are wanted now, and what has been decided."""

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
        if trained.flops_of:
            theirs, own = self._step_flops(trained.flops_of), self._step_flops(trained.like)
            return max(1, round(self.steps_of(trained.flops_of) * theirs / own))
        return trained.steps or self.shortened(trained.fraction)

    def _steps_in_time(self, arm: ArmConfig) -> int:
        """Steps that an arm makes in another's time; 0 while a search of theirs is not done."""
        theirs, own = self._pace(arm.seconds_of), self._pace(arm.like)
        if not theirs or not own:
            return 0
        return max(1, round(self.steps_of(arm.seconds_of) * theirs / own))

    def _step_flops(self, arm: str) -> float:
        """Of an archived study as its runs were, whatever the defaults are today."""
        archived = [run.run for cell, run in (self.recorded or {}).items() if cell.arm == arm]
        longest = max(archived, key=lambda run: run.train.steps, default=None)  # none of a search
        run = longest or self.config(Cell(arm, self.steps_of(arm), 1.0, 0))
        return flops_per_token(run) * run.train.global_batch_tokens

    def _pace(self, arm: str) -> float:
        """Seconds a step in an arm's search, median of runs; 0 while it is not done.

        Of the process's CPU time on a CPU, which other work there disturbs less; else wall-clock.
        """
        choice = self.choice(arm)
        if choice.missing:
            return 0.0
        runs = [run for rate in choice.tried for run in self.searched(arm, rate).values()]
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
            beside = 2 if self.study.transfer.along else 1  # what a parabola is fitted to
            choice = choose(grid, losses, search.factor, search.extensions, beside)
            found = {rate: self.searched(arm, rate) for rate in choice.missing}
            whole = {rate: runs for rate, runs in found.items() if len(runs) == len(self.searchers)}
            if not whole:
                return choice
            losses |= {
                rate: statistics.fmean(run.val_loss for run in runs.values())
                for rate, runs in whole.items()
            }

    @property
    def searchers(self) -> list[int]:
        """Seeds of a search: one of its own, or all where the best rate itself is asked for."""
        study = self.study
        return list(study.seeds) if study.transfer.along else [study.search.seed]

    def searched(self, arm: str, rate: float) -> dict[int, FinishedRun]:
        """Seed -> finished run of an arm's search at a learning rate."""
        cells = self._search_cells(arm, rate)
        found = {cell.seed: self.find(cell) for cell in cells}
        return {seed: run for seed, run in found.items() if run is not None}

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

    def standings(self) -> dict[str, ArmStanding]:
        """Where the comparison of each arm stands, from the finished runs alone."""
        return standings(self.study, lambda arm, seeds: self._found(arm, self.steps_of(arm), seeds))

    def _search_cell(self, arm: str, rate: float, settings: tuple[str, ...] = ()) -> Cell:
        steps = max(1, round(self.steps_of(arm) * self.study.search.fraction))
        return Cell(arm, steps, rate, self.study.search.seed, settings=settings)

    def _search_cells(self, arm: str, rate: float) -> list[Cell]:
        cell = self._search_cell(arm, rate)
        return [replace(cell, seed=seed) for seed in self.searchers]

    def _search(self) -> Iterator[Sweep]:
        for arm in self.trained_arms:
            timed = self.study.arms[arm]
            if timed.seconds_of and not self._steps_in_time(timed):
                continue  # its length depends on searches that are not done
            missing = self.choice(arm).missing
            if self.study.transfer.along:
                for rate in missing:
                    cells = [c for c in self._search_cells(arm, rate) if self.find(c) is None]
                    yield Sweep(f"rates, {arm}, {rate:g}", tuple(cells), "seed")
            elif missing:
                cells = [self._search_cell(arm, rate) for rate in missing]
                yield Sweep(f"search, {arm}", tuple(cells), "optim.lr")

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
            for arm in others(study):  # what it evaluates must have been trained
                source = study.arms[arm].evaluates
                if source and source != study.baseline:
                    wanted[source] = max(wanted[source], wanted[arm])
            wanted[study.baseline] = max(wanted[arm] for arm in others(study))
            wanted[AGAIN] = wanted[study.baseline]
        found = [((arm, self.steps_of(arm)), wanted[arm]) for arm in self.trained_arms]
        if study.again:
            found.append(((AGAIN, self.steps_of(AGAIN)), wanted[AGAIN]))
        if ask.arm:
            both = min(wanted[ask.arm], wanted[ask.to])
            found += [((ask.arm, self.shortened(f)), both) for f in ask.fractions]
        found += [
            ((arm, self.steps_of(arm)), wanted[arm]) for arm in study.arms if self.evaluates(arm)
        ]
        return [(key, study.seeds[:n]) for key, n in found]

    def finished(self) -> dict[Cell, FinishedRun]:
        """Every run that the study's answer rests on, the search's too."""
        cells = [
            cell
            for arm in self.trained_arms
            for rate in self.choice(arm).tried
            for cell in self._search_cells(arm, rate)
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
            if self.evaluates(arm):
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
            if study.transfer.along:
                done = [self.searched(arm, rate) for rate in (*choice.tried, *choice.missing)]
                yield f"rates, {arm}", example, wanted * len(study.seeds), sum(map(len, done))
                continue
            yield f"search, {arm}", example, wanted, len(choice.tried)
            if tuned := study.tune_of(arm):
                wanted = sum(len(values) for values in tuned.values())
                yield f"tuning, {arm}", example, wanted, len(self.tuning(arm).tried)
        for (arm, steps), seeds in [] if study.transfer.along else self._wanted_seeds(at_most):
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
