"""The ladder of lengths and the search of several keys, on losses that are known functions of both.

Muon's loss is 6 - log2(steps / 10) when tuned; AdamW reaches that of 0.6 steps**0.9 of them, so
the ratio to equal loss is 0.6 steps**-0.1 and a power law of the length predicts the longest.
"""

import math
import re

import pytest

from scripts.reports.study_report import study_document
from scripts.studies.archive import open_archive, pack
from scripts.studies.config import load_study
from scripts.studies.protocol import Protocol
from scripts.studies.results import gather
from scripts.studies.statistics import extrapolate
from scripts.studies.store import Store
from tests.studies.folders import CODE, leave_run
from train.errors import UserError

BEST = {
    "muon": ["optim.muon.weight_decay=0.01", "optim.muon.momentum=0.98"],
    "adamw": ["optim.schedule.warmup_steps=40"],
}


def loss_of(plan, cell):
    """Tuned: the formulas above, and a seed's noise that all arms share."""
    kind = cell.arm.partition("_")[0]
    middle = plan.study.grid(cell.arm)[1]
    penalty = abs(math.log2(cell.lr / middle))
    penalty += 0.1 * len({*BEST[kind]} ^ {*cell.settings})
    steps = cell.steps if kind == "muon" else 0.6 * cell.steps**0.9
    return 6 - math.log2(steps / 10) + 0.05 * cell.seed + penalty


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ladder")
    fewer = [f"~arms.muon_{steps}" for steps in (100, 400, 800, 1600)]
    words = ["seeds=[1,2]", "ladder.arms=[muon_50,muon_200,muon_3200]", *fewer]
    plan = Protocol(load_study("muon_ladder", words), Store([folder], CODE), folder)
    number = 0
    while (batch := next(plan.batches(), None)) is not None:
        for cell in batch.cells:
            number += 1
            leave_run(folder / str(number), plan.config(cell), {cell.steps: loss_of(plan, cell)})
        plan.store.scan()
    return plan


def test_search_finds_the_best_of_every_key_by_equally_many_trials(ladder):
    for arm in ("muon_200", "muon_3200", "adamw_800"):
        assert {*ladder.tuning(arm).settings} == {*BEST[arm.partition("_")[0]]}, arm
        assert len(ladder.choice(arm).tried) + len(ladder.tuning(arm).tried) == 9
    run = next(iter(ladder.results("muon_50").values())).run
    assert (run.optim.muon.weight_decay, run.optim.muon.momentum) == (0.01, 0.98)
    assert run.train.steps == 50


def test_ladder_gives_the_ratio_at_each_length_and_foresees_the_longest(ladder):
    results = gather("muon_ladder", ladder)
    assert results.missing == 0
    assert [rung.steps for rung in results.ladder] == [200, 800, 3200]
    for rung in results.ladder:
        for ratio in rung.ratios.values():
            assert ratio == pytest.approx(0.6 * rung.steps**-0.1, rel=1e-6)
        assert rung.seconds == pytest.approx(rung.ratios)  # their steps take equal time
    text = study_document(results).markdown()
    assert "tuned at its own length, by 9 trials" in text
    row = next(line for line in text.splitlines() if line.startswith("| adamw_3200 | 6,553,600"))
    assert re.search(r"\| 0\.268 \| 0\.268 \+- 0\.000 \| 0\.268 \+- 0\.000 \| 2 \|", row), row
    assert "`optim.muon.momentum=0.98`" in text


def test_tuned_runs_are_found_in_the_archive(ladder, tmp_path):
    path = tmp_path / "muon_ladder.tar.xz"
    pack(ladder, path)
    before, after = (
        study_document(gather("muon_ladder", plan)).markdown()
        for plan in (ladder, open_archive(path))
    )
    assert after == before


def test_extrapolation_is_the_line_in_logarithms():
    points = {x: 3 * x**-0.2 for x in (1.0, 10.0, 50.0)}
    assert extrapolate(points, 1000.0) == pytest.approx(3 * 1000**-0.2)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("arms.adamw_200.tune={optim.adamw.weight_decay:[0.3]}", "ladder: arms must be tuned by"),
        ("arms.muon_100.steps=50", "need arms.NAME.steps that ascend"),
        ("ladder.to=[adamw_200]", "must be at least 3 of arms"),
    ],
)
def test_unfair_ladders_are_refused(word, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_study("muon_ladder", [word])
