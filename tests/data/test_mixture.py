"""Mixtures: shares of tokens by weight, epochs of each source, natural size without weights."""

from collections import Counter

import numpy as np
import pytest

from data.config import SourceConfig
from data.global_batch import Sample
from data.loader import build_loader
from data.mixture import quotas
from data.prepare import build_tokenizer

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("weights", "lengths", "documents", "expected"),
    [
        ([0.5, 0.5], [100, 100], 8, [4, 4]),
        ([0.5, 0.5], [100, 300], 8, [6, 2]),
        ([0.999, 0.001], [1, 1], 8, [7, 1]),
        ([0.4, 0.3, 0.3], [1, 1, 1], 3, [1, 1, 1]),
        ([0.9, 0.05, 0.05], [1, 1, 1], 4, [2, 1, 1]),
        ([0.98, 0.02], [10, 1], 100, [83, 17]),
    ],
)
def test_quotas_give_the_weights_share_of_tokens(weights, lengths, documents, expected):
    assert quotas(weights, lengths, documents) == expected


def test_more_weighted_sources_than_documents_of_a_pool_are_refused():
    with pytest.raises(ValueError, match=r"data\.packing\.pool_documents=1 must be at least .* 2"):
        quotas([0.5, 0.5], [1, 1], 1)


@pytest.fixture
def two_sources(small_config):
    small_config.sources = {
        "a": SourceConfig(packages=["asyncio", "json"], weight=0.8),
        "b": SourceConfig(packages=["logging", "http"], weight=0.2),
    }
    small_config.packing.pool_documents = 40
    small_config.validation.bytes = 4000
    return small_config


def owner_of(loader, pool):
    """Name of the source of every document of a pool."""
    names = {id(part): s.name for s in loader.mixture._sources for part in s._parts}
    return [names[id(drawn.documents)] for drawn in pool._drawn]


def test_tokens_come_in_the_proportion_of_the_weights(two_sources):
    loader = build_loader(two_sources, build_tokenizer(two_sources), 0, 1)
    tokens = Counter()
    for number in range(30):
        pool = loader.mixture.pool(0, number)
        for name, length in zip(owner_of(loader, pool), pool.lengths, strict=True):
            tokens[name] += int(length)
    # One document of 40, in a pool: quotas are whole numbers.
    assert tokens["a"] / tokens.total() == pytest.approx(0.8, abs=0.05)
    counts = loader.token_counts_V
    assert counts.sum() > 0


def test_each_weighted_source_runs_through_its_own_epochs(two_sources):
    loader = build_loader(two_sources, build_tokenizer(two_sources), 0, 1)
    for source in loader.mixture._sources:
        size = len(source._parts[0])
        draws = [drawn.index for drawn in source.draw(0, 3 * size)]
        for epoch in range(3):
            assert sorted(draws[epoch * size : (epoch + 1) * size]) == list(range(size))
        assert draws[:size] != draws[size : 2 * size]
        assert [d.index for d in source.draw(size - 2, 5)] == draws[size - 2 : size + 3]


def test_without_weights_every_document_comes_once(two_sources):
    for source in two_sources.sources.values():
        source.weight = None
    loader = build_loader(two_sources, build_tokenizer(two_sources), 0, 1)
    (source,) = loader.mixture._sources
    drawn = []
    number = 0
    while (pool := loader.mixture.pool(0, number)) is not None:
        drawn += [(id(d.documents), d.index) for d in pool._drawn]
        number += 1
    assert len(set(drawn)) == len(drawn) == sum(len(part) for part in source._parts)
    assert len(source._parts) == 2


def test_weighted_token_counts_follow_the_weights(two_sources):
    def counts(**weights):
        for name, weight in weights.items():
            two_sources.sources[name].weight = weight
        return build_loader(two_sources, build_tokenizer(two_sources), 0, 1).token_counts_V.numpy()

    even, skewed = counts(a=0.5, b=0.5), counts(a=0.9, b=0.1)
    only = [counts(a=1 - 1e-9, b=1e-9), counts(a=1e-9, b=1 - 1e-9)]
    mixed = 0.9 * only[0] + 0.1 * only[1]
    assert np.abs(skewed - mixed).max() <= 2
    assert np.abs(even - 0.5 * only[0] - 0.5 * only[1]).max() <= 2


@pytest.mark.parametrize("weighted", [False, True])
def test_samples_name_what_stands_in_a_row(two_sources, weighted):
    """By name alone the same tokens are found again, fill-in-the-middle and later passes too."""
    two_sources.fim.rate = 0.5
    if not weighted:
        for source in two_sources.sources.values():
            source.weight = None
    loader = build_loader(two_sources, build_tokenizer(two_sources), 0, 1)
    epochs = set()
    for _ in range(40):
        planned = loader.plan(8, 2048)
        batch = planned.batch(0, 8)
        for row in range(8):
            samples = planned.samples(row)
            epochs |= {sample.epoch for sample in samples}
            found = np.concatenate([loader.sample_tokens(sample) for sample in samples])
            assert batch.input_ids_BT[row, : len(found)].tolist() == found.tolist()
            assert (batch.document_ids_BT[row] >= 0).sum() == len(found)
    assert epochs >= {0, 1}
    with pytest.raises(ValueError, match=r"data\.sources\.b has \d+ training documents, no number"):
        loader.sample_tokens(Sample("b", 10_000, 0, 0, 1))
    with pytest.raises(ValueError, match=r"data\.sources has no c"):
        loader.sample_tokens(Sample("c", 0, 0, 0, 1))
