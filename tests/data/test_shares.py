"""Weighted sources: the asked share of tokens over every stretch, whatever their documents' length.

The bound is that of data/shares.py. Oracle of the order: the marks of all pieces, sorted.
"""

import copy
import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest

from data.config import DataConfig, PackingConfig, SourceConfig, SourceKind, ValidationConfig
from data.loader import build_loader
from data.pool import Cursor, Drawn, Fim
from data.prepare import build_tokenizer
from data.shares import Turns
from data.stream import ListDocuments

pytestmark = pytest.mark.core


class Lengths:
    """A source of documents of given lengths, pass after pass; every third draw has none."""

    def __init__(self, name, lengths):
        self.name, self.names = name, (name,)
        self._documents = ListDocuments([np.zeros(n, np.int64) for n in lengths])
        self._count = len(lengths)

    def draw(self, start, count):
        numbers = [n for n in range(start, start + count + 3) if n % 3][:count]
        return [(n, Drawn(self._documents, n % self._count, n, (self.name, n, 0))) for n in numbers]


def turns(lengths, weights):
    return Turns([Lengths(str(i), some) for i, some in enumerate(lengths)], weights, Fim())


def some_sources(seed):
    pick = random.Random(seed)
    count = pick.randint(1, 5)
    weights = [pick.choice([1, 10, 1000]) * pick.random() for _ in range(count)]
    longest = [pick.choice([3, 40, 3000]) for _ in range(count)]
    lengths = [[pick.randint(1, most) for _ in range(pick.randint(2, 30))] for most in longest]
    return lengths, [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("seed", range(20))
def test_every_source_stays_within_the_bound(seed):
    lengths, weights = some_sources(seed)
    pick, given = turns(lengths, weights), Counter()
    cursors = tuple(Cursor() for _ in weights)
    for number in range(60):
        seq_len = 32 if number < 40 else 100
        longest = [min(seq_len, max(some)) for some in lengths]
        documents, spans, cursors, _ = pick.take(cursors, 7, seq_len)
        assert 1 <= len(documents) <= 7
        for document, span in zip(documents, spans, strict=True):
            given[int(document.drawn.name[0])] += span.length
        for source, weight in enumerate(weights):
            bound = (longest[source] + weight * sum(longest)) / 2
            assert abs(given[source] - weight * given.total()) <= bound + 1e-6
        assert [cursor.tokens for cursor in cursors] == [given[s] for s in range(len(weights))]


@pytest.mark.parametrize("seed", range(10))
def test_pieces_come_in_the_order_of_their_marks_whatever_the_pools(seed):
    lengths, weights = some_sources(seed)
    pieces = []
    for source, weight in enumerate(weights):
        tokens = 0
        for number, drawn in Lengths(str(source), lengths[source]).draw(0, 400):
            length = lengths[source][drawn.index]
            for start in range(0, length, 32):
                piece = min(32, length - start)
                tokens += piece
                pieces.append(((tokens - piece / 2) / weight, source, number, start, piece))
    ends = [max(p[0] for p in pieces if p[1] == s) for s in range(len(weights))]
    expected = [p[1:] for p in sorted(pieces) if p[0] < min(ends)]
    for num_documents in (1, 5, 64):
        pick, cursors, found = turns(lengths, weights), tuple(Cursor() for _ in weights), []
        while len(found) < len(expected):
            documents, spans, cursors, _ = pick.take(cursors, num_documents, 32)
            here = []
            for document, span in zip(documents, spans, strict=True):
                source, number, _ = document.drawn.name
                here += [
                    (int(source), number, start, min(32, span.stop - start))
                    for start in range(span.start, span.stop, 32)
                ]
            found += here
        assert set(expected) <= set(found)
        assert len(set(found)) == len(found)


def test_a_pool_does_not_depend_on_what_was_taken_before():
    lengths, weights = some_sources(3)
    pick, cursors = turns(lengths, weights), tuple(Cursor() for _ in weights)
    for number in range(30):
        seq_len = 20 + number % 3 * 30
        again = turns(lengths, weights).take(cursors, 5, seq_len)
        taken = pick.take(cursors, 5, seq_len)
        assert [d.drawn.name for d in taken.documents] == [d.drawn.name for d in again.documents]
        assert (taken.spans, taken.cursors) == (again.spans, again.cursors)
        cursors = taken.cursors


def write(folder, book_bytes):
    """20 books, and many texts of 30 bytes."""
    with (folder / "books.jsonl").open("w") as file:
        for book in range(20):
            text = " ".join(f"{book}:{n * n % 1009}" for n in range(book_bytes))[:book_bytes]
            file.write(json.dumps({"text": text}) + "\n")
    with (folder / "tweets.jsonl").open("w") as file:
        for tweet in range(5000):
            file.write(json.dumps({"text": f"tweet {tweet:06d} " + "x" * 17}) + "\n")
    return folder


@pytest.fixture(scope="module")
def books_and_tweets(tmp_path_factory):
    return write(tmp_path_factory.mktemp("long"), 100_000)


@pytest.fixture(scope="module")
def leaflets_and_tweets(tmp_path_factory):
    return write(tmp_path_factory.mktemp("short"), 4_000)


def config(folder, streaming=False, **weights):
    sources = {
        name: SourceConfig(
            SourceKind.jsonl, str(folder / f"{name}.jsonl"), streaming=streaming, weight=weight
        )
        for name, weight in weights.items()
    }
    return DataConfig(
        tokenizer="byte", cache_dir=str(folder / "cache"), sources=sources,
        packing=PackingConfig(pool_documents=64), validation=ValidationConfig(bytes=0),
    )  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
def test_long_documents_have_their_share_of_short_runs_too(books_and_tweets, streaming):
    cfg = config(books_and_tweets, streaming, books=0.05, tweets=0.95)
    loader = build_loader(cfg, build_tokenizer(cfg), 0, 1)
    T, read = 256, Counter()
    pool_tokens = 64 * 31 + T  # rows of a pool are shuffled
    for _ in range(60):
        planned = loader.plan(8, T)
        for row in range(8):
            for sample in planned.samples(row):
                read[sample.source] += sample.stop - sample.start
        assert read == Counter(planned.read_tokens)
        shares = planned.source_shares()
        assert shares["books"] == pytest.approx(read["books"] / read.total())
        bound = (T + 0.05 * (T + 31)) / 2 + pool_tokens * 0.95
        assert abs(read["books"] - 0.05 * read.total()) <= bound
    assert shares["books"] == pytest.approx(0.05, abs=0.004)


# Row lengths of the steps, 5 rows each.
PLANS = [[64] * 40, [64] * 7 + [300] * 9 + [96] * 12, [96, 97, 40, 640, 200] * 4]


@pytest.mark.parametrize("lengths", PLANS)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("fim", [0.0, 0.5])
def test_resume_is_exact_and_independent_of_rows_per_step(
    leaflets_and_tweets, lengths, streaming, fim
):
    cfg = config(leaflets_and_tweets, streaming, books=0.3, tweets=0.7)
    cfg.fim.rate, cfg.packing.pool_documents, cfg.packing.pool_rows = fim, 24, 4

    def make():
        return build_loader(cfg, build_tokenizer(cfg), 0, 2)

    loader, states, batches = make(), [], []
    for seq_len in lengths:
        states.append(json.loads(json.dumps(loader.state_dict())))
        batches.append(loader.plan(5, seq_len))
    for step in range(0, len(lengths), 9):
        resumed = make()
        resumed.load_state_dict(copy.deepcopy(states[step]))
        assert resumed.state_dict() == states[step]
        for seq_len, planned in zip(lengths[step:], batches[step:], strict=True):
            again = resumed.plan(5, seq_len)
            assert again.counts == planned.counts
            assert again.read_tokens == planned.read_tokens
            assert again.batch(0, 5).labels_BTK.equal(planned.batch(0, 5).labels_BTK)
    one_by_one = make()
    for seq_len, planned in zip(lengths, batches, strict=True):
        rows = [one_by_one.plan(1, seq_len).samples(0) for _ in range(5)]
        assert rows == [planned.samples(row) for row in range(5)]


def test_every_token_of_a_pass_stands_in_one_row(leaflets_and_tweets):
    cfg = config(leaflets_and_tweets, books=0.9, tweets=0.1)
    cfg.packing.pool_rows = 0  # so that a pass ends soon
    loader = build_loader(cfg, build_tokenizer(cfg), 0, 1)
    spans = {}
    for seq_len in itertools.chain([100] * 30, [5000] * 2, [300] * 60):
        planned = loader.plan(8, seq_len)
        for row in range(8):
            for sample in planned.samples(row):
                spans.setdefault(sample[:3], []).append(sample[3:])
        if loader.position.cursors[0].draw > 25:
            break
    first_pass = {
        name: parts for name, parts in spans.items() if name[0] == "books" and not name[2]
    }
    assert len(first_pass) == 20
    for parts in first_pass.values():
        ends = [0, *(stop for _, stop in sorted(parts))]
        assert [start for start, _ in sorted(parts)] == ends[:-1]
        assert ends[-1] == 4_001


def test_a_mixture_of_an_older_version_is_not_continued(leaflets_and_tweets):
    cfg = config(leaflets_and_tweets, books=0.5, tweets=0.5)
    loader = build_loader(cfg, build_tokenizer(cfg), 0, 1)
    loader.plan(4, 64)
    state = loader.state_dict()
    del state["cursors"], state["read_tokens"]
    with pytest.raises(ValueError, match=r"data\.sources: .* mixed weighted sources by documents"):
        loader.load_state_dict(state)
