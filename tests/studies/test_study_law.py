"""The law's fit on losses drawn from a known law: exact without noise, and intervals that cover.

Coverage: 95 % intervals of 60 synthetic studies; a true 95 % has a standard error of 2.8 %, so 84 %
is four below.
"""

import numpy as np
import pytest

from scripts.reports.study_report import study_document
from scripts.studies.config import AGAIN, load_study
from scripts.studies.law import fit_law, predict_last
from scripts.studies.protocol import Protocol
from scripts.studies.results import gather
from scripts.studies.store import Store
from tests.studies.folders import CODE, leave_run

pytestmark = pytest.mark.core
FLOPS = [3e12, 1.3e13, 9e13, 4e14, 1.2e15]
E, A, ALPHA = 2.0, 1.5, 0.15


def truth(flops):
    centre = np.exp(np.mean(np.log(FLOPS)))
    return E + A * (flops / centre) ** -ALPHA


def study(generator, sigma, seeds=3):
    return {c: list(truth(c) + sigma * generator.standard_normal(seeds)) for c in FLOPS}


def test_a_law_without_noise_is_found_to_the_grid():
    """The grid of alpha steps by 0.8 %."""
    law = fit_law({c: [truth(c)] * 3 for c in FLOPS}, 0.05)
    assert law.exponent.value == pytest.approx(ALPHA, rel=0.008)
    assert law.irreducible.value == pytest.approx(E, abs=0.03)
    assert law.loss(1e16) == pytest.approx(truth(1e16), abs=5e-3)
    assert law.deviation < 1e-12


def test_intervals_cover_the_true_law():
    generator = np.random.default_rng(11)
    inside = np.zeros(3)
    for _ in range(60):
        law = fit_law(study(generator, 0.01), 0.05, draws=400)
        pairs = ((law.exponent, ALPHA), (law.irreducible, E), (law.reducible, A))
        inside += [found.low <= true <= found.high for found, true in pairs]
    assert (inside / 60 >= 0.84).all(), inside / 60


def test_prediction_of_the_last_point_covers_it_where_the_law_holds_and_not_where_it_breaks():
    generator = np.random.default_rng(12)
    holds = [predict_last(study(generator, 0.01), 0.05, draws=400).holds for _ in range(60)]
    assert np.mean(holds) >= 0.84
    broken = study(generator, 0.01)
    broken[FLOPS[-1]] = [loss + 0.5 for loss in broken[FLOPS[-1]]]
    assert not predict_last(broken, 0.05).holds


def test_more_noise_gives_wider_intervals():
    widths = []
    for sigma in (0.002, 0.02):
        law = fit_law(study(np.random.default_rng(13), sigma), 0.05)
        widths.append(law.exponent.high - law.exponent.low)
    assert 2 * widths[0] < widths[1]


def test_a_pure_power_law_has_no_irreducible_loss():
    points = {c: [0.5 * (c / 1e13) ** -0.1 + d for d in (-1e-4, 0, 1e-4)] for c in FLOPS}
    law = fit_law(points, 0.05)
    assert law.irreducible.value < 0.005
    assert law.loss(1e16) == pytest.approx(0.5 * 1e3**-0.1, rel=0.02)


def test_too_few_points_or_seeds_are_refused():
    with pytest.raises(ValueError, match="4 points of 2 seeds"):
        fit_law({1e12: [3.0], 1e13: [2.0], 1e14: [1.5], 1e15: [1.2]}, 0.05)


# ---- a study -------------------------------------------------------------------------------------
def test_a_study_of_the_family_reports_its_law(tmp_path):
    """Runs of five scales whose losses follow the law: the report finds it, and the last point."""
    plan = Protocol(load_study("scaling", ["seeds=[1,2]"]), Store([tmp_path], CODE), tmp_path)
    generator = np.random.default_rng(14)
    flops = {arm.name: arm.run_flops for arm in gather("scaling", plan).arms.values()}
    ascending = [flops[arm] for arm in plan.study.law.arms]
    assert ascending == sorted(ascending), "the points ascend in FLOPs"
    while (batch := next(plan.batches(), None)) is not None:
        for cell in batch.cells:
            middle = plan.study.grid("four" if cell.arm == AGAIN else cell.arm)[1]
            noise = 0.01 * generator.standard_normal() if cell.seed else abs(cell.lr - middle)
            loss = 2 + 1.5 * (flops[cell.arm.replace(AGAIN, "four")] / 1e13) ** -0.15 + noise
            name = f"{cell.arm}_{cell.steps}_{cell.lr}_{cell.seed}"
            leave_run(tmp_path / name, plan.config(cell), {cell.steps: loss})
        plan.store.scan()
    results = gather("scaling", plan)
    assert results.law is not None
    assert results.law.exponent.low < 0.15 < results.law.exponent.high
    text = study_document(results).markdown()
    assert "the loss falls with FLOPs to the power of -0.1" in text
    assert "the costliest point is as predicted from the others" in text
