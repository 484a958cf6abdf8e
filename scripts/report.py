"""Report of a study, or of any runs side by side: Markdown, and one HTML file that needs no other.

    python scripts/report.py study=muon_vs_adamw
    python scripts/report.py docs/studies/archives/muon_vs_adamw.tar.xz --out runs/again
    python scripts/report.py runs/one runs/other --out runs/comparison

With a study it reads the finished runs below --runs again and writes docs/studies/NAME. With an
archive it makes that study's report as it was archived, whatever the defaults are today. With run
folders (or archived ones, NAME.tar.xz/RUN) it says why they differ: config, code, data, layout and
machine, the first step at which they part, and their curves.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.cli.command import command
from scripts.cli.parser import CommandParser
from scripts.studies.archive import open_archive
from scripts.studies.config import load_study
from scripts.studies.differences import differences, explain
from scripts.studies.document import HTML, Picture, ReportDocument, Table, check_report
from scripts.studies.plots import draw_runs
from scripts.studies.protocol import Protocol, from_root
from scripts.studies.report import write_study_report
from scripts.studies.store import ARCHIVED, FinishedRun, Store, read_run
from train.errors import ROOT, UserError
from train.exchange.output_files import file_errors


@command()
def main(words: Sequence[str] | None = None) -> None:
    """Parse, read, write."""
    args = _parse(words)
    first = args.what[0]
    if first.startswith("study="):
        path = _study(args)
    else:
        path = _archive(args) if first.endswith(ARCHIVED) else _runs(args)
    print(path.read_text(encoding="utf-8").split("\n## ")[0])
    print(f"report: {path} and {path.with_suffix('.html').name}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("what", nargs="+", help="study=NAME KEY=VALUE ..., an archive, or runs")
    parser.add_argument(
        "--out", type=Path, help="where to write (default: docs/studies, or runs/comparison)"
    )
    parser.add_argument(
        "--runs", type=Path, action="append", help="where a study's runs lie (may be repeated)"
    )
    return parser.parse_intermixed_args(argv)


def _study(args: argparse.Namespace) -> Path:
    root = ROOT
    folders = args.runs or [root / "runs" / "studies", root / "docs" / "studies" / "archives"]
    name = args.what[0].partition("=")[2]
    out = args.out or root / "docs" / "studies"
    check_report(out / name)
    study = load_study(name, args.what[1:])
    protocol = Protocol(study, Store(folders, None), Path(from_root(folders[0])))
    return write_study_report(name, protocol, out)


def _archive(args: argparse.Namespace) -> Path:
    path = Path(args.what[0])
    if len(args.what) > 1:
        raise UserError(f"{path} is a whole study; {args.what[1]} cannot stand beside it")
    name = path.name.removesuffix(ARCHIVED)
    return write_study_report(name, open_archive(path), args.out or ROOT / "docs" / "studies")


def _runs(args: argparse.Namespace) -> Path:
    folders = [Path(word) for word in args.what]
    if len(folders) < 2:
        raise UserError(f"{folders[0]}: give at least two run folders, or study=NAME")
    out = args.out or ROOT / "runs" / "comparison"
    check_folder(out)
    runs = [read_run(folder) for folder in folders]
    return comparison(runs).write(out)


def check_folder(out: Path) -> None:
    """Refuse a folder that holds something, and no report of ours.

    Raises:
        UserError: names it and what it holds.
    """
    with file_errors(out):
        held = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if held and HTML not in held:
        raise UserError(f"--out {out} holds {held[0]}, and no report: choose an empty folder")
    check_report(out)


def comparison(runs: Sequence[FinishedRun]) -> ReportDocument:
    """Runs side by side."""
    names = _names(runs)
    document = ReportDocument("Comparison of runs", f"{' | '.join(names)}: {explain(runs)}.")
    found = differences(runs)
    for aspect in dict.fromkeys(d.aspect for d in found):
        rows = [[f"`{d.key}`", *d.values] for d in found if d.aspect == aspect]
        document.add(f"Differences: {aspect}", Table([aspect, *names], rows))
    rows = [
        [name, f"`{run.receipt['config_sha256'][:12]}`", f"`{run.code[:12]}`",
         str(len(run.records)), f"{run.val_loss:.4f}"]
        for name, run in zip(names, runs, strict=True)
    ]  # fmt: skip
    head = ["run", "config", "code", "steps", "validation loss"]
    document.add("Results", Table(head, rows))
    if any(run.records for run in runs):
        figure = draw_runs(dict(zip(names, runs, strict=True)))
        document.add("Curves", Picture("curves", "loss of each run", figure))
    return document


def _names(runs: Sequence[FinishedRun]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len({*names}) == len(names):
            return names
    return [str(run.folder) for run in runs]


if __name__ == "__main__":
    sys.exit(main())
