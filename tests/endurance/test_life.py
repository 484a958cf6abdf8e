"""Lives are data: a seed repeats one, and it can be made simpler.

Oracle: the definitions.
"""

import json
from collections import Counter

import pytest

from tests.endurance import life

pytestmark = pytest.mark.core


def drawn(seed, ranks=1):
    return life.draw(seed, ranks)


def test_seed_repeats_a_life():
    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(8)
    assert drawn(7, 2) != drawn(7)


def test_life_survives_json():
    for seed in range(20):
        assert life.Life.from_json(json.loads(json.dumps(drawn(seed).as_json()))) == drawn(seed)


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_event_is_drawn_in_500_lives(ranks):
    counts = Counter()
    for seed in range(500):
        starts = drawn(seed, ranks).starts
        assert len(starts) >= 4
        assert [s.steps for s in starts] == sorted(s.steps for s in starts)
        counts.update(event.name for s in starts for event in (*s.before, s.during))
    assert set(counts) == {*life.BETWEEN, *life.DURING}
    assert min(counts.values()) > 70, counts


def test_simpler_lives_have_less_in_them():
    story = drawn(3)
    others = list(life.simpler(story))
    assert len(others) > 5
    assert all(other.seed == -1 and other != story for other in others)
    assert min(len(other.starts) for other in others) == len(story.starts) - 1
    simplest = life.Life(-1, "plain", (life.Start(background=False),))
    assert list(life.simpler(simplest)) == []
