"""Runs that nothing disturbed: what every step's state and metrics must be, to the bit.

A reference has a lineage: under which layout each step was computed. Under one layout all the way
there is one reference for all lives of a variant. After a change of layout the reference is an
undisturbed run that changed at the same step. All go to the longest length of any life with a
checkpoint at every step: shorter runs are their beginnings, since the schedules' horizon is fixed.

How far another layout may be from one process (DESIGN, "Layout-free"): 3 times as far as one
process with another accumulation order is from itself; and 1e-6 of the loss at the first step.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.endurance import checkpoints, child, life
from tests.endurance.broken import expect
from tests.endurance.commands import Commands
from tests.endurance.processes import Job, Process
from train.record.metrics import unmeasured

Lineage = tuple[str, ...]  # layout of each step
WHOLE = life.Start(steps=life.MOST_STEPS, every=1, last=0, best=1)  # best: evaluates every step
ACCUMULATED = ("train.micro_batch_size=1",)
ALONE = "alone"


class References:
    """Makes them when they are asked for, and keeps them.

    Args:
        commands: start runs.
        place: folder of those that all lives share.
        own: folder of those of one life, after changes of layout.
    """

    def __init__(self, commands: Commands, place: Path, own: Path) -> None:
        self._commands, self._place, self._own = commands, place, own

    def digests(self, variant: str, lineage: Lineage) -> dict[str, str]:
        """Of the checkpoint after the last step of a lineage."""
        folder = self.folder(variant, lineage)
        path = folder / f"digests_{len(lineage)}.json"
        if not path.exists():
            found = checkpoints.digests(self.checkpoint(folder, len(lineage)))
            path.write_text(json.dumps(found))
        return json.loads(path.read_text())

    def metrics(self, variant: str, lineage: Lineage) -> list[dict[str, Any]]:
        """All lines of a run of that lineage, without what was measured."""
        return read_lines(self.folder(variant, lineage) / "run" / "metrics.jsonl")

    def checkpoint(self, folder: Path, step: int) -> Path:
        """That of a step of a reference."""
        return folder / "run" / "checkpoints" / f"step_{step:08d}"

    def export(self, variant: str, lineage: Lineage) -> Path:
        """The checkpoint after the last step of a lineage, exported."""
        folder = self.folder(variant, lineage)
        target = folder / f"export_{len(lineage)}"
        with _alone_with(target.with_suffix(".lock")):
            if not target.exists():
                source = self.checkpoint(folder, len(lineage))
                aside = target.with_suffix(".writing")
                shutil.rmtree(aside, ignore_errors=True)
                process = Process(partial(child.export, source, aside, 0), folder / "export.log")
                Job([process]).wait()
                expect(process.code == 0, "export of an undisturbed run", process.printed())
                aside.rename(target)
        return target

    def bounds(self, variant: str) -> list[float]:
        """How far each step's loss may be from one process's, by step."""
        whole = [line["loss"] for line in self.metrics(variant, (ALONE,))]
        other = read_lines(self._made(variant, [(ALONE, 1)], ACCUMULATED) / "run/metrics.jsonl")
        far, found = 0.0, []
        for loss, line in zip(whole, other, strict=True):
            far = max(far, abs(loss - line["loss"]))
            found.append(3 * far + 1e-6 * abs(loss))
        return found

    def folder(self, variant: str, lineage: Lineage) -> Path:
        """Of the reference; its run is in ``run``."""
        stretches, begin = [], 1
        for layout, steps in groupby(lineage):
            stretches.append((layout, begin))
            begin += len(list(steps))
        return self._made(variant, stretches)

    def _made(
        self, variant: str, stretches: Sequence[tuple[str, int]], more: Sequence[str] = ()
    ) -> Path:
        name = "_".join([variant, *(f"{layout}_{step}" for layout, step in stretches)])
        name += "_accumulated" if more else ""
        folder = (self._place if len(stretches) == 1 else self._own) / name
        with _alone_with(folder.with_suffix(".lock")):
            if not (folder / "complete").exists():
                shutil.rmtree(folder, ignore_errors=True)
                (folder / "run").mkdir(parents=True)
                if len(stretches) > 1:
                    before = self._made(variant, stretches[:-1])
                    self._begin_as(before, folder, stretches[-1][1] - 1)
                self._run(variant, stretches[-1][0], folder, more)
                (folder / "complete").touch()
        return folder

    def _begin_as(self, before: Path, folder: Path, step: int) -> None:
        shutil.copytree(self.checkpoint(before, step), self.checkpoint(folder, step))
        for path in (before / "run").iterdir():
            if path.is_file():
                shutil.copy2(path, folder / "run")

    def _run(self, variant: str, layout: str, folder: Path, more: Sequence[str]) -> None:
        start = replace(WHOLE, layout=layout)
        job = self._commands.start(
            variant, start, folder / "run", folder / "log", more=more, sound=True
        )
        job.wait()
        expect(not any(job.codes), f"undisturbed run left with {job.codes}", job.printed())


def read_lines(path: Path, torn: bool = False) -> list[dict[str, Any]]:
    """Complete lines of a metrics file, without what was measured.

    Args:
        path: may be absent.
        torn: whether the last line may be damaged, though it is complete; then it is left out.
    """
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    if torn and whole and not whole[-1].endswith("}\n"):
        whole.pop()
    return [unmeasured(checkpoints.strict_json(line)) for line in whole]


@contextmanager
def _alone_with(path: Path):
    """Others that would make the same wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
