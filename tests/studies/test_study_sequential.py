"""Sequential verdicts: error rate and power of whole simulated studies, and what a study then runs.

Simulated studies go through the function that decides a real one (``take_look``), with seeds other
than those behind the bounds. The share of 10,000 studies at a true rate of 5 % has a standard error
of 0.22 %, so at most 5.5 % is asked of what the bounds promise.
"""

import numpy as np
import pytest

from scripts import study
from scripts.reports.study_report import study_document
from scripts.studies.cells import Cell
from scripts.studies.config import AGAIN, load_study
from scripts.studies.protocol import Protocol
from scripts.studies.results import gather
from scripts.studies.sequential import (
    Standing,
    design,
    effect_found,
    simulate,
    t_statistics,
    take_all_looks,
    take_look,
)
from scripts.studies.statistics import Finding, judge, noise_floor, paired, t_quantile
from scripts.studies.store import Store
from tests.studies.folders import CODE, leave_run
from train.errors import ExitCode

LOOKS = (3, 5, 8, 12)
STUDIES = 10_000


# ---- bounds --------------------------------------------------------------------------------------
@pytest.mark.core
@pytest.mark.parametrize("arms", [1, 4])
@pytest.mark.parametrize("spending", [1.0, 3.0])
def test_equal_arms_get_a_verdict_in_at_most_five_and_a_half_percent_of_studies(arms, spending):
    bounds = design(LOOKS, 0.05, arms, spending, 0.1)
    for again in (False, True):
        found = simulate(bounds, (0.0,) * arms, again, STUDIES, seed=101)
        assert (found.sign_RA != 0).any(-1).mean() <= 0.055


@pytest.mark.core
def test_bounds_spend_the_level_and_not_a_part_of_it():
    """Without futility and floor a single arm's rate is the level, within four standard errors."""
    found = simulate(design(LOOKS, 0.05, 1, 1.0, 0.0), (0.0,), False, STUDIES, seed=103)
    assert (found.sign_RA != 0).mean() == pytest.approx(0.05, abs=4 * 0.0022)


def test_looking_often_without_bounds_would_break_the_level():
    """The same looks, each judged at 5 %: that this simulation can find a wrong error rate."""
    x_RN = np.random.default_rng(5).standard_normal((STUDIES, LOOKS[-1]))
    naive = np.array([t_quantile(0.975, n - 1) for n in LOOKS])
    assert (np.abs(t_statistics(x_RN, LOOKS)) >= naive).any(-1).mean() > 0.08


@pytest.mark.core
@pytest.mark.parametrize("arms", [1, 3])
def test_a_planted_effect_is_found_with_the_stated_power(arms):
    """Of 10,000 fresh studies; the statement itself rests on 4,000, so 2.5 % are 4 errors."""
    effect = effect_found(LOOKS, 0.05, arms, 1.0, 0.1, True, 0.8)
    effects = (-effect, *[0.0] * (arms - 1))
    found = simulate(design(LOOKS, 0.05, arms, 1.0, 0.1), effects, True, STUDIES, seed=107)
    assert (found.sign_RA[:, 0] == -1).mean() == pytest.approx(0.8, abs=0.025)
    assert (found.sign_RA[:, 0] == 1).mean() < 0.001


def test_a_large_effect_ends_early_and_no_effect_before_the_last_seed():
    bounds = design(LOOKS, 0.05, 1, 1.0, 0.1)
    large = simulate(bounds, (10.0,), True, 1000)
    assert large.seeds_RA.mean() < 3.5
    assert simulate(bounds, (0.0,), True, 1000).seeds_RA.mean() < 0.75 * LOOKS[-1]


def test_one_look_is_the_plain_test():
    bounds = design((5,), 0.05, 1, 1.0, 0.1)
    assert bounds.critical_KA[0, 0] == pytest.approx(t_quantile(0.975, 4))
    generator = np.random.default_rng(2)
    for _ in range(200):
        x, again = 0.8 + generator.standard_normal(5), generator.standard_normal(5)
        found = take_all_looks(bounds, x[None, None], again[None])
        both = [dict(enumerate(values)) for values in (x, again)]
        test, a_a = (paired(values, dict.fromkeys(values, 0.0), 0.05) for values in both)
        assert test is not None
        assert a_a is not None
        verdict = judge(test, 0.05, noise_floor(a_a, 5, 0.05))
        assert (found.sign_RA[0, 0] == 1) == (verdict is Finding.above)


def test_a_verdict_leaves_its_part_of_the_level_to_the_others():
    """|t| of 5 and 3 at the last look: 3 is below Bonferroni's bound and above Holm's second."""
    bounds = design((12,), 0.05, 2, 1.0, 0.0)
    noise = np.tile([1.0, -1.0], 6)
    unit = noise.std(ddof=1) / np.sqrt(12)
    x_RAN = np.stack([5 * unit + noise, 2.4 * unit + noise])[None]
    assert bounds.critical_KA[0, 1] > 2.4 > bounds.critical_KA[0, 0]
    assert take_all_looks(bounds, x_RAN, None).sign_RA.tolist() == [[1, 1]]
    alone = np.stack([0 * unit + noise, 2.4 * unit + noise])[None]
    assert take_all_looks(bounds, alone, None).sign_RA.tolist() == [[0, 0]]


def test_a_diverged_run_ends_its_arm_and_no_other():
    bounds = design(LOOKS, 0.05, 2, 1.0, 0.1)
    x_RAN = np.random.default_rng(3).standard_normal((1, 2, 12))
    x_RAN[0, 0, 1] = np.inf
    standing = Standing.fresh(1, 2)
    take_look(bounds, 0, standing, x_RAN, None)
    assert standing.lost_RA.tolist() == [[True, False]]
    assert standing.open_RA.tolist() == [[False, True]]


# ---- a study -------------------------------------------------------------------------------------
WORDS = [
    "steps=10", f"seeds={list(range(1, 13))}", "search.fraction=0.5", "evaluations=2",
    f"sequential.looks={list(LOOKS)}",
]  # fmt: skip
ARMS = ["mhc", "plain", "same"]
SAME = '+arms={same:{overrides:["model.hc_sinkhorn_iters=19"]}}'


def protocol(folder, *words):
    config = load_study("mhc_vs_plain", [*WORDS, SAME, *words])
    return Protocol(config, Store([folder], CODE), folder)


def loss(cell, effect=0.5):
    """Search: best at 0.016. Seeds: noise of 0.01; plain lies ``effect`` above, same nowhere."""
    if cell.seed == 0:
        return 3 + abs(np.log2(cell.lr / 0.016))
    key = [cell.seed, [*ARMS, AGAIN].index(cell.arm)]
    noise = 0.01 * np.random.default_rng(key).standard_normal()
    return float(3 + noise + (effect if cell.arm == "plain" else 0))


def finish(folder, plan, cells):
    for cell in cells:
        name = f"{cell.arm}_{cell.steps}_{cell.lr}_{cell.seed}"
        leave_run(folder / name, plan.config(cell), {cell.steps: loss(cell)})
    plan.store.scan()


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A study that ran to its end, and the seeds that each arm got, in batches."""
    folder, batches = tmp_path_factory.mktemp("sequential"), []
    plan = protocol(folder)
    while (batch := next(plan.batches(), None)) is not None:
        batches.append((batch.title, [cell.seed for cell in batch.cells]))
        finish(folder, plan, batch.cells)
    return plan, batches


def test_seeds_go_where_the_verdict_is_open(ended):
    plan, batches = ended
    seeds = {
        arm: [seed for title, found in batches if title == f"seeds, {arm}" for seed in found]
        for arm in ARMS
    }
    assert seeds["plain"] == [1, 2, 3], "its verdict falls at the first look"
    assert seeds["mhc"] == seeds["same"] == list(range(1, len(seeds["same"]) + 1))
    assert 5 <= len(seeds["same"]) <= 12
    results = gather("x", plan)
    assert results.missing == 0
    assert [c.verdict for c in results.comparisons] == [Finding.above, Finding.none]
    text = study_document(results).markdown()
    assert "plain has a higher loss than mhc" in text
    assert "3 of 12 seeds" in text
    assert "same against mhc: no verdict, " in text


def test_interval_of_a_verdict_excludes_nothing(ended):
    """The half-width is the bound's, so an interval without 0 and a verdict are one thing."""
    for found in gather("x", ended[0]).comparisons:
        assert found.test is not None
        assert (abs(found.test.mean) > found.test.half_width) == (found.verdict is not Finding.none)


def test_more_finished_runs_than_asked_change_no_verdict(ended):
    """Seeds that another study left there stay out of the statistics."""
    plan, _ = ended
    before = study_document(gather("x", plan)).markdown()
    rate = plan.choice("plain").best
    assert rate is not None
    finish(plan.out, plan, [Cell("plain", 10, rate, seed) for seed in (11, 12)])
    assert study_document(gather("x", plan)).markdown() == before


def test_machines_that_share_a_study_run_every_seed_once_and_merge(tmp_path):
    """Two machines in turn; each sees what was copied from the other."""
    words = ["seeds=[1,2,3,4]", "sequential.looks=[2,4]"]
    config = load_study("mhc_vs_plain", [*WORDS[:1], *WORDS[2:4], *words])
    plan = Protocol(config, Store([tmp_path], CODE), tmp_path)
    ran = {1: [], 2: []}
    while any(batches := [study.first_of_share(plan, (mine, 2)) for mine in (1, 2)]):
        for mine, batch in enumerate(batches, start=1):
            if batch is not None:
                finish(tmp_path / str(mine), plan, batch.cells)
                ran[mine] += batch.cells
    assert not {*ran[1]} & {*ran[2]}
    by_seed = [{cell.seed for cell in ran[mine] if cell.seed} for mine in (1, 2)]
    assert not by_seed[0] & by_seed[1], "a pair's runs are of one machine"
    assert all(by_seed)
    assert gather("x", plan).missing == 0


def test_cost_and_power_are_told_before(tmp_path, capsys):
    args = ["study=mhc_vs_plain", *WORDS, "--dry-run", "--out", str(tmp_path / "none")]
    assert study.main([*args, "--archive", str(tmp_path / "docs")]) == ExitCode.finished
    told = capsys.readouterr().out
    assert "left to the next look: 15 runs" in told  # 6 of the search, 3 arms of 3 seeds
    assert "at most: 42 runs" in told  # 6 and 3 arms of 12 seeds
    assert "verdicts after 3, 5, 8, 12 seeds; equal arms get one in at most 5% of studies" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sequential.looks=[3,4]"], "sequential.looks=[3, 4] must ascend"),
        (["sequential.looks=[1,5]"], "sequential.looks=[1, 5] must ascend"),
        (["sequential.spending=0"], "sequential.spending=0.0 must lie in (0, 10]"),
        (["sequential.futility=0.9"], "sequential.futility=0.9 must lie in"),
        (["--share", "3/2"], "--share 3/2 must be I/N"),
        (["--also", "nowhere"], "--also nowhere"),
    ],
)
def test_wrong_looks_and_shares_are_refused_in_one_line(words, message, tmp_path, capsys):
    base = ["study=mhc_vs_plain", "seeds=[1,2,3,4,5]", "--out", str(tmp_path)]
    assert study.main([*base, *words, "--dry-run"]) == ExitCode.user_error
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
