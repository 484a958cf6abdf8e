"""What rounding takes from each weight, beside what all of it costs in loss.

Of arms that evaluate finished weights: an evaluation says it, a run that trains so does not.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from scripts.reports.answer import signed
from scripts.reports.document import Table
from scripts.studies.results import StudyResults


def weights_section(results: StudyResults) -> list[Table | str]:
    """Squared error of every rounded weight beside what all of it costs in loss."""
    arms = {
        arm.name: [errors for run in arm.runs.values() if (errors := run.weight_errors)]
        for arm in results.arms.values()
    }
    arms = {name: seeds for name, seeds in arms.items() if seeds}
    if not arms:
        return []
    weights = dict.fromkeys(weight for seeds in arms.values() for one in seeds for weight in one)
    rows = [[weight, *(_mean_of(weight, seeds) for seeds in arms.values())] for weight in weights]
    tests = {found.arm: found.test for found in results.comparisons}
    said = [signed(test.mean) if (test := tests.get(name)) is not None else "" for name in arms]
    rows.append([f"all: loss minus {results.study.baseline} (nats)", *said])
    return [
        "Of arms that evaluate finished weights (runs that train with rounding do not measure it):"
        " squared error over squared norm, mean over seeds. Where it is alike in all weights, what"
        " a loss is due to is how much of the model passes through them.",
        Table(["weight", *arms], rows),
    ]


def _mean_of(weight: str, seeds: Sequence[Mapping[str, float]]) -> str:
    values = [errors[weight] for errors in seeds if weight in errors]
    return f"{statistics.fmean(values):.5f}" if values else ""
