"""Show which texts a step was trained on, or when a document was (runs with train.log_samples).

  python scripts/samples.py runs/nano --step 812
  python scripts/samples.py runs/nano --step 812 --row 3 --text
  python scripts/samples.py runs/nano --step 812 --abandoned
  python scripts/samples.py runs/nano --document embedded:81

A line for each piece of a row: step, row, source:document, its pass through the source, tokens, and
how the text begins. --abandoned looks at the steps that rollbacks took away: what a loss spike was
made of. Data that has changed since is refused. Exit codes: 0 found, 1 not found, 2 the input
cannot be.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.global_batch import Sample
from data.loader import Loader, build_loader
from data.prepare import build_tokenizer
from scripts.cli.command import command
from scripts.cli.parser import CommandParser, whole
from train.errors import ExitCode, UserError
from train.record.metrics import Record, StepLines
from train.record.sample_log import data_hash
from train.run_folder.folder import ABANDONED, CONFIG, SAMPLES, read_run
from train.run_folder.tokenizer import inherited_tokenizer

_BEGINNING = 60  # characters of a text in a line


@command()
def main(words: Sequence[str] | None = None) -> int:
    """Show; the exit code."""
    options = parse(words)
    found = list(lines_of(options))
    if not found:
        sys.stderr.write(f"nothing found in {log_of(options)}\n")
        return ExitCode.failure
    loader = open_loader(options.folder, {line["data"] for line in found})
    for line in found:
        show(line, loader, options)
    return ExitCode.finished


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="run folder")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--step", type=whole(least=1), help="all rows of this step")
    wanted.add_argument("--document", metavar="SOURCE:NUMBER", help="all pieces of this document")
    parser.add_argument("--row", type=whole(least=0), help="only this row")
    parser.add_argument("--text", action="store_true", help="whole texts")
    parser.add_argument("--abandoned", action="store_true", help="of steps that were rolled back")
    return parser.parse_args(words)


def lines_of(options: argparse.Namespace) -> Iterator[Record]:
    """The lines with what was asked for, and in them only that.

    Raises:
        UserError: no run, one that kept no such log, or the document's name is none.
    """
    path, document = log_of(options), None
    if not (options.folder / CONFIG).is_file():
        raise UserError(f"{options.folder} is no run folder: it holds no {CONFIG}")
    if not path.is_file():
        why = "nothing was rolled back" if options.abandoned else "train.log_samples was off"
        raise UserError(f"{path} does not exist: {why}")
    if options.document is not None:
        source, _, number = options.document.rpartition(":")
        if not source or not number.isdigit():
            raise UserError(f"--document {options.document}: not SOURCE:NUMBER")
        document = (source, int(number))
    for line in StepLines(path).read():
        if options.step not in (None, line["step"]):
            continue
        if not _is_line(line):
            raise UserError(f"{path}: the line of step {line['step']} is damaged")
        rows = {
            row: kept
            for row, pieces in enumerate(line["rows"])
            if options.row in (None, row)
            and (kept := [Sample(*p) for p in pieces if document in (None, tuple(p[:2]))])
        }
        if rows:
            yield {**line, "rows": rows}


def _is_line(line: Record) -> bool:
    """Whether a line holds rows of samples, as train/record/sample_log.py writes them."""
    rows = line.get("rows")
    return (
        isinstance(line.get("data"), str)
        and isinstance(rows, list)
        and all(isinstance(row, list) and all(map(_is_sample, row)) for row in rows)
    )


def _is_sample(piece: Any) -> bool:
    kinds = [type(value) for value in piece] if isinstance(piece, list) else []
    return kinds == [str, int, int, int, int] and 0 <= piece[3] < piece[4] and min(piece[1:3]) >= 0


def show(line: Record, loader: Loader, options: argparse.Namespace) -> None:
    """One line a piece."""
    for row, samples in line["rows"].items():
        for s in samples:
            try:
                text = loader.tokenizer.decode(loader.sample_tokens(s).tolist())
            except LookupError as error:
                raise UserError(
                    f"{log_of(options)}: the line of step {line['step']} is damaged: the data has"
                    f" no {s.source}:{s.document}"
                ) from error
            begins = repr(text[:_BEGINNING]) if not options.text else f"\n{text}"
            where = f"step {line['step']} row {row}"
            if "rollback" in line:
                where = f"rollback {line['rollback']} {where}"
            print(
                f"{where}  {s.source}:{s.document} pass {s.epoch} tokens {s.start}-{s.stop}"
                f"  {begins}"
            )


def open_loader(folder: Path, hashes: set[str]) -> Loader:
    """The run's data.

    Raises:
        UserError: it is not what it was.
    """
    run = read_run(folder)
    tokenizer = inherited_tokenizer(run) or build_tokenizer(run.data)
    depths = 1 + run.model.num_nextn_predict_layers
    loader = build_loader(run.data, tokenizer, run.seed, depths)
    now = data_hash(loader.manifest)
    for before in hashes - {now}:
        raise UserError(
            f"{folder} was trained on other data: its hash was {before}, now it is {now}"
        )
    return loader


def log_of(options: argparse.Namespace) -> Path:
    """The file to read."""
    return options.folder / (ABANDONED if options.abandoned else SAMPLES)


if __name__ == "__main__":
    sys.exit(main())
