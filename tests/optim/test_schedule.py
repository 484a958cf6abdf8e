"""Learning rates against a table worked out by hand (reference C.2) and their invariants."""

import math
from itertools import pairwise

import pytest

from optim.config import OptimConfig, ScheduleConfig, ScheduleKind
from optim.schedule import check_run_length, decay_start, decay_started, learning_rate

TOTAL = 1000


def at(kind, tokens, step=10**9, **keys):
    schedule = ScheduleConfig(**{"kind": kind, "warmup_steps": 0, "decay_start": 0.6, **keys})
    config = OptimConfig(lr=2.0, schedule=schedule)
    return learning_rate(config, step=step, tokens=tokens, total_tokens=TOTAL)


@pytest.mark.core
@pytest.mark.parametrize(
    ("kind", "tokens", "wanted"),
    [
        ("constant", 0, 2.0),
        ("constant", 999, 2.0),
        ("cosine", 0, 2.0),
        ("cosine", 500, 1.1),  # half way between 2 and 0.2
        ("cosine", 250, 0.2 + 1.8 * (2 + math.sqrt(2)) / 4),
        ("cosine", 1000, 0.2),
        ("wsd", 0, 2.0),
        ("wsd", 600, 2.0),
        ("wsd", 700, 1.55),
        ("wsd", 800, 1.1),
        ("wsd", 1000, 0.2),
        ("cosine_tail", 0, 2.0),
        ("cosine_tail", 600, 2.0),
        ("cosine_tail", 700, 0.2 + 1.8 * (2 + math.sqrt(2)) / 4),
        ("cosine_tail", 800, 1.1),
        ("cosine_tail", 1000, 0.2),
        ("cosine_tail", 5000, 0.2),  # a run that goes on stays at the end value
    ],
)
def test_learning_rate_by_tokens(kind, tokens, wanted):
    assert at(kind, tokens) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.core
@pytest.mark.parametrize(
    ("step", "wanted"), [(1, 0.02), (2, 0.04), (50, 1.0), (99, 1.98), (100, 2.0), (101, 2.0)]
)
def test_warmup_is_linear_and_ends_at_its_step(step, wanted):
    assert at("cosine_tail", 0, step, warmup_steps=100) == pytest.approx(wanted, rel=1e-12)


def test_no_warmup_starts_at_the_peak():
    assert at("cosine_tail", 0, step=1) == 2.0


def test_flash_as_the_paper_trained_it():
    config = OptimConfig(lr=2.7e-4, schedule=ScheduleConfig(warmup_steps=2000, decay_start=0.9))
    total, batch = 32 * 10**12, 75_497_472

    def lr(step):
        return learning_rate(config, step=step, tokens=(step - 1) * batch, total_tokens=total)

    assert lr(1) == pytest.approx(2.7e-4 / 2000)
    assert lr(2000) == lr(300_000) == 2.7e-4
    assert lr(total // batch) == pytest.approx(2.7e-5, rel=1e-4)


@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_learning_rate_never_rises_after_warmup_and_stays_in_bounds(kind):
    values = [at(kind, tokens) for tokens in range(0, TOTAL + 1, 10)]
    assert all(a >= b for a, b in pairwise(values))
    assert min(values) >= 0.2 - 1e-12
    assert max(values) <= 2.0


def test_tail_starts_at_a_fraction_or_at_tokens():
    assert decay_start(ScheduleConfig(decay_start=0.25), TOTAL) == 250
    assert decay_start(ScheduleConfig(decay_start=0.25, decay_start_tokens=700), TOTAL) == 700
    assert at("wsd", 850, decay_start_tokens=700) == pytest.approx(1.1)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "cosine_tail"])
def test_decay_has_started_from_its_token_on(kind):
    schedule = ScheduleConfig(kind=ScheduleKind(kind), decay_start=0.6)
    assert not decay_started(schedule, 599, TOTAL)
    assert decay_started(schedule, 600, TOTAL)


def test_constant_schedule_never_decays():
    assert not decay_started(ScheduleConfig(kind=ScheduleKind.constant), TOTAL, TOTAL)


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_tail_over_the_whole_run_or_none_of_it(start):
    assert at("wsd", 500, decay_start=start) == pytest.approx(1.1 if start == 0 else 2.0)


def test_tail_that_the_run_never_reaches_is_refused():
    schedule = ScheduleConfig(decay_start_tokens=2000)
    check_run_length(schedule, 3000)
    with pytest.raises(ValueError, match=r"decay_start_tokens=2000 must be below .* 2000"):
        check_run_length(schedule, 2000)
