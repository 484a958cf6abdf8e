"""Lives one life: brings its events about, and checks after every start that nothing was lost.

Between the starts stands only the run folder; what it must hold is known from the references
(``references.py``) and from what was good in it before.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

from safetensors import safe_open

from tests.endurance import checkpoints, child, life
from tests.endurance.broken import BrokenError, expect
from tests.endurance.checks import (
    FINISHED,
    KILLED,
    REFUSED,
    RESUMABLE,
    Checks,
    Outcome,
    check_refusal,
    trained,
)  # fmt: skip
from tests.endurance.commands import Commands
from tests.endurance.processes import Job, Process
from tests.endurance.references import References
from train.run_folder.folder import LOCK

_TORN = ('{"step": 3, "lo', "\n", '{"step": 3, "lo\n')
_READS = 60  # files of checkpoints that an export has opened when it is stopped, at most


class Living:
    """A life while it lasts.

    Args:
        story: what is to happen.
        commands: start runs.
        references: undisturbed runs.
        place: an empty folder for the run and the logs.

    Attributes:
        counts: how often each event really happened.
        starts: how many there were.
    """

    def __init__(
        self, story: life.Life, commands: Commands, references: References, place: Path
    ) -> None:
        self.story, self.place = story, place
        self.counts: Counter[str] = Counter()
        self.starts = 0
        self._commands, self._references = commands, references
        self._folder, self._days_back = place / "run", 0
        self._lineage: list[str] = []  # layout under which each step was computed
        self._before: life.Start | None = None
        self._config = b""  # what config.yaml held before it was damaged
        self._checks = Checks(story.variant, references)
        self._jobs: list[Job] = []

    def run(self) -> None:
        """All starts, then an undisturbed one that must bring the run to its end.

        Raises:
            BrokenError: a promise was broken.
        """
        for start in (*self.story.starts, self.story.final()):
            for event in start.before:
                self._between(event)
            self._start(start)
        self._checks.finished(self._folder, self.story.final().steps)

    def end(self) -> None:
        """End what a life that broke has left running, or standing still."""
        for job in self._jobs:
            if any(rank.code is None for rank in job.ranks):
                with suppress(BrokenError):  # that it broke is known
                    job.kill()

    @property
    def _checkpoints(self) -> Path:
        return self._folder / "checkpoints"

    # ---- between two starts ------------------------------------------------------------------
    def _between(self, event: life.Event) -> None:
        good = checkpoints.good(self._checkpoints)
        if event.name == life.CLOCK:
            self._days_back += 1
        elif not good:
            return
        elif event.name == life.MOVE:
            self._folder = self._folder.rename(self.place / f"run_{self.starts}")
        elif event.name == life.DAMAGE:
            newest_first = list(reversed(good.values()))
            all_of_them = event.which == life.ALL
            for path in newest_first if all_of_them else newest_first[event.which :][:1]:
                damage(path, event)
        elif event.name == life.CONFIG_DAMAGE:
            self._config = (self._folder / "config.yaml").read_bytes()
            half = len(self._config) * (event.call % 2) // 2
            (self._folder / "config.yaml").write_bytes(self._config[:half])
        elif event.name == life.METRICS_DAMAGE:
            with (self._folder / "metrics.jsonl").open("a") as file:
                file.write(_TORN[event.call % len(_TORN)])
        self.counts[event.name] += 1

    def _repair(self) -> None:
        """What a user would do who is told what is wrong."""
        if self._config:
            (self._folder / "config.yaml").write_bytes(self._config)
            self._config = b""
        if not checkpoints.newest_good(self._checkpoints):
            for path in checkpoints.published(self._checkpoints).values():
                path.rename(self.place / f"{path.name}_{self.starts}")

    # ---- a start -----------------------------------------------------------------------------
    def _start(self, start: life.Start) -> None:
        newest = checkpoints.newest_good(self._checkpoints)
        name = start.during.name
        other = ["optim.lr=0.01"] if name == life.OTHER_RUN and newest else []
        why = self._why_refused(name, newest)
        before = checkpoints.tree(self._folder)
        self.starts += 1
        job = self._launch(start, "start", self._pinned(start, newest), other)
        newest = self._accompany(start, job, newest, why)
        struck = any(fact.startswith("struck") for fact in job.facts())
        outcome = Outcome(start, job, newest, struck, before)
        self.counts[name] += struck or name in (life.END, life.LOCKED) or bool(other)
        if why and struck and outcome.code in (KILLED, RESUMABLE):  # before it was refused
            self._repair()
            return
        may = name in (life.FULL, life.READ_ONLY, life.SECOND) and struck
        if why or (outcome.code == REFUSED and may):
            printed = job.printed()  # of a fault that one rank meets, that rank tells
            expect(
                outcome.code == REFUSED, f"left with {job.codes}, not with 2 ({why})",
                job.printed(),
            )  # fmt: skip
            if name != life.SECOND:  # there the other one did the work
                after = checkpoints.tree(self._folder)
                check_refusal(printed, why or name, _unlocked(before), _unlocked(after))
            self._repair()
            return
        self._lineage[newest:] = [start.layout] * (life.MOST_STEPS - newest)
        self._checks.after(outcome, self._folder, self._lineage)
        self._count_changes(start)

    def _launch(
        self, start: life.Start, log: str, pinned: Path | None = None, more: list[str] | None = None
    ) -> Job:
        job = self._commands.start(
            self.story.variant, start, self._folder, self.place / f"{self.starts}_{log}.log",
            pinned, self._days_back, more or [],
        )  # fmt: skip
        self._jobs.append(job)
        return job

    def _why_refused(self, name: str, newest: int) -> str:
        """Why the start must be refused; empty: it need not."""
        if name == life.LOCKED:
            return name
        if self._config:
            return life.CONFIG_DAMAGE
        if name == life.OTHER_RUN and newest:
            return name
        if checkpoints.published(self._checkpoints) and not newest:
            return "all checkpoints damaged"
        return ""

    def _pinned(self, start: life.Start, newest: int) -> Path | None:
        """The checkpoint that cannot be removed: the first good one that there is, or will be."""
        if start.during.name != life.PINNED:
            return None
        good = checkpoints.good(self._checkpoints)
        first = self._checkpoints / f"step_{newest + start.every - newest % start.every:08d}"
        return next(iter(good.values()), first)

    def _count_changes(self, start: life.Start) -> None:
        before, self._before = self._before, start
        if before is not None:
            self.counts[life.EXTEND] += before.steps < start.steps
            self.counts[life.RETENTION] += before.retention != start.retention
            self.counts[life.LAYOUT] += before.layout != start.layout

    # ---- while it runs -----------------------------------------------------------------------
    def _accompany(self, start: life.Start, job: Job, newest: int, why: str) -> int:
        """Wait for its end; the step of the newest good checkpoint from which it may begin."""
        name = start.during.name
        if name == life.POWER:
            while not any([rank.look() for rank in job.ranks]):
                time.sleep(0.002)
            if KILLED in job.codes:  # all of the machine goes
                job.kill()
        stops = name in (life.SECOND, life.EXPORT)
        if job.wait(until_stopped=stops):
            return newest
        if name == life.EXPORT:
            self._export(start, job, newest)
            return newest
        return self._second(start, job, newest, why)

    def _second(self, start: life.Start, first: Job, newest: int, why: str) -> int:
        """The same command once more, while the first one stands still somewhere."""
        before = checkpoints.tree(self._folder)
        second = self._launch(life.plain(start), "second")
        second.wait()
        after = checkpoints.tree(self._folder)
        newest_now = checkpoints.newest_good(self._checkpoints)
        first.go_on()
        first.wait()
        code = max(second.codes, key=abs)
        printed = second.ranks[0].printed()
        expect(code in (FINISHED, REFUSED), f"the second start left with {code}", printed)
        if code == REFUSED:
            if why:  # the first one stands before it owns the folder, or has left
                check_refusal(printed, why, _unlocked(before), _unlocked(after))
            else:
                check_refusal(printed, "second start", before, after)
                left = set(first.codes)
                expect(left == {FINISHED}, f"the first start left with {left}", first.printed())
            return newest
        # The first one had not come so far as to own the folder.
        both = trained(first.printed()) and trained(printed)
        expect(not both, "two starts trained in one folder at once", first.printed())
        # What the second one did, the first one may have begun behind.
        self._lineage[newest:] = [start.layout] * (life.MOST_STEPS - newest)
        return newest_now

    def _export(self, start: life.Start, job: Job, newest: int) -> None:
        """Export the run while it stands still, or let it go on while the export stands still."""
        target = self.place / f"export_{self.starts}"
        good = checkpoints.newest_good(self._checkpoints)
        stop_at = 1 + start.during.which % _READS
        exporter = Process(
            partial(child.export, self._folder, target, stop_at),
            self.place / f"{self.starts}_export.log",
        )
        alone = Job([exporter])
        self._jobs.append(alone)
        ended = alone.wait(until_stopped=True)
        job.go_on()
        job.wait()
        if not ended:
            alone.go_on()
            alone.wait()
        printed = exporter.printed()
        if exporter.code == REFUSED and (self._config or not good):  # damaged, as the start is told
            return
        expect(
            exporter.code == FINISHED, f"an export of a run that trains left with {exporter.code}",
            printed,
        )  # fmt: skip
        source = next(f for f in exporter.facts() if f.startswith("source ")).split()[1]
        step = checkpoints.step_of(source) or 0
        lineage = (*self._lineage[:newest], *[start.layout] * (life.MOST_STEPS - newest))[:step]
        whole = self._references.export(self.story.variant, lineage)
        expect(same_tensors(target, whole), f"the export is not that of {source}", printed)


def damage(path: Path, event: life.Event) -> None:
    """Change, shorten or remove a file of a checkpoint."""
    files = sorted(file for file in path.iterdir())
    file = files[event.call % len(files)]
    content = bytearray(file.read_bytes())
    place = event.call % len(content)
    if event.how == "flip":
        content[place] ^= 1 << event.call % 8
    if event.how == "delete":
        file.unlink()
    else:
        file.write_bytes(content if event.how == "flip" else content[:place])
    if checkpoints.is_good(path):
        raise BrokenError(f"{path} is good after {event}")


def same_tensors(a: Path, b: Path) -> bool:
    """Whether two exported folders hold the same tensors, to the bit."""
    return _tensors(a) == _tensors(b)


def _tensors(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: checkpoints.digest(file.get_tensor(name)) for name in file.keys()}
    return found


def _unlocked(tree: dict[str, str]) -> dict[str, str]:
    """A tree without the lock, which of a dead process may be taken over and let go."""
    return {name: what for name, what in tree.items() if name != LOCK}
