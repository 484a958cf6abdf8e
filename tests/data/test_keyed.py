"""Keyed randomness: permutations are bijections, draws are uniform, keys matter, bits are fixed."""

import numpy as np
import pytest

from data.keyed import mix, permute, uniform

pytestmark = pytest.mark.core


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_permute_is_a_bijection(count):
    image = permute(np.arange(count), count, mix(3, count))
    assert sorted(image.tolist()) == list(range(count))


def test_permute_looks_up_any_index_alone():
    whole = permute(np.arange(1001), 1001, 7)
    some = np.array([1000, 3, 3, 512])
    assert permute(some, 1001, 7).tolist() == whole[some].tolist()


def test_permute_spreads_every_place_over_the_range():
    count, keys = 64, 2000
    images = np.array([permute(np.array([5]), count, mix(1, key))[0] for key in range(keys)])
    seen = np.bincount(images, minlength=count)
    # 31 expected in each cell, standard deviation 5.6: five of them either way.
    assert seen.min() > 3
    assert seen.max() < 59


def test_uniform_covers_the_unit_interval():
    draws = uniform(mix(9), 100_000)
    assert 0 <= draws.min() < 1e-3
    assert 1 - 1e-3 < draws.max() < 1
    histogram = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert np.abs(histogram - 5000).max() < 5 * np.sqrt(5000)


def test_mix_depends_on_order_length_and_every_value():
    keys = [mix(), mix(0), mix(0, 0), mix(1, 2), mix(2, 1), mix(1, 2, 0), mix(-1)]
    assert len(set(keys)) == len(keys)


def test_bits_never_change():
    """Golden: a change here would change the sample order of every run."""
    assert mix(1, 2, 3) == 74078413316773926
    assert permute(np.arange(8), 8, 42).tolist() == [4, 6, 1, 3, 0, 2, 5, 7]
