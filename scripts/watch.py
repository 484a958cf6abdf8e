"""Follow a run from another terminal: its steps as they come, until it finishes or stops.

    v4 watch runs/v4_nano
    v4 watch runs/v4_nano --once

Only reads: it may begin before, during and after the run, on any host that sees the folder; before
it, it waits for the run to begin, unless there is --once. The
page runs/NAME/report.html shows the same in a browser.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.cli.command import command
from scripts.cli.parser import CommandParser, real, whole
from train.display.console import Console
from train.errors import UserError
from train.record.metrics import Record, record_of
from train.run_folder.folder import CONFIG, LOCK, METRICS, read_run
from train.run_folder.lock import is_held
from train.stages import resolve

log = logging.getLogger(__name__)


class NewLines:
    """The lines of a metrics file that were not there before; a rollback or resume may cut it.

    Args:
        path: the file; it may not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._inode, self._offset = path, 0, 0
        self.last = 0  # newest step that was given out

    def read(self) -> tuple[int | None, list[Record]]:
        """New lines in order, and the step to which the file was cut before them, if it was."""
        if not self._path.exists():
            return None, []
        with self._path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if fresh := inode != self._inode:  # what is cut is written anew, beside the old file
                self._inode, self._offset = inode, 0
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.splitlines(keepends=True)
        records = [record for line in lines if (record := record_of(line, "step"))]
        newest = records[-1]["step"] if records else 0 if fresh else self.last
        cut = newest if newest < self.last else None
        known = self.last if cut is None else cut
        self.last = newest
        return cut, [record for record in records if record["step"] > known]


@command(logging.INFO)
def main(words: Sequence[str] | None = None) -> None:
    """Follow."""
    watch(parse(words))


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--lines", type=whole(least=0), default=10, help="steps of before that are shown"
    )
    parser.add_argument(
        "--every", type=real(above=0), default=1.0, help="seconds between two looks"
    )
    parser.add_argument("--once", action="store_true", help="show what there is, and leave")
    return parser.parse_args(words)


def watch(options: argparse.Namespace) -> None:
    """Show steps until the run has ended.

    Raises:
        UserError: the folder holds no run, and none will begin in it.
    """
    folder: Path = options.run
    _await_run(folder, options)
    run = read_run(folder)
    steps, lines = resolve(run).steps, NewLines(folder / METRICS)
    _, before = lines.read()
    shown = before[-options.lines :] if options.lines else []
    done = shown[0]["step"] - 1 if shown else lines.last
    console = Console(steps, done, run.train.log_every, live=False)
    try:
        console.remember(before[: len(before) - len(shown)])
        for record in shown:
            console.show(record)
        while not options.once and (is_held(folder) or _new(console, lines)):
            _new(console, lines)
            time.sleep(options.every)
    finally:
        console.close()
    state = "finished" if lines.last >= steps else "trains" if is_held(folder) else "stopped"
    log.info("%s %s: step %d of %d", folder, state, lines.last, steps)


def _await_run(folder: Path, options: argparse.Namespace) -> None:
    """Return once a run has begun in the folder; one line says what is waited for."""
    told = False
    while not (folder / CONFIG).is_file():
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file, no run folder")
        filled = folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())
        foreign = filled and not is_held(folder)
        if (foreign or options.once) and not (folder / CONFIG).is_file():
            raise UserError(
                f"{folder} " + (f"holds no run: no {CONFIG}" if foreign else "holds no run yet")
            )
        if not told:
            log.info("%s: no run yet; waiting until one begins (Ctrl-C ends)", folder)
        told = True
        time.sleep(options.every)


def _new(console: Console, lines: NewLines) -> bool:
    """Show what is new; whether anything was."""
    cut, records = lines.read()
    if cut is not None:
        console.rewind(cut)
    for record in records:
        console.show(record)
    return bool(records)


if __name__ == "__main__":
    sys.exit(main())
