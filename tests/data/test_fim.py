"""Fill-in-the-middle: reversible, at the asked rate, any slice equal to the whole's slice."""

import numpy as np
import pytest

from data.config import FimConfig
from data.fim import EXTRA_TOKENS, fim_cut, fim_tokens
from data.keyed import mix
from data.loader import build_loader
from data.stream import ListDocuments
from data.tokenizer import ByteTokenizer, train_bpe
from tests.data.pools import pools_of

pytestmark = pytest.mark.core

IDS = (1001, 1002, 1003)


def undo(tokens: np.ndarray) -> np.ndarray:
    """The document from its prefix-suffix-middle form, by the special tokens alone."""
    begin, hole, end = (int(np.flatnonzero(tokens == i)[0]) for i in IDS)
    assert begin == 0
    prefix, suffix, middle = tokens[1:hole], tokens[hole + 1 : end], tokens[end + 1 : -1]
    return np.concatenate([prefix, middle, suffix, tokens[-1:]])


@pytest.mark.parametrize("length", [1, 2, 3, 10, 257])
def test_fim_is_reversible_and_sliceable(length):
    document = np.arange(length)
    documents = ListDocuments([document])
    for key in range(20):
        cut = fim_cut(length, 1.0, mix(key))
        assert cut is not None
        whole = fim_tokens(documents, 0, cut, IDS, 0, length + EXTRA_TOKENS)
        assert len(whole) == length + EXTRA_TOKENS
        assert undo(whole).tolist() == document.tolist()
        for start in range(0, len(whole), 3):
            for stop in (start, start + 1, start + 7, len(whole) + 5):
                part = fim_tokens(documents, 0, cut, IDS, start, stop)
                assert part.tolist() == whole[start:stop].tolist()


def test_fim_rate_and_cuts_are_spread():
    cuts = [fim_cut(1000, 0.1, mix(5, i)) for i in range(5000)]
    taken = [cut for cut in cuts if cut is not None]
    # 500 expected, standard deviation 21.
    assert abs(len(taken) - 500) < 5 * 21
    # The two cuts of a uniform pair lie at 1/3 and 2/3 on average, +- 11.
    assert np.mean([cut.first for cut in taken]) == pytest.approx(333, abs=55)
    assert np.mean([cut.second for cut in taken]) == pytest.approx(667, abs=55)


def num_fim(pool):
    return sum(document.cut is not None for document in pool._documents)


def test_fim_documents_change_with_the_epoch_not_with_the_call(make_loader):
    loader = make_loader(fim=0.5)
    first, again, later = (loader.mixture.pool(e, 0, loader.mixture.start, 256) for e in (0, 0, 1))
    assert num_fim(first) == num_fim(again) > 0
    assert first.lengths.tolist() == again.lengths.tolist()
    assert first.lengths.tolist() != later.lengths.tolist()


def test_fim_takes_other_documents_in_another_epoch(make_loader):
    mixture = make_loader(fim=0.5).mixture
    taken = [set(), set()]
    for epoch, found in enumerate(taken):
        for pool in pools_of(mixture, epoch):
            found.update(d.drawn.index for d in pool._documents if d.cut is not None)
    assert taken[0]
    assert taken[0] != taken[1]


def test_fim_changes_no_document_that_it_does_not_take(make_loader):
    plain, some = (next(pools_of(make_loader(fim=rate).mixture)) for rate in (0.0, 0.4))
    same = plain.lengths == some.lengths
    assert 0 < num_fim(some) < len(same)
    assert same.sum() == len(same) - num_fim(some)
    begin, hole, end = ByteTokenizer.fim_ids
    for document, unchanged in enumerate(same.tolist()):
        length = int(some.lengths[document])
        tokens = some.tokens(document, 0, length)
        if unchanged:
            assert tokens.tolist() == plain.tokens(document, 0, length).tolist()
        else:
            assert [int((tokens == i).sum()) for i in (begin, hole, end)] == [1, 1, 1]


def test_fim_without_its_tokens_is_refused(small_config, monkeypatch):
    small_config.fim = FimConfig(rate=0.1)
    monkeypatch.setattr(ByteTokenizer, "fim_ids", None)
    with pytest.raises(ValueError, match=r"data\.fim\.rate=0\.1 needs .* data\.tokenizer=byte"):
        build_loader(small_config, ByteTokenizer(), 0, 1)


def test_a_trained_bpe_has_fim_tokens():
    tokenizer = train_bpe(["some words to train on, words and words"], 300)
    assert tokenizer.fim_ids is not None
    assert len({tokenizer.eos_id, *tokenizer.fim_ids}) == 4
