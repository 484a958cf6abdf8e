"""Run a study: several arms, tuned and repeated alike, and an answer with its uncertainty.

    python scripts/study.py study=muon_vs_adamw --dry-run
    python scripts/study.py study=muon_vs_adamw
    python scripts/study.py study=mhc_vs_plain steps=200 seeds=[1,2,3,4,5,6,7]
    python scripts/study.py study=attention --launcher joblib
    python scripts/study.py study=attention --share 2/3 --also copied/from_one --time-limit 3600

Every arm first gets its learning rate from a search on a seed of its own; then fresh seeds train
each arm on the same data order. The same command goes on where it was stopped, finished runs are
passed over (same config, same code), runs that studies share are trained once. Several machines
each take a --share; a run is known by its receipt, wherever it was made (--also). The report lies
in docs/studies/NAME, what it was made from in docs/studies/archives/NAME.tar.xz; runs are made
below runs/studies. KEY=VALUE changes a key of conf/study/NAME.yaml (steps, seeds, search.fraction,
arms.NAME.lr, ...): see scripts/studies/sections.py.

Exit codes: 0 all runs are finished, 2 input that cannot be, 75 stopped and resumable, 1 otherwise.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import math
import re
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.cli.command import command
from scripts.cli.parser import CommandParser, real
from scripts.reports.answer import lead, power_line
from scripts.reports.study_report import write_study_report
from scripts.studies.archive import archive_of, pack
from scripts.studies.cells import Sweep, from_root
from scripts.studies.config import AGAIN, StudyConfig, load_study, study_names
from scripts.studies.estimate import START_SECONDS, Cost, Estimate
from scripts.studies.probed import probe_words, unasked
from scripts.studies.protocol import Protocol
from scripts.studies.results import gather
from scripts.studies.statistics import paired
from scripts.studies.store import Store
from train.errors import ROOT, ExitCode, UserError
from train.record.receipt import source_hash

OUT, ARCHIVE, PACKED = "runs/studies", "docs/studies", "archives"


@command(logging.INFO)
def main(words: Sequence[str] | None = None) -> int:
    """Plan, run, report."""
    args = _parse(words)
    name, study = _study(args.words)
    return _run(name, study, args)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__, epilog=f"studies: {', '.join(study_names())}")
    parser.add_argument("words", nargs="*", metavar="study=NAME KEY=VALUE")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and leave")
    parser.add_argument("--report-only", action="store_true", help="no runs, only the report")
    parser.add_argument("--out", type=Path, default=ROOT / OUT, help="where runs are made")
    parser.add_argument(
        "--archive", type=Path, default=ROOT / ARCHIVE, help="reports, and archives of runs below"
    )
    parser.add_argument(
        "--launcher", default="", help="Hydra's: joblib, submitit_slurm, ... (default: in turn)"
    )
    parser.add_argument(
        "--any-code", action="store_true", help="also count runs of another code version"
    )
    parser.add_argument(
        "--time-limit", type=real(least=0), default=0.0,
        help="start no run that by the estimate would end after this many seconds",
    )  # fmt: skip
    parser.add_argument(
        "--also", type=Path, action="append", default=[],
        help="runs or archives of other machines, copied here (may be repeated)",
    )  # fmt: skip
    parser.add_argument(
        "--share", default="1/1", metavar="I/N",
        help="this machine takes the I-th of N shares: whole seeds, so that pairs stay together",
    )  # fmt: skip
    return parser.parse_intermixed_args(argv)


def _study(words: Sequence[str]) -> tuple[str, StudyConfig]:
    named = [word.partition("=")[2] for word in words if word.startswith("study=")]
    if len(named) != 1:
        raise UserError(f"give one study=NAME; there are: {', '.join(study_names())}")
    return named[0], load_study(named[0], [w for w in words if not w.startswith("study=")])


def _run(name: str, study: StudyConfig, args: argparse.Namespace) -> int:
    for folder in args.also:
        if not folder.exists():
            raise UserError(f"--also {folder}: there is no such folder or archive")
    folders = [args.out, args.archive / PACKED, *args.also]
    parse_share(args.share)
    store = Store(folders, None if args.any_code else source_hash())
    protocol = Protocol(study, store, Path(from_root(args.out)))
    print_plan(name, protocol)
    if args.dry_run:
        return ExitCode.finished
    with _alone(args.out) as lock:
        code = ExitCode.finished if args.report_only else _run_all(protocol, args, lock, name)
        path = write_study_report(name, protocol, args.archive)
    print(path.read_text(encoding="utf-8").split("\n## ")[0])
    print(f"report: {path} and {path.with_suffix('.html').name}")
    return code


def _run_all(protocol: Protocol, args: argparse.Namespace, lock: int, name: str) -> ExitCode:
    """Start batch after batch; after each there is a report of what is known."""
    began, share = time.monotonic(), parse_share(args.share)
    ends = began + args.time_limit if args.time_limit else math.inf
    asked = ExitCode.finished
    while (batch := first_of_share(protocol, share)) is not None:
        if args.time_limit:
            batch = fitting(batch, ends - time.monotonic(), Estimate(protocol))
        if not batch.cells:
            print("the next run would not end within the time limit: the same command continues")
            return ExitCode.resumable
        code = _start(protocol, batch, args.launcher, lock)
        protocol.store.scan()
        if code == asked == ExitCode.finished:  # questions that fail hold up no training
            asked = _ask(protocol, lock, share, ends)
            code = asked if asked == ExitCode.resumable else code
        missing = sum(protocol.find(cell) is None for cell in batch.cells)
        pack(protocol, archive_of(name, args.archive / PACKED))
        write_study_report(name, protocol, args.archive)
        print_progress(name, protocol)
        if code != ExitCode.finished:
            return code
        if missing:
            raise UserError(
                f"{batch.title}: {missing} of {len(batch.cells)} runs left no receipt of this"
                " config and code; was a source file changed meanwhile?"
            )
    if asked == ExitCode.finished and any(unasked(protocol, share)):
        asked = _ask(protocol, lock, share, ends)
        pack(protocol, archive_of(name, args.archive / PACKED))
    if asked != ExitCode.finished:
        return asked
    others = sum(len(batch.cells) for batch in protocol.batches())
    if others:
        print(f"this share is done; {others} runs of other shares are missing: give --also")
        return ExitCode.resumable
    return ExitCode.finished


def parse_share(text: str) -> tuple[int, int]:
    """I and N of ``I/N``.

    Raises:
        UserError: it is not such a text, or I is not in 1 .. N.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    mine, shares = (int(part) for part in match.groups()) if match else (0, 0)
    if not 1 <= mine <= shares:
        raise UserError(f"--share {text} must be I/N with I in 1 .. N, as 1/2")
    return mine, shares


def first_of_share(protocol: Protocol, share: tuple[int, int]) -> Sweep | None:
    """The next batch, cut to the runs of one share; None: nothing of it can start now.

    A seed is one machine's in every arm, so that machines differ between pairs and not in them. Of
    a search a hash of arm and learning rate says whose a run is.
    """
    mine, shares = share
    seeds = protocol.study.seeds
    for batch in protocol.batches():
        cells = [
            cell
            for cell in batch.cells
            if (
                zlib.crc32(f"{cell.arm} {cell.lr!r}".encode())
                if batch.swept == "optim.lr"
                else seeds.index(cell.seed)
            )
            % shares
            == mine - 1
        ]
        if cells:
            return replace(batch, cells=tuple(cells))
    return None


def fitting(batch: Sweep, seconds: float, estimate: Estimate) -> Sweep:
    """The first runs of a batch that end within a time, by the estimate; maybe none."""
    kept, needed = [], 0.0
    for cell in batch.cells:
        needed += estimate.seconds(cell)
        if needed > seconds:
            break
        kept.append(cell)
    return replace(batch, cells=tuple(kept))


def print_progress(name: str, protocol: Protocol) -> None:
    """What the finished runs say so far, and what is left."""
    done = sum(done for _, _, _, done in protocol.plan())
    print(f"so far, {done} runs: {lead(gather(name, protocol))}")
    print(cost_line(protocol, Estimate(protocol)), flush=True)


def print_plan(name: str, protocol: Protocol) -> None:
    """What is to run, what is finished, what it costs, what it can find."""
    estimate = Estimate(protocol)
    print(f"study {name}: {protocol.study.question}")
    head = ("wanted", "finished", "steps", "M tokens left", "minutes left")
    print(f"{'runs':<28}{head[0]:>7}{head[1]:>9}{head[2]:>7}{head[3]:>15}{head[4]:>14}")
    for title, cell, wanted, done in protocol.plan():
        cost = estimate.cost(cell, wanted - done)
        print(
            f"{title:<28}{wanted:>7}{done:>9}{cell.steps:>7}{cost.tokens / 1e6:>15.2f}"
            f"{cost.seconds / 60:>14.1f}"
        )
    print(f"{cost_line(protocol, estimate)}, {estimate.basis}; a search may grow")
    if protocol.study.probe.needle:
        print("each seed's run is asked questions once it is trained: beside these minutes")
    print(told_power(protocol))
    other = len(protocol.store.other_code)
    if other:
        print(f"{other} finished runs are of another code version (--any-code counts them)")


def cost_line(protocol: Protocol, estimate: Estimate) -> str:
    """Runs, tokens and hours that are left, in turn."""
    least = _cost_text(estimate.left())
    if not protocol.study.is_sequential:
        return f"left: {least} in turn"
    most = _cost_text(estimate.left(at_most=True))
    return f"left to the next look: {least}; at most: {most}; in turn"


def _cost_text(cost: Cost) -> str:
    return f"{cost.runs} runs, {cost.tokens / 1e6:.2f} M tokens, {cost.seconds / 3600:.2f} hours"


def told_power(protocol: Protocol) -> str:
    """What the study can find; in nats where an A/A pair is there."""
    study = protocol.study
    losses, again = protocol.results(study.baseline), protocol.results(AGAIN) if study.again else {}
    test = paired(
        {seed: run.val_loss for seed, run in again.items()},
        {seed: run.val_loss for seed, run in losses.items()}, study.level,
    )  # fmt: skip
    return power_line(study, test)


def _start(protocol: Protocol, batch: Sweep, launcher: str, lock: int) -> ExitCode:
    """Run a batch by the trainer's own entry; signals go on to it."""
    words = protocol.command(batch, [f"hydra/launcher={launcher}"] if launcher else [])
    print(f"\n== {batch.title}: python train/pretrain.py {' '.join(words)}", flush=True)
    return _child(["train/pretrain.py", *words], lock)


def _ask(
    protocol: Protocol, lock: int, share: tuple[int, int] = (1, 1), ends: float = math.inf
) -> ExitCode:
    """Let every run of a share's seeds answer the study's questions, where it has not.

    Args:
        protocol: whose runs.
        lock: file descriptor that the child holds too.
        share: I and N.
        ends: time.monotonic() by which the last run must have answered.
    """
    longest = START_SECONDS
    for run in unasked(protocol, share):
        began = time.monotonic()
        if began + longest > ends:
            print("questions would not end within the time limit: the same command continues")
            return ExitCode.resumable
        words = probe_words(run, protocol.study.probe)
        print(f"\n== questions: python scripts/probe.py {' '.join(words)}", flush=True)
        code = _child(["scripts/probe.py", *words], lock)
        longest = max(longest, time.monotonic() - began)
        if code != ExitCode.finished:  # it has told why
            return code
    return ExitCode.finished


def _child(words: Sequence[str], lock: int) -> ExitCode:
    """Run a program of ours, a path from the root and its words, to its end."""
    command = [sys.executable, *words]
    # The child holds the lock too, so that nobody writes to its folders should we be killed.
    process = subprocess.Popen(command, cwd=ROOT, pass_fds=[lock])

    stopping = False

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    before = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        while process.poll() is None:
            if stopping:  # again and again: Hydra starts the next run of a batch
                process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = ExitCode.resumable if stopping else process.returncode
    return ExitCode(code) if code in list(ExitCode) else ExitCode.failure


@contextmanager
def _alone(out: Path) -> Iterator[int]:
    """Hold the lock of a folder of runs; gives its file descriptor.

    Raises:
        UserError: another study, or a run that one left behind, is at work there.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"--out {out}: another study is at work there") from error
        yield file.fileno()


if __name__ == "__main__":
    sys.exit(main())
