"""Validation rows: always the same, never trained on, and bytes that make bits per byte exact."""

import numpy as np
import pytest
import torch

from data.batch import IGNORE
from data.loader import VALIDATION_ROWS, build_loader
from data.prepare import Corpus, build_tokenizer, cached_stores
from data.tokenizer import train_bpe
from data.validation import ValidationSet
from tests.data.texts import TEXTS

pytestmark = pytest.mark.core


def test_validation_is_the_same_at_every_call_and_position(make_loader):
    loader = make_loader(seed=3)
    before = [b.batch(0, len(b.rows)) for b in loader.validation(200)]
    loader.plan(17, 90)
    for batch, again in zip(before, loader.validation(200), strict=True):
        assert torch.equal(batch.labels_BTK, again.batch(0, len(again.rows)).labels_BTK)
    other_seed = make_loader(seed=4).validation(200)
    assert torch.equal(other_seed[0].batch(0, 5).input_ids_BT, before[0].input_ids_BT[:5])


@pytest.mark.parametrize("seq_len", [7, 64, 100_000])
def test_all_bytes_but_the_first_tokens_are_scored_once(make_loader, small_config, seq_len):
    """With one byte a token the scored text can be read off the labels."""
    loader = make_loader()
    batches = loader.validation(seq_len)
    scored = loader.validation_bytes(seq_len)
    assert sum(b.target_bytes for b in batches) == len(scored)
    labels = [b.batch(0, len(b.rows)).labels_BTK[..., 0].flatten() for b in batches]
    byte_labels = [x for x in torch.cat(labels).tolist() if x not in (IGNORE, 256)]
    assert sorted(byte_labels) == sorted(scored)
    store = cached_stores(small_config, loader.tokenizer)["docs"]
    assert scored == b"".join(text[1:] for text in store.validation_text)
    assert len(scored) >= 12_000 - len(store.validation)


def test_a_part_is_a_sample_of_rows_with_its_own_bytes(make_loader):
    loader = make_loader()
    some = loader.validation(50, 1001)
    assert sum(len(b.rows) for b in some) == 21
    whole = loader.validation(50)
    assert all(len(b.rows) <= VALIDATION_ROWS for b in whole)
    assert some[0].rows == whole[0].rows[:21]
    assert sum(b.target_bytes for b in some) == len(loader.validation_bytes(50, 1001))
    documents = {span.document for row in some[0].rows for span in row.spans}
    assert len(documents) > 1


@pytest.mark.parametrize("seq_len", [3, 40, 1000])
def test_bytes_of_a_bpe_are_those_of_the_decoded_targets(seq_len):
    tokenizer = train_bpe(TEXTS, 320)
    ids, ends = zip(*(tokenizer.encode_with_byte_ends(text) for text in TEXTS), strict=True)
    ids = [np.append(x, tokenizer.eos_id) for x in ids]
    texts = [text.encode() for text in TEXTS]
    ends = [np.append(e, len(t)) for e, t in zip(ends, texts, strict=True)]
    held = ValidationSet(ids, ends, texts, seed=0)
    rows = held.rows(seq_len, 0)
    expected = b"".join(t[int(e[0]) :] for t, e in zip(texts, ends, strict=True))
    assert held.text(rows) == expected
    assert held.target_bytes(rows) == len(expected)
    assert held.num_bytes == sum(map(len, texts))


def test_no_validation_document_is_trained_on(small_config):
    split = Corpus(small_config).split["docs"]
    assert not set(split.train.tolist()) & set(split.validation.tolist())
    assert split.bytes_N[split.validation].sum() >= 12_000


def test_without_validation_there_are_no_batches(small_config):
    small_config.validation.bytes = 0
    loader = build_loader(small_config, build_tokenizer(small_config), 0, 1)
    assert loader.validation(64) == []
    assert loader.validation_bytes(64) == b""


def test_a_whole_split_is_the_same_text_for_every_tokenizer_and_length():
    def split(tokenizer):
        ids, ends = zip(*(tokenizer.encode_with_byte_ends(text) for text in TEXTS), strict=True)
        texts = [text.encode() for text in TEXTS]
        ids = [np.append(x, tokenizer.eos_id) for x in ids]
        ends = [np.append(e, len(t)) for e, t in zip(ends, texts, strict=True)]
        return ValidationSet(ids, ends, texts, seed=0)

    splits = [split(train_bpe(TEXTS, size)) for size in (280, 400)]
    whole = {s.documents_read(s.rows(n, 0)) for s in splits for n in (7, 40, 100_000)}
    assert whole == {b"".join(text.encode() for text in TEXTS)}
    assert len({s.documents_read(s.rows(40, 40)) for s in splits}) == 2, "cut after other bytes"
