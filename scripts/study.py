"""Run a study: several arms, tuned and repeated alike, and an answer with its uncertainty.

    python scripts/study.py study=muon_vs_adamw --dry-run
    python scripts/study.py study=muon_vs_adamw
    python scripts/study.py study=mhc_vs_plain steps=200 seeds=[1,2,3,4,5,6,7]
    python scripts/study.py study=attention --launcher joblib

Every arm first gets its learning rate from a search on a seed of its own; then fresh seeds train
each arm on the same data order. The same command goes on where it was stopped, finished runs are
passed over (same config, same code), runs that studies share are trained once. The report lies in
docs/studies/NAME, what it was made from in docs/studies/archives/NAME.tar.xz; runs are made below
runs/studies. KEY=VALUE changes a key of conf/study/NAME.yaml (steps, seeds, search.fraction,
arms.NAME.lr, ...): see scripts/studies/config.py.

Exit codes: 0 all runs are finished, 2 input that cannot be, 75 stopped and resumable, 1 otherwise.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.cli.command import command
from scripts.cli.parser import CommandParser
from scripts.studies.archive import archive_of, pack
from scripts.studies.config import StudyConfig, load_study, study_names
from scripts.studies.estimate import Estimate
from scripts.studies.protocol import Protocol, Sweep, from_root
from scripts.studies.report import write_study_report
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
        "--time-limit", type=float, default=0.0, help="start no batch after this many seconds"
    )
    return parser.parse_intermixed_args(argv)


def _study(words: Sequence[str]) -> tuple[str, StudyConfig]:
    named = [word.partition("=")[2] for word in words if word.startswith("study=")]
    if len(named) != 1:
        raise UserError(f"give one study=NAME; there are: {', '.join(study_names())}")
    return named[0], load_study(named[0], [w for w in words if not w.startswith("study=")])


def _run(name: str, study: StudyConfig, args: argparse.Namespace) -> int:
    store = Store([args.out, args.archive / PACKED], None if args.any_code else source_hash())
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
    began = time.monotonic()
    while (batch := next(protocol.batches(), None)) is not None:
        if args.time_limit and time.monotonic() - began > args.time_limit:
            print("the time limit is reached: the same command continues")
            return ExitCode.resumable
        code = _start(protocol, batch, args.launcher, lock)
        protocol.store.scan()
        missing = sum(protocol.find(cell) is None for cell in batch.cells)
        pack(protocol, archive_of(name, args.archive / PACKED))
        write_study_report(name, protocol, args.archive)
        if code != ExitCode.finished:
            return code
        if missing:
            raise UserError(
                f"{batch.title}: {missing} of {len(batch.cells)} runs left no receipt of this"
                " config and code; was a source file changed meanwhile?"
            )
    return ExitCode.finished


def print_plan(name: str, protocol: Protocol) -> None:
    """What is to run, what is finished, how long it may take."""
    estimate = Estimate(protocol)
    total = 0.0
    print(f"study {name}: {protocol.study.question}")
    print(f"{'runs':<28}{'wanted':>7}{'finished':>9}{'steps':>7}{'minutes left':>14}")
    for title, cell, wanted, done in protocol.plan():
        seconds = (wanted - done) * estimate.seconds(cell)
        total += seconds
        print(f"{title:<28}{wanted:>7}{done:>9}{cell.steps:>7}{seconds / 60:>14.1f}")
    print(f"about {total / 60:.0f} minutes in turn, {estimate.basis}; a search may grow")
    other = len(protocol.store.other_code)
    if other:
        print(f"{other} finished runs are of another code version (--any-code counts them)")


def _start(protocol: Protocol, batch: Sweep, launcher: str, lock: int) -> ExitCode:
    """Run a batch by the trainer's own entry; signals go on to it."""
    words = protocol.command(batch, [f"hydra/launcher={launcher}"] if launcher else [])
    print(f"\n== {batch.title}: python train/pretrain.py {' '.join(words)}", flush=True)
    command = [sys.executable, str(ROOT / "train" / "pretrain.py"), *words]
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
