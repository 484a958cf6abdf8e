"""Report of a study, or of any runs side by side: Markdown, and one HTML file that needs no other.

    python scripts/report.py study=muon_vs_adamw
    python scripts/report.py docs/studies/archives/muon_vs_adamw.tar.xz --out runs/again
    python scripts/report.py runs/one runs/other --out runs/comparison
    python scripts/report.py runs/learning_rates --out comparison.html

Of runs the report goes to runs/comparison in the folder where you are, unless --out names another
folder, or one HTML file by a name that ends in .html. With a study it reads the finished runs below
--runs again and writes docs/studies/NAME. With an archive it makes that study's report as it was
archived, whatever the defaults are today. With any number of run folders, finished or not, of
sweeps' folders, or of archived runs (NAME.tar.xz/RUN) it ranks their configurations over seeds,
draws them, and says why they differ: config, code, data, layout and machine, and the first step at
which they part.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.cli.command import command
from scripts.cli.parser import CommandParser
from scripts.reports.differences import RunDifference, differences, explain
from scripts.reports.document import (
    HTML,
    HTML_SUFFIX,
    Picture,
    ReportDocument,
    Table,
    check_page,
    check_report,
)
from scripts.reports.plots import draw_groups
from scripts.reports.study_report import write_study_report
from scripts.studies.archive import open_archive
from scripts.studies.cells import from_root
from scripts.studies.config import load_study
from scripts.studies.protocol import Protocol
from scripts.studies.store import ARCHIVED, Store, read_run
from train.errors import ROOT, UserError
from train.exchange.output_files import file_errors
from train.record.ranking import (
    BITS,
    LOSS,
    OTHER_TEXT,
    Ranking,
    RunSummary,
    find_runs,
    rank,
    ranking_lines,
    read_summary,
    run_names,
    summary_of,
)
from train.terminal import wrapped

_MOST_COLUMNS = 6


@command()
def main(words: Sequence[str] | None = None) -> None:
    """Parse, read, write."""
    args = _parse(words)
    first = args.what[0]
    if first.startswith("study=") or first.endswith(ARCHIVED):
        if args.out and args.out.suffix == HTML_SUFFIX:
            raise UserError(f"--out {args.out}: the report of a study is a folder, {first} no run")
        path = _study(args) if first.startswith("study=") else _archive(args)
        print(path.read_text(encoding="utf-8").split("\n## ")[0])
    else:
        path = _runs(args)
    beside = "" if path.suffix == HTML_SUFFIX else f" and {path.with_suffix(HTML_SUFFIX).name}"
    print(f"report: {path}{beside}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("what", nargs="+", help="study=NAME KEY=VALUE ..., an archive, or runs")
    parser.add_argument(
        "--out",
        type=Path,
        help="a folder, or NAME.html for one file (default: docs/studies, of runs runs/comparison)",
    )
    parser.add_argument(
        "--runs", type=Path, action="append", help="where a study's runs lie (may be repeated)"
    )
    return parser.read(argv, _check_words, intermixed=True)


def _check_words(args: argparse.Namespace) -> None:
    if not all(word.strip() for word in args.what):
        raise UserError("'' names no run: give folders of runs, an archive, or study=NAME")


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
    out = args.out or Path("runs", "comparison")
    one_file = out.suffix == HTML_SUFFIX
    (check_page if one_file else check_folder)(out)
    found = [run for word in args.what for run in _summaries(Path(word))]
    runs = list({run.folder.resolve(): run for run in found}.values())  # each run once
    if not args.out:
        told = f"writing to {out}; --out takes another folder, or NAME.html for one file"
        print(wrapped(told, sys.stdout))
    for line in ranking_lines(rank(runs)):
        print(line)
    if len(runs) > 1:
        print(wrapped(f"{explain(runs)}.", sys.stdout))
    document = comparison(runs)
    return document.page(out) if one_file else document.write(out)


def _summaries(path: Path) -> list[RunSummary]:
    """The runs that a word of the command line means."""
    if path.parent.is_file():
        run = read_run(path)  # of an archive
        return [summary_of(path, run.files, run.records)]
    if not path.exists():
        raise UserError(f"{path} does not exist")
    return [read_summary(folder) for folder in find_runs(path)]


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


def comparison(runs: Sequence[RunSummary]) -> ReportDocument:
    """Any number of runs side by side."""
    ranking, names = rank(runs), run_names(runs)
    document = ReportDocument(_title(runs), _lead(ranking, runs))
    document.add("Ranking", *_warnings(ranking), *_ranking_tables(ranking))
    if any(run.records for run in runs):
        document.add("Curves", Picture("curves", "losses by configuration", draw_groups(ranking)))
    document.add("Runs", _runs_table(runs, names))
    found = differences(runs)
    for aspect in dict.fromkeys(d.aspect for d in found):
        document.add(f"Differences: {aspect}", _differences_table(aspect, found, names))
    return document


def _title(runs: Sequence[RunSummary]) -> str:
    return "One run" if len(runs) == 1 else f"Comparison of {len(runs)} runs"


def _lead(ranking: Ranking, runs: Sequence[RunSummary]) -> str:
    """Who leads, and how the runs differ."""
    best, measure = ranking.groups[0], ranking.measure
    if not best.values(measure):
        leads = "No run was evaluated yet"
    elif len(ranking.groups) == 1:
        leads = f"{best.label}: {measure} {best.shown(measure)}"
    else:
        leads = f"{best.label} leads with {measure} {best.shown(measure)}"
        if len(ranking.by_text) > 1:
            leads += f" among the {len(ranking.by_text[0])} that were evaluated on its text"
    return f"{leads}." if len(runs) == 1 else f"{leads}; {explain(runs)}."


def _warnings(ranking: Ranking) -> Iterator[str]:
    """What forbids to take the order for an answer."""
    if ranking.unlike:
        yield f"Losses in nats per token do not compare, since {ranking.unlike}."
    runs = [run for group in ranking.groups for run in group.runs]
    if len({run.step for run in runs if run.records}) > 1:
        yield "Not all runs have done as many steps."
    if len(runs) > 1 and any(group.seeds == 1 for group in ranking.groups):
        yield (
            "A configuration with one seed has no band: differences as small as those between seeds"
            " mean nothing."
        )


def _ranking_tables(ranking: Ranking) -> Iterator[str | Table]:
    """One for each held-out text."""
    measures = (BITS, LOSS) if ranking.measure == BITS else (LOSS, BITS)
    unit = {LOSS: "val_loss, nats per token", BITS: "bits per byte"}
    for number, groups in enumerate(ranking.by_text):
        rows = [
            [str(place), f"`{group.label}`", str(group.seeds), *map(group.shown, measures)]
            for place, group in enumerate(groups, start=1)
        ]
        if number:
            yield f"{OTHER_TEXT[0].upper()}{OTHER_TEXT[1:]}:"
        yield Table(["place", "configuration", "seeds", *(unit[m] for m in measures)], rows)


def _runs_table(runs: Sequence[RunSummary], names: Sequence[str]) -> Table:
    rows = [
        [name, run.state, f"{run.step:,}", f"{run.records[-1].get('tokens', 0):,}"
         if run.records else "", _number(run.value(LOSS)), _number(run.value(BITS)),
         str(run.config.get("seed", "")),
         f"`{str(run.aspect('code').get('source_sha256', ''))[:12]}`"]
        for name, run in zip(names, runs, strict=True)
    ]  # fmt: skip
    head = ["run", "state", "steps", "tokens", "val_loss", "bits per byte", "seed", "code"]
    return Table(head, rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if math.isfinite(value) else "not finite"


def _differences_table(aspect: str, found: Sequence[RunDifference], names: Sequence[str]) -> Table:
    """A column a run; of many runs a line a run and a column a key."""
    some = [d for d in found if d.aspect == aspect]
    if len(names) <= _MOST_COLUMNS or len(some) > _MOST_COLUMNS:
        return Table([aspect, *names], [[f"`{d.key}`", *d.values] for d in some])
    rows = [[name, *values] for name, *values in zip(names, *(d.values for d in some), strict=True)]
    return Table(["run", *(f"`{d.key}`" for d in some)], rows)


if __name__ == "__main__":
    sys.exit(main())
