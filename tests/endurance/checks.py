"""What must hold after a start of a life, however it ended."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from tests.endurance import checkpoints, life
from tests.endurance.broken import BrokenError, expect
from tests.endurance.processes import Job
from tests.endurance.references import ALONE, References, read_lines
from train.errors import ExitCode

FINISHED, FAILED, REFUSED, RESUMABLE = (int(code) for code in ExitCode)
KILLED = -9
_ASIDE = 4  # checkpoints out of the row that may lie about: damaged and abandoned ones
_DAMAGED = 2  # that may lie about under their own name
# Codes of a start at which an event struck; without one it must finish.
_CODES = {
    life.END: {FINISHED},
    life.KILL: {KILLED},
    life.POWER: {KILLED},
    life.TERM: {RESUMABLE, FINISHED},
    life.NAN: {FAILED},
    life.FULL: {FINISHED, FAILED, REFUSED},
    life.READ_ONLY: {FINISHED, FAILED, REFUSED},
    life.PINNED: {FINISHED},
    life.SECOND: {FINISHED, REFUSED},
    life.EXPORT: {FINISHED},
}
# A shorter run evaluates less.
_OPTIONAL = {
    "val_loss", "val_bits_per_byte", "val_loss_average", "val_bits_per_byte_average", "val_bytes",
    "val_text",
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """A start that has ended.

    Attributes:
        start: what it was.
        job: its ranks.
        newest: step of the newest good checkpoint before it.
        struck: whether its event happened.
        before: the tree of its folder when it began.
    """

    start: life.Start
    job: Job
    newest: int
    struck: bool
    before: Mapping[str, str]

    @property
    def code(self) -> int:
        """Exit code of the job: of several that of the rank that explains the others."""
        codes = self.job.codes
        order = (REFUSED, KILLED, RESUMABLE, FAILED, FINISHED)
        return next((code for code in order if code in codes), codes[0])

    @property
    def idle(self) -> bool:
        """Whether it was stopped before its first step: what an earlier kill left may still lie."""
        return self.code == RESUMABLE and not trained(self.job.printed())

    def untouched(self, path: Path) -> bool:
        """Whether it left a file of the run folder as it found it."""
        found = checkpoints.sha256(path) if path.exists() else None
        return found == self.before.get(path.name)


class Checks:
    """The invariants of one life.

    Args:
        variant: of the life.
        references: undisturbed runs.
    """

    def __init__(self, variant: str, references: References) -> None:
        self._variant, self._references = variant, references
        self._known: set[tuple[str, int]] = set()  # checkpoints found equal to their reference's

    def after(self, outcome: Outcome, folder: Path, lineage: Sequence[str]) -> None:
        """All that holds after a start that was not refused.

        Args:
            outcome: of the start.
            folder: of the run.
            lineage: layout under which each step was computed.

        Raises:
            BrokenError: it does not hold.
        """
        printed = outcome.job.printed()
        try:
            self._ending(outcome, printed)
            self._good_ones(outcome, folder / "checkpoints", lineage)
            self._lines(outcome, folder, lineage)
            self._files(outcome, folder)
        except BrokenError as error:
            raise BrokenError(error.what, error.printed or printed) from error

    # ---- how it ended ------------------------------------------------------------------------
    def _ending(self, outcome: Outcome, printed: str) -> None:
        for fact in outcome.job.facts():
            expect(not fact.startswith("broken"), fact.removeprefix("broken "))
        name, code, codes = outcome.start.during.name, outcome.code, outcome.job.codes
        allowed = _CODES[name] if outcome.struck else {FINISHED}
        expect(code in allowed, f"{name}: exit codes {codes}, allowed are {sorted(allowed)}")
        beside = {
            KILLED: {KILLED, FAILED, FINISHED},  # the others notice, unless they were at the end
            FAILED: {FAILED, FINISHED},  # as before
            # Before they train, a rank that is told to stop leaves the others alone; a finished
            # one may be told too late.
            RESUMABLE: {RESUMABLE, FINISHED} if trained(printed) else {RESUMABLE, FAILED},
        }
        expect(set(codes) <= beside.get(code, {code}), f"{name}: exit codes {codes} of the ranks")
        if code in (FINISHED, RESUMABLE):
            expect("Traceback" not in printed, f"{name}: a traceback, and exit code {code}")
        resumed = re.search(r"resuming after step (\d+)", printed)
        if resumed:
            expect(
                int(resumed[1]) == outcome.newest,
                f"resumed after step {resumed[1]}, the newest good checkpoint was of step"
                f" {outcome.newest}",
            )

    # ---- checkpoints -------------------------------------------------------------------------
    def _good_ones(self, outcome: Outcome, folder: Path, lineage: Sequence[str]) -> None:
        good = checkpoints.good(folder)
        newest = max(good, default=0)
        expect(
            newest >= outcome.newest,
            f"the newest good checkpoint was of step {outcome.newest} and is of step {newest}",
        )
        for step, path in good.items():
            manifest = (path / "manifest.json").read_text()
            if (manifest, step) in self._known:
                continue
            mine = checkpoints.digests(path)
            whole = self._references.digests(self._variant, tuple(lineage[:step]))
            differing = sorted(k for k in {*mine, *whole} if mine.get(k) != whole.get(k))
            expect(
                not differing,
                f"checkpoint of step {step} differs from the undisturbed run's in"
                f" {len(differing)} of {len(whole)} entries, first {differing[:1]}",
            )
            self._known.add((manifest, step))
        if outcome.code == FINISHED:
            expect(
                newest == outcome.start.steps,
                f"a run of {outcome.start.steps} steps finished, its newest good checkpoint is of"
                f" step {newest}",
            )

    # ---- metrics and samples -----------------------------------------------------------------
    def _lines(self, outcome: Outcome, folder: Path, lineage: Sequence[str]) -> None:
        newest = checkpoints.newest_good(folder / "checkpoints")
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = folder / name
            as_found = outcome.untouched(path) and outcome.code != FINISHED
            lines = read_lines(path, torn=as_found)
            steps = [line["step"] for line in lines]
            expect(steps == [*range(1, len(steps) + 1)], f"{name} holds steps {steps}")
            expect(
                len(steps) >= newest, f"{name} ends with step {len(steps)}, a checkpoint is of"
                f" step {newest}",
            )  # fmt: skip
            if outcome.code in (FINISHED, RESUMABLE) and not as_found:
                expect(len(steps) == newest, f"{name} ends with step {len(steps)}, not {newest}")
                whole = not lines or path.read_bytes().endswith(b"\n")
                expect(whole, f"{name} ends with half a line")
            if name == "metrics.jsonl":
                spoilt = outcome.struck and outcome.start.during.name == life.NAN
                last = outcome.start.during.call - 1 if spoilt else len(lines)
                if not as_found:  # else looked at before, maybe with spoilt steps at its end
                    self._values(lines[:last], lineage)
            else:
                others = read_lines(self._references.folder(self._variant, (ALONE,)) / "run" / name)
                expect(lines == others[: len(lines)], f"{name} names other documents")

    def _values(self, lines: Sequence[dict[str, Any]], lineage: Sequence[str]) -> None:
        whole: list[dict[str, Any]] = []
        for _, steps in groupby(range(len(lines)), key=lambda i: lineage[i]):
            numbers = list(steps)
            reference = self._references.metrics(self._variant, tuple(lineage[: numbers[-1] + 1]))
            whole += reference[numbers[0] : numbers[-1] + 1]
        alone = self._references.metrics(self._variant, (ALONE,))
        bounds = self._references.bounds(self._variant)
        for mine, theirs, single, bound in zip(lines, whole, alone, bounds, strict=False):
            step = mine["step"]
            differing = [k for k in mine if mine[k] != theirs.get(k)]
            missing = set(theirs) - set(mine) - _OPTIONAL
            expect(
                not differing and not missing,
                f"metrics of step {step} differ from the undisturbed run's in"
                f" {differing or sorted(missing)}",
            )
            distance = abs(mine["loss"] - single["loss"])
            expect(
                distance <= bound,
                f"loss of step {step} is {distance:.3g} from one process's, {bound:.3g} allowed",
            )

    # ---- files -------------------------------------------------------------------------------
    def _files(self, outcome: Outcome, folder: Path) -> None:
        for path in folder.glob("*.json"):
            checkpoints.strict_json(path.read_text())
        usual = self._references.folder(self._variant, (ALONE,)) / "run"
        known = {path.name for path in usual.iterdir()}
        mine = {path.name for path in folder.glob("*")}  # refused or stopped early there is none
        inside = {path.name for path in (folder / "checkpoints").glob("*")}
        row = {name for name in inside if checkpoints.step_of(name) is not None}
        aside = {name for name in inside if re.match(r"(damaged|abandoned)_step_\d", name)}
        if outcome.code in (FINISHED, RESUMABLE):
            earlier = set(outcome.before) if outcome.idle else set()
            left = mine - known - earlier
            expect(not left, f"left in the run folder: {sorted(left)}")
            left = {n for n in inside - row - aside if f"checkpoints/{n}" not in earlier}
            expect(
                not left or outcome.start.during.name == life.PINNED,
                f"left among the checkpoints: {sorted(left)}",
            )
        expect(len(mine) <= len(known) + 4, f"the run folder holds {sorted(mine)}")
        expect(len(inside - row) <= _ASIDE + 4, f"among the checkpoints lie {sorted(inside - row)}")
        saved = checkpoints.newest_good(folder / "checkpoints") > outcome.newest
        if saved and outcome.code in (FINISHED, RESUMABLE):
            last, multiples, best = outcome.start.retention
            most = last + best + (life.MOST_STEPS // multiples if multiples else 0)
            most += _DAMAGED + (outcome.start.during.name in (life.PINNED, life.EXPORT))
            expect(len(row) <= most, f"{sorted(row)} are kept, {most} may be")

    def finished(self, folder: Path, steps: int) -> None:
        """What a finished run has left.

        Raises:
            BrokenError: it has not.
        """
        receipt = checkpoints.strict_json((folder / "receipt.json").read_text())
        expect(receipt["finished"] is True, "the receipt of a finished run says it is not")
        expect(receipt["progress"]["step"] == steps, f"the receipt says {receipt['progress']}")
        for name in ("loss.png", "sample.txt", "params.csv", "config.yaml"):
            expect((folder / name).stat().st_size > 0, f"{name} is empty")


def trained(printed: str) -> bool:
    """Whether a start did a step, by what it printed."""
    return "\nstep " in printed


def check_refusal(printed: str, why: str, before: dict[str, str], after: dict[str, str]) -> None:
    """A start that left with 2 has said why in one line, and changed nothing.

    Args:
        printed: by it.
        why: it had to; for the message.
        before: the tree of its folder when it began.
        after: the same when it had ended.

    Raises:
        BrokenError: it has not.
    """
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    expect(len(errors) == 1, f"refused ({why}) with {len(errors)} lines", printed)
    expect("Traceback" not in printed, f"refused ({why}) with a traceback", printed)
    changed = sorted(
        name
        for name in {*before, *after}
        if before.get(name) != after.get(name) and not checkpoints.is_remains(name)
    )
    expect(not changed, f"refused ({why}), but changed {changed}", printed)
