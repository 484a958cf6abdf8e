"""Packing: nothing lost, nothing twice, rows not overfull, padding near a lower bound."""

import random
from itertools import pairwise

import pytest

from data.packing import Span, pack, unread, whole_documents

pytestmark = pytest.mark.core


def some_lengths(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.choice([1, 2, rng.randint(1, 40), rng.randint(1, 400)]) for _ in range(60)]


def covered(rows) -> list[tuple[int, int]]:
    return sorted((s.document, t) for row in rows for s in row for t in range(s.start, s.stop))


def all_tokens(lengths) -> list[tuple[int, int]]:
    return [(d, t) for d, length in enumerate(lengths) for t in range(length)]


@pytest.mark.parametrize("seq_len", [1, 7, 32, 100, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_pack_holds_every_token_once_in_rows_of_the_length(seed, seq_len):
    lengths = some_lengths(seed)
    rows = pack(whole_documents(lengths), seq_len)
    assert covered(rows) == all_tokens(lengths)
    assert all(0 < sum(span.length for span in row) <= seq_len for row in rows)


@pytest.mark.parametrize("seq_len", [32, 100])
def test_pack_wastes_little(seq_len):
    """Best fit decreasing needs at most 11/9 of the best number of rows, plus one."""
    lengths = some_lengths(1)
    rows = pack(whole_documents(lengths), seq_len)
    assert len(rows) <= -(-sum(lengths) // seq_len) * 11 / 9 + 1


def test_pack_takes_the_tightest_row():
    rows = pack(whole_documents([6, 5, 4, 5]), 10)
    assert sorted(sorted(s.document for s in row) for row in rows) == [[0, 2], [1, 3]]


def test_pack_cuts_only_documents_that_no_row_holds():
    rows = pack(whole_documents([25, 3]), 10)
    assert sorted(rows) == [
        (Span(0, 0, 10),),
        (Span(0, 10, 20),),
        (Span(0, 20, 25), Span(1, 0, 3)),
    ]


@pytest.mark.parametrize("taken", [0, 3, 11])
def test_unread_is_what_the_taken_rows_leave(taken):
    lengths = some_lengths(2)
    rows = pack(whole_documents(lengths), 64)
    spans = unread(rows[taken:])
    assert covered([tuple(spans)]) == covered(rows[taken:])
    follows = pairwise(spans)
    assert not any(a.document == b.document and a.stop == b.start for a, b in follows)


def test_unread_of_all_rows_joins_whole_documents():
    lengths = some_lengths(2)
    assert unread(pack(whole_documents(lengths), 64)) == whole_documents(lengths)
