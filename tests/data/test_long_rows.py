"""Long rows: pools hold rows' worth of tokens, long documents are cut as asked, some come oftener.

The padding bounds are argued from the pool: the rows of a pool are full but for the last and the
gaps that best fit leaves; 64 rows of tokens need 65 rows, so 1/65 = 1.5 % where short documents
fill the gaps. Lengths come from seeds; nothing is trained.
"""

import json
import math
import threading
from collections import Counter

import numpy as np
import pytest

from data.config import (
    DataConfig,
    LongDocuments,
    PackingConfig,
    SourceConfig,
    SourceKind,
    ValidationConfig,
)
from data.errors import ConfigError
from data.global_batch import DocumentName
from data.loader import Loader, build_loader
from data.mixture import Mixture, StoreSource
from data.packing import Cut, Span, keep
from data.pool import Cursor, Fim
from data.position import Position
from data.prepare import build_tokenizer
from data.validation import ValidationSet

pytestmark = pytest.mark.core


class Lengths:
    """Documents of given lengths, without tokens."""

    def __init__(self, length_N):
        self._length_N = np.asarray(length_N, dtype=np.int64)

    def __len__(self):
        return len(self._length_N)

    def lengths(self, index_N):
        return self._length_N[index_N]

    def tokens(self, index, start, stop):
        return np.full(max(0, min(stop, int(self._length_N[index])) - start), index)


def loader_of(length_N, packing=PackingConfig(), source=SourceConfig()):  # noqa: B008
    store = StoreSource("all", {"t": Lengths(length_N)}, 0, {"t": source})
    mixture = Mixture([store], None, packing, Fim(), 0)
    held = ValidationSet([], [], [], 0)
    return Loader(mixture, held, None, {}, 1, None, (), packing.long_documents)


def ordinary(seed, count, median, sigma):
    """Log-normal, as the documents of the web and of code are."""
    drawn = np.random.default_rng(seed).lognormal(math.log(median), sigma, count)
    return np.clip(drawn, 1, 3_000_000).astype(np.int64)


@pytest.mark.parametrize(("median", "sigma"), [(600, 1.2), (900, 1.5), (1500, 2.0)])
@pytest.mark.parametrize(("seq_len", "bound"), [(1 << 16, 0.02), (1 << 20, 0.05)])
def test_padding_of_long_rows_stays_below_the_bound(median, sigma, seq_len, bound):
    mean, rows = median * math.exp(sigma**2 / 2), 64
    length_N = ordinary(seq_len + median, int(80 * seq_len / mean), median, sigma)
    pool = loader_of(length_N)._pools.at(Position(seq_len=seq_len, cursors=(Cursor(),)))
    assert len(pool.rows) >= rows
    padding = 1 - pool.pool.lengths.sum() / (len(pool.rows) * seq_len)
    assert padding < bound
    if median < 1000:  # 256 documents make few such rows
        few = loader_of(length_N, PackingConfig(pool_rows=0)).plan(16, seq_len)
        assert padding < 1 - few.counts.tokens / (16 * seq_len)


def test_pools_of_enough_documents_are_what_they_were():
    """Where the documents of a pool fill its rows anyway, both rules make the same rows."""
    length_N = ordinary(3, 2000, 600, 1.2)
    old, new = loader_of(length_N, PackingConfig(pool_rows=0)), loader_of(length_N)
    for _ in range(60):
        assert [row.spans for row in old.plan(16, 512).rows] == [
            row.spans for row in new.plan(16, 512).rows
        ]


def test_a_state_of_older_code_goes_on_with_its_pools():
    length_N = ordinary(5, 2000, 600, 1.2)
    packing = PackingConfig(pool_documents=40, pool_rows=0)
    loader, resumed = loader_of(length_N, packing), loader_of(length_N, packing)
    for _ in range(15):
        loader.plan(16, 512)
    assert loader.position.pool > 1
    state = loader.state_dict()
    del state["cursors"], state["cut"]
    resumed.load_state_dict(state)
    for _ in range(20):
        assert resumed.plan(16, 512).rows[3].spans == loader.plan(16, 512).rows[3].spans


@pytest.mark.parametrize("long", LongDocuments)
def test_long_documents_are_cut_as_asked_and_counted(long):
    length_N = ordinary(1, 300, 100, 1.0)
    loader = loader_of(length_N, PackingConfig(pool_documents=20, long_documents=long))
    seen = Counter()
    while loader.position.epoch == 0:
        for row in (planned := loader.plan(1, 128)).rows:
            if loader.position.epoch == 0:
                for span in row.spans:
                    seen[row.documents.name(span.document).document] += span.length
                cut = planned.cut
    over = int((length_N > 128).sum())
    kept = {"split": length_N, "truncate": np.minimum(length_N, 128),
            "skip": np.where(length_N > 128, 0, length_N)}[long.value]  # fmt: skip
    assert over > 50
    assert cut == Cut(over, int((length_N - kept).sum()))
    assert dict(seen) == {i: n for i, n in enumerate(kept.tolist()) if n}


def test_a_rest_longer_than_shorter_rows_is_cut_too():
    spans = [Span(0, 100, 400), Span(1, 0, 50)]
    assert keep(spans, 128, LongDocuments.truncate) == (
        [Span(0, 100, 228), Span(1, 0, 50)], Cut(1, 172))  # fmt: skip
    assert keep(spans, 128, LongDocuments.skip) == ([Span(1, 0, 50)], Cut(1, 300))
    assert keep(spans, 128, LongDocuments.split) == (spans, Cut(1, 0))


@pytest.mark.parametrize("long", LongDocuments)
@pytest.mark.parametrize("edges", [(3,), (3, 2)])
def test_longer_rows_take_what_is_unread_whole(long, edges):
    """Of a pool that an edge divides, documents not yet read are cut for the new length alone."""
    length_N = np.array([500, 400, 300, 260, 200, 130, 90, 60, 400, 350] * 3)
    loader, seen = loader_of(length_N, PackingConfig(pool_documents=30, long_documents=long)), {}
    lengths = [128, 256, 512]
    for rows, seq_len in zip((*edges, 1000), lengths, strict=False):
        for _ in range(rows):
            planned = loader.plan(1, seq_len)
            for span in planned.rows[0].spans:
                number = planned.rows[0].documents.name(span.document).document
                seen.setdefault(number, []).append((span.start, span.stop, seq_len))
            cut = planned.cut
            if loader.position.pool:
                break  # the one pool of this pass is read
    left = dict(enumerate(length_N.tolist()))
    over = 0
    for number, pieces in seen.items():
        length, seq_len = length_N[number], pieces[0][2]
        if long is not LongDocuments.split:
            assert pieces == [(0, min(length, seq_len), seq_len)]  # once, from its beginning
            over += length > seq_len
        left[number] -= sum(stop - start for start, stop, _ in pieces)
    last = lengths[len(edges)]
    if long is LongDocuments.split:
        assert set(left.values()) == {0}
        return
    unseen = set(left) - set(seen)
    assert all(length_N[n] > last for n in unseen)  # only what does not fit the last rows either
    assert not unseen or long is LongDocuments.skip
    assert cut == Cut(over + len(unseen), sum(left.values()))


def test_what_is_left_out_is_told_once(caplog):
    loader = loader_of([500, 400, 90], PackingConfig(long_documents=LongDocuments.truncate))
    for _ in range(5):
        loader.plan(1, 128)
    told = [r.message for r in caplog.records if "long_documents=truncate" in r.message]
    assert len(told) == 1
    assert "2 documents longer than a row of 128 tokens lose 644 tokens" in told[0]


def test_nothing_to_train_on_is_an_error():
    loader = loader_of([500, 400], PackingConfig(long_documents=LongDocuments.skip))
    with pytest.raises(ConfigError, match=r"=skip: a whole pass .* no row of 128"):
        loader.plan(1, 128)
    with pytest.raises(ConfigError, match=r"t\.min_tokens=501: .* the longest has 500 tokens"):
        loader_of([500, 400], source=SourceConfig(min_tokens=501))


def test_long_documents_come_as_often_as_asked():
    length_N = np.arange(1, 101)
    asked = SourceConfig(min_tokens=21, long_tokens=81, long_times=3)
    loader, found = loader_of(length_N, source=asked), Counter()
    source = loader.mixture._sources[0]
    for drawn in source.draw_epoch(0, 0, 1000):
        found[int(length_N[drawn.index])] += 1
    assert found == {n: 3 if n >= 81 else 1 for n in range(21, 101)}
    assert source.find(DocumentName("t", 90, 0)).index == 90
    first, second = ([d.index for d in source.draw_epoch(epoch, 0, 1000)] for epoch in (0, 1))
    assert first != second


# ---- weighted sources, streams -------------------------------------------------------------------
@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long_rows")
    for name, lengths in (("books", [3000, 40, 900, 5000, 70] * 8), ("notes", [30] * 900)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number, length in enumerate(lengths):
                text = " ".join(f"{number}{n * n % 97}" for n in range(length))[:length]
                file.write(json.dumps({"text": text}) + "\n")
    return folder


def config(files, long, streaming, weighted):
    sources = {
        name: SourceConfig(
            SourceKind.jsonl, str(files / f"{name}.jsonl"), streaming=streaming,
            weight=weight if weighted else None, min_tokens=least,
        )
        for name, weight, least in (("books", 0.6, 50), ("notes", 0.4, 0))
        if weighted or name == "books"
    }  # fmt: skip
    return DataConfig(
        tokenizer="byte", cache_dir=str(files / "cache"), sources=sources,
        packing=PackingConfig(pool_documents=5, pool_rows=8, long_documents=long),
        validation=ValidationConfig(bytes=0),
    )  # fmt: skip


@pytest.mark.parametrize("long", LongDocuments)
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_resume_is_exact_with_every_rule(files, long, streaming, weighted):
    cfg = config(files, long, streaming, weighted)
    cfg.validate()

    def make():
        return build_loader(cfg, build_tokenizer(cfg), 0, 2)

    lengths = [128] * 6 + [1024] * 6 + [256] * 8
    loader, states, planned = make(), [], []
    for seq_len in lengths:
        states.append(json.loads(json.dumps(loader.state_dict())))
        planned.append(loader.plan(3, seq_len))
    drawn = {s.document for p in planned for row in range(3) for s in p.samples(row)
             if s.source == "books"}  # fmt: skip
    assert drawn
    assert not {n for n in drawn if n % 5 == 1}  # 40 letters: below min_tokens
    assert (planned[-1].cut.tokens > 0) == (long is not LongDocuments.split)
    for step in range(1, len(lengths), 4):
        resumed = make()
        resumed.load_state_dict(states[step])
        assert resumed.state_dict() == states[step]
        for seq_len, before in zip(lengths[step:], planned[step:], strict=True):
            again = resumed.plan(3, seq_len)
            assert (again.counts, again.cut) == (before.counts, before.cut)
            assert again.batch(0, 3).labels_BTK.equal(before.batch(0, 3).labels_BTK)


def test_a_stream_without_long_documents_is_an_error(files):
    cfg = config(files, LongDocuments.split, streaming=True, weighted=True)
    cfg.sources["notes"].min_tokens = 500
    loader = build_loader(cfg, build_tokenizer(cfg), 0, 1)
    with pytest.raises(ConfigError, match=r"notes\.min_tokens=500: no document of the stream"):
        loader.plan(1, 128)


# ---- the thread ----------------------------------------------------------------------------------
class Watched(Lengths):
    """Says in which threads its lengths were asked for."""

    threads: list = []  # noqa: RUF012

    def lengths(self, index_N):
        self.threads.append(threading.current_thread().name)
        return super().lengths(index_N)


def test_only_the_first_pool_is_drawn_by_the_training_thread():
    store = StoreSource("all", {"t": Watched(ordinary(1, 2000, 600, 1.2))}, 0)
    mixture = Mixture([store], None, PackingConfig(), Fim(), 0)
    loader = Loader(mixture, ValidationSet([], [], [], 0), None, {}, 1, None)
    while loader.position.pool < 5:
        loader.plan(8, 512)
    here = threading.current_thread().name
    asked = Watched.threads
    assert asked.count(here) == 1
    assert len(asked) >= 6
    assert all(name.startswith("pools") for name in asked[1:])


def test_a_fault_of_the_thread_reaches_the_step_that_needs_the_pool():
    class Broken(Lengths):
        def lengths(self, index_N):
            if len(index_N) and 7 in index_N:
                raise ConfigError("data.sources.t: document 7 is damaged")
            return super().lengths(index_N)

    store = StoreSource("all", {"t": Broken([100] * 40)}, 0)
    mixture = Mixture([store], None, PackingConfig(5, 1), Fim(), 0)
    loader = Loader(mixture, ValidationSet([], [], [], 0), None, {}, 1, None)
    with pytest.raises(ConfigError, match="document 7 is damaged"):
        loader.plan(41, 100)
