"""The loader: order independent of the layout, exact resume, labels and counts against oracles."""

import copy
import hashlib
import json
from collections import Counter

import numpy as np
import pytest
import torch

from data.batch import IGNORE
from data.loader import Loader
from data.position import Position

pytestmark = pytest.mark.core


def rows_as_ids(loader: Loader, num_rows: int, seq_len: int, per_step: int) -> torch.Tensor:
    """The next rows, planned some at a time; [rows, T, 2] of ids and document ids."""
    out = []
    for _ in range(num_rows // per_step):
        batch = loader.plan(per_step, seq_len).batch(0, per_step)
        out.append(torch.stack([batch.input_ids_BT, batch.document_ids_BT], dim=-1))
    return torch.cat(out)


@pytest.mark.parametrize("per_step", [1, 2, 3, 8, 24])
@pytest.mark.parametrize("seq_len", [96, 700])
def test_order_does_not_depend_on_rows_per_step(make_loader, per_step, seq_len):
    whole = rows_as_ids(make_loader(), 48, seq_len, 48)
    assert torch.equal(rows_as_ids(make_loader(), 48, seq_len, per_step), whole)


def test_slices_of_a_batch_are_the_batch(make_loader):
    planned = make_loader().plan(8, 128)
    whole = planned.batch(0, 8)
    for size in (1, 2, 4):
        parts = [planned.batch(i, i + size) for i in range(0, 8, size)]
        assert torch.equal(torch.cat([p.input_ids_BT for p in parts]), whole.input_ids_BT)
        assert torch.equal(torch.cat([p.labels_BTK for p in parts]), whole.labels_BTK)


def test_seed_and_epoch_change_the_order(make_loader):
    first = rows_as_ids(make_loader(), 16, 256, 16)
    assert not torch.equal(rows_as_ids(make_loader(seed=1), 16, 256, 16), first)
    loader = make_loader()
    loader.position = Position(epoch=1, cursors=loader.mixture.start)
    assert not torch.equal(rows_as_ids(loader, 16, 256, 16), first)


# Row lengths of the steps, 5 rows each: constant, changing in the middle of pools, back and forth.
PLANS = [[128] * 30, [64] * 5 + [512] * 9 + [96] * 5, [96, 97, 96, 640, 200] * 2]


@pytest.mark.parametrize("lengths", PLANS)
@pytest.mark.parametrize("fim", [0.0, 0.5])
def test_resume_is_exact_at_every_step(make_loader, lengths, fim):
    loader = make_loader(fim=fim)
    states, batches = [], []
    for seq_len in lengths:
        states.append(json.loads(json.dumps(loader.state_dict())))
        batches.append(loader.plan(5, seq_len))
    for step in range(0, len(lengths), 6):
        resumed = make_loader(fim=fim)
        resumed.load_state_dict(copy.deepcopy(states[step]))
        assert resumed.state_dict() == states[step]
        for seq_len, planned in zip(lengths[step:], batches[step:], strict=True):
            again = resumed.plan(5, seq_len)
            assert again.counts == planned.counts
            assert torch.equal(again.batch(0, 5).labels_BTK, planned.batch(0, 5).labels_BTK)


def epoch_rows(loader: Loader, lengths: list[int]):
    """Rows of the first epoch, one a step; the row length changes as listed, the last stays."""
    rows, step = [], 0
    while True:
        batch = loader.plan(1, lengths[min(step, len(lengths) - 1)])
        step += 1
        if loader.position.epoch > 0:
            return rows
        rows += batch.rows


@pytest.mark.parametrize("lengths", [[333], [64] * 40 + [2000], [100, 1000] * 8])
@pytest.mark.parametrize("fim", [0.0, 0.5])
def test_every_token_stands_in_one_row_of_an_epoch(make_loader, lengths, fim):
    loader = make_loader(fim=fim)
    pools, seen = {}, Counter()
    for documents, spans in epoch_rows(loader, lengths):
        pools[id(documents)] = documents
        for document, start, stop in spans:
            seen.update((id(documents), document, t) for t in range(start, stop))
    assert set(seen.values()) == {1}
    assert len(seen) == sum(int(pool.lengths.sum()) for pool in pools.values())
    if fim == 0.0:  # the documents are those of the store, each once
        train = stored(loader)
        found = Counter(
            digest(pool.tokens(d, 0, int(n)))
            for pool in pools.values()
            for d, n in enumerate(pool.lengths)
        )
        assert found == Counter(digest(document) for document in train)


def stored(loader: Loader) -> list[np.ndarray]:
    (source,) = loader.mixture._sources
    documents = source._parts[0]
    lengths = documents.lengths(np.arange(len(documents)))
    return [documents.tokens(i, 0, int(n)) for i, n in enumerate(lengths)]


def digest(tokens: np.ndarray) -> str:
    return hashlib.sha256(tokens.tobytes()).hexdigest()


@pytest.mark.parametrize("depths", [1, 2, 4])
@pytest.mark.parametrize("seq_len", [5, 300])
@pytest.mark.parametrize("fim", [0.0, 0.6])
def test_labels_match_a_token_by_token_oracle(make_loader, depths, seq_len, fim):
    planned = make_loader(depths=depths, fim=fim).plan(12, seq_len)
    batch = planned.batch(0, 12)
    for b, (documents, spans) in enumerate(planned.rows):
        where = [(d, t) for d, start, stop in spans for t in range(start, stop)]
        for t in range(seq_len):
            if t >= len(where):
                assert batch.document_ids_BT[b, t] == -1
                assert batch.input_ids_BT[b, t] == 0
                assert batch.labels_BTK[b, t].tolist() == [IGNORE] * depths
                continue
            document, place = where[t]
            text = documents.tokens(document, 0, int(documents.lengths[document]))
            assert batch.input_ids_BT[b, t] == text[place]
            ahead = text[place + 1 : place + 1 + depths].tolist()
            assert batch.labels_BTK[b, t].tolist() == ahead + [IGNORE] * (depths - len(ahead))


@pytest.mark.parametrize("seq_len", [5, 100, 5000])
def test_counts_are_those_of_the_batch(make_loader, seq_len):
    planned = make_loader(depths=3).plan(10, seq_len)
    batch = planned.batch(0, 10)
    labels_NK = batch.labels_BTK.flatten(0, 1)
    assert planned.counts.tokens == int((batch.document_ids_BT >= 0).sum())
    assert planned.counts.targets_K == tuple((labels_NK != IGNORE).sum(0).tolist())
    pieces = [len(set(row.tolist()) - {-1}) for row in batch.document_ids_BT]
    assert planned.counts.documents == sum(pieces)


def test_documents_are_contiguous_and_end_in_eos(make_loader):
    loader = make_loader()
    planned = loader.plan(40, 600)
    batch = planned.batch(0, 40)
    for b, (documents, spans) in enumerate(planned.rows):
        ids = batch.document_ids_BT[b]
        runs = torch.unique_consecutive(ids)
        assert len(set(runs.tolist())) == len(runs)
        assert runs.tolist() in (list(range(len(spans))), [*range(len(spans)), -1])
        for number, span in enumerate(spans):
            tokens = batch.input_ids_BT[b][ids == number]
            ends = span.stop == documents.lengths[span.document]
            assert (tokens == loader.tokenizer.eos_id).sum() == int(ends)
            assert (tokens[-1] == loader.tokenizer.eos_id) == ends


def test_token_counts_are_those_of_the_training_documents(make_loader):
    loader = make_loader()
    counts = np.bincount(np.concatenate(stored(loader)), minlength=260)
    assert loader.token_counts_V.tolist() == counts.tolist()
    assert loader.token_counts(300).tolist() == counts.tolist() + [0] * 40
    with pytest.raises(ValueError, match=r"model\.vocab_size=256 is smaller than the 260"):
        loader.token_counts(256)


def test_a_batch_without_rows_is_refused(make_loader):
    with pytest.raises(ValueError, match="0 rows of 64"):
        make_loader().plan(0, 64)
    with pytest.raises(ValueError, match="rows 3 to 9 of a batch of 4"):
        make_loader().plan(4, 64).batch(3, 9)
