"""Mixtures: shares of tokens by weight, epochs of each source, natural size without weights."""

from collections import Counter

import numpy as np
import pytest

from data.config import SourceConfig
from data.global_batch import Sample
from data.loader import build_loader
from data.prepare import build_tokenizer
from tests.data.pools import pools_of

pytestmark = pytest.mark.core


@pytest.fixture
def two_sources(small_config):
    small_config.sources = {
        "a": SourceConfig(packages=["asyncio", "json"], weight=0.8),
        "b": SourceConfig(packages=["logging", "http"], weight=0.2),
    }
    small_config.packing.pool_documents = 40
    small_config.validation.bytes = 4000
    return small_config


def pools(loader, count, seq_len=256):
    """The first pools of weighted sources."""
    cursors = loader.mixture.start
    for number in range(count):
        pool = loader.mixture.pool(0, number, cursors, seq_len)
        cursors = pool.after
        yield pool


def tokens_of(pool):
    out = Counter()
    for span in pool.spans:
        out[pool.name(span.document).source] += span.length
    return out


def test_tokens_come_in_the_proportion_of_the_weights(two_sources):
    loader = build_loader(two_sources, build_tokenizer(two_sources), 0, 1)
    total = Counter()
    for pool in pools(loader, 30):
        here = tokens_of(pool)
        total += here
        for tokens in (here, total):  # no piece is longer than a row: data/shares.py has the bound
            for name, weight in (("a", 0.8), ("b", 0.2)):
                off = abs(tokens[name] - weight * tokens.total())
                assert off <= (256 + weight * 2 * 256) / (1 if tokens is here else 2)
    assert loader.token_counts_V.sum() > 0


def test_each_weighted_source_runs_through_its_own_epochs(two_sources):
    loader = build_loader(two_sources, build_tokenizer(two_sources), 0, 1)
    for source in loader.mixture._sources:
        size = len(source._parts[0])
        numbered = [d for start in range(0, 3 * size, 5) for d in take(source, start, 5)]
        assert [number for number, _ in numbered][: 3 * size] == list(range(3 * size))
        draws = [drawn.index for _, drawn in numbered]
        for epoch in range(3):
            assert sorted(draws[epoch * size : (epoch + 1) * size]) == list(range(size))
        assert draws[:size] != draws[size : 2 * size]


def take(source, start, count):
    """Draws across the end of a pass."""
    out = []
    while len(out) < count:
        out += source.draw(start + len(out), count - len(out))
    return out


def test_without_weights_every_document_comes_once(two_sources):
    for source in two_sources.sources.values():
        source.weight = None
    loader = build_loader(two_sources, build_tokenizer(two_sources), 0, 1)
    (source,) = loader.mixture._sources
    drawn = []
    for pool in pools_of(loader.mixture):
        drawn += [(id(d.drawn.documents), d.drawn.index) for d in pool._documents]
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


@pytest.mark.parametrize(
    "wishes", [{}, {"min_tokens": 900}, {"long_tokens": 2000, "long_times": 3}]
)
def test_epochs_are_passes(make_loader, small_config, wishes):
    """After the rows of one pass every source says 1, and nothing of the next pass was read."""
    for key, value in wishes.items():
        setattr(small_config.sources["docs"], key, value)
    loader, batch = make_loader(), None
    assert loader.epochs({}) == 0
    while loader.position.epoch == 0:
        before, batch = batch, loader.plan(1, 256)
    told = loader.epochs((before or batch).read_tokens)
    assert told == pytest.approx(1.0, abs=256 / sum(n or 0 for n in loader.source_tokens.values()))
