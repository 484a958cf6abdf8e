"""Student's t against printed tables, its error rate by simulation, crossings against formulas.

Tables: Student's t to the digits that textbooks print (half a unit of the last one is allowed).
Simulations use a fixed seed and bounds of four standard errors of a binomial share.
"""

import math
import random

import pytest

from scripts.studies.statistics import (
    Crossing,
    Finding,
    holm,
    judge,
    noise_floor,
    paired,
    spread,
    steps_to_reach,
    t_quantile,
    t_two_sided,
)

pytestmark = pytest.mark.core

TABLE = {  # two-sided 5 %, two-sided 1 %
    1: (12.706, 63.657), 2: (4.303, 9.925), 3: (3.182, 5.841), 4: (2.776, 4.604),
    5: (2.571, 4.032), 9: (2.262, 3.250), 30: (2.042, 2.750), 120: (1.980, 2.617),
}  # fmt: skip


@pytest.mark.parametrize(("degrees", "printed"), TABLE.items())
def test_quantiles_equal_the_table(degrees, printed):
    for probability, value in zip((0.975, 0.995), printed, strict=True):
        assert t_quantile(probability, degrees) == pytest.approx(value, abs=5e-4)
        assert t_two_sided(value, degrees) == pytest.approx(2 * (1 - probability), rel=2e-3)


def test_paired_test_equals_a_hand_computation():
    """Differences 1, 2, 3, 4, 5: mean 3, deviation sqrt(2.5), t = 3 / sqrt(0.5) = 4.243."""
    arm, base = {s: 10.0 + s for s in range(1, 6)}, {s: 10.0 for s in range(1, 6)}
    test = paired(arm, base, 0.05)
    assert test is not None
    assert test.mean == pytest.approx(3)
    assert test.deviation == pytest.approx(math.sqrt(2.5))
    assert test.half_width == pytest.approx(2.77645 * math.sqrt(0.5), rel=1e-5)
    assert test.p == pytest.approx(0.01324, abs=5e-5)


def test_pairs_are_matched_by_seed_and_diverged_runs_are_left_out():
    test = paired({1: 2.0, 2: 3.0, 3: math.inf, 4: 9.0}, {2: 1.0, 1: 1.0, 3: 1.0}, 0.05)
    assert test is not None
    assert test.differences == {1: 1.0, 2: 2.0}
    assert paired({1: 2.0}, {1: 1.0}, 0.05) is None


def simulated_pairs(generator, effect=0.0, sigma=0.02, common=0.05, pairs=5):
    """Two arms whose losses share the noise of the data order."""
    arm, base = {}, {}
    for seed in range(pairs):
        order = generator.gauss(3, common)
        arm[seed] = order + effect + generator.gauss(0, sigma)
        base[seed] = order + generator.gauss(0, sigma)
    return arm, base


def test_equal_arms_get_a_verdict_as_often_as_the_level_says():
    """4000 repeats: the share of false verdicts has a standard error of 0.0034 at 5 %."""
    generator = random.Random(1)
    tests = [paired(*simulated_pairs(generator), 0.05) for _ in range(4000)]
    share = sum(judge(test, 0.05) is not Finding.none for test in tests) / 4000
    assert share == pytest.approx(0.05, abs=4 * 0.0034)


def test_noise_floor_lets_hardly_any_equal_arm_through():
    """A verdict needs the test and the floor at once, so it is rarer than the level."""
    generator = random.Random(2)
    false = 0
    for _ in range(1000):
        again = paired(*simulated_pairs(generator), 0.05)
        test = paired(*simulated_pairs(generator), 0.05)
        assert again is not None
        assert test is not None
        false += judge(test, 0.05, noise_floor(again, 5, 0.05)) is not Finding.none
    assert false / 1000 < 0.05


def test_an_effect_of_some_sigmas_is_found_with_its_sign():
    generator = random.Random(3)
    for effect, expected in ((0.15, Finding.above), (-0.15, Finding.below)):
        found = []
        for _ in range(50):
            again = paired(*simulated_pairs(generator), 0.05)
            test = paired(*simulated_pairs(generator, effect), 0.05)
            assert again is not None
            assert test is not None
            found.append(judge(test, 0.05, noise_floor(again, 5, 0.05)))
        assert found.count(expected) >= 48
        assert set(found) <= {expected, Finding.none}


def test_a_small_lucky_spread_does_not_pass_the_floor():
    """Five differences that happen to agree are significant, but below what A/A shows."""
    test = paired({s: 3.010 + s * 1e-4 for s in range(5)}, dict.fromkeys(range(5), 3.0), 0.05)
    again = paired(
        {s: 3.0 + (-1) ** s * 0.03 for s in range(5)}, dict.fromkeys(range(5), 3.0), 0.05
    )
    assert test is not None
    assert again is not None
    assert judge(test, 0.05) is Finding.above
    assert judge(test, 0.05, noise_floor(again, 5, 0.05)) is Finding.none


def test_holm_equals_a_hand_computation():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_crossings_lie_on_the_line_in_log_steps():
    curve = {100: 4.0, 200: 3.0, 400: 2.0}  # falls by 1 with every doubling
    assert steps_to_reach(curve, 3.5).steps == pytest.approx(100 * 2**0.5)
    assert steps_to_reach(curve, 3.0) == Crossing(200)
    assert steps_to_reach(curve, 5.0) == Crossing(100, "<")
    assert steps_to_reach(curve, 1.9) == Crossing(400, ">")
    assert steps_to_reach({100: 4.0, 200: 4.5, 400: 2.0}, 3.0).steps > 200  # not monotone


def test_spread_of_one_value_is_unknown_not_zero():
    assert spread([2.0], 0.05).half_width == math.inf
    assert spread([1.0, 3.0], 0.05).half_width == pytest.approx(12.7062, rel=1e-5)
