"""A study's results in words, tables and figures: ``report.md``, ``report.html``, ``results.json``.

Everything that equal runs share stands first; what a machine measured (seconds) stands in one
section of its own, so that a study which was interrupted reads the same but for that section.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripts.studies.document import ReportDocument
from scripts.studies.evidence import (
    acts_table,
    arms_table,
    limits,
    measured,
    others_table,
    protocol_section,
    receipts,
)
from scripts.studies.protocol import Protocol
from scripts.studies.results import (
    StudyResults,
    gather,
)
from scripts.studies.sections import (
    catch_up,
    comparisons,
    curves,
    design,
    ladder,
    law_section,
    search_picture,
    search_table,
)
from scripts.studies.verdicts import lead
from train.record.receipt import plain, write_json

MEASURED = "Measured on this machine"


def write_study_report(name: str, protocol: Protocol, root: Path) -> Path:
    """Write a study's report to ``root/NAME``; returns the Markdown's path."""
    results = gather(name, protocol)
    folder = root / name
    path = study_document(results).write(folder)
    write_json(folder / "results.json", as_json(results))
    return path


def study_document(results: StudyResults) -> ReportDocument:
    """The report."""
    document = ReportDocument(f"Study {results.name}", lead(results))
    document.add("Question", results.study.question, design(results))
    if results.study.law.arms:
        document.add("The law", *law_section(results))
    if results.study.ladder.arms:
        document.add("The ladder", *ladder(results))
    document.add("Comparisons", *comparisons(results))
    if results.catch_up is not None:
        document.add("Steps to the other arm's loss", *catch_up(results, results.catch_up))
    document.add("Curves", curves("curves", "validation loss of each arm", results))
    document.add("Learning rates", search_table(results), search_picture(results))
    document.add("Arms", arms_table(results), acts_table(results))
    document.add("What the protocol can find", protocol_section(results))
    document.add("Limits", limits(results))
    if others := others_table(results.name):
        document.add("What others report", others)
    document.add("Configs and receipts", *receipts(results))
    document.add(MEASURED, *measured(results))
    return document


def as_json(results: StudyResults) -> dict[str, Any]:
    """The figures of a report, for other programs."""
    return {
        "study": {"name": results.name, **plain(results.study)},
        "lead": lead(results),
        "missing": results.missing,
        "noise_floor": results.floor,
        "arms": {
            arm.name: {
                "lr": arm.choice.best,
                "reason": arm.choice.reason,
                "search": {str(k): v for k, v in arm.choice.tried.items()},
                "val_loss": {str(k): v for k, v in arm.losses.items()},
                "runs": {str(k): v.name for k, v in arm.runs.items()},
                "parameters": arm.parameters,
                "flops_per_token": arm.flops,
                "acts": arm.acts(),
            }
            for arm in [*results.arms.values(), *([results.again] if results.again else [])]
        },
        "comparisons": [plain(c) for c in results.comparisons],
        "again": plain(results.again_test) if results.again_test else None,
        "catch_up": plain(results.catch_up) if results.catch_up else None,
        "ladder": [plain(rung) for rung in results.ladder],
        "law": plain(results.law) if results.law else None,
        "predicted": plain(results.predicted) if results.predicted else None,
    }
