"""Needles of blocks: the pair asked for stands once, its key in no training document."""

import pytest

from data.config import SourceConfig, SourceKind, Task
from data.recall import BLOCK, LETTERS
from data.synthetic import document
from data.tokenizer import ByteTokenizer, train_bpe
from train.errors import UserError
from train.probes.blocks import BLOCK_NEEDLES, block_needle
from train.probes.tasks import needle, watched_document

BYTES = ByteTokenizer()


def training_texts(count=300):
    source = SourceConfig(kind=SourceKind.synthetic, tasks=[Task.pairs])
    return [document(source, number) for number in range(count)]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(training_texts(3), 400)


@pytest.mark.parametrize("of", ["bytes", "bpe"])
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_a_pair_stands_once_before_it_is_asked_for(of, depth, bpe):
    tokenizer = BYTES if of == "bytes" else bpe
    for number in range(3):
        q = needle(tokenizer, "pairs", 300, depth, 0, number)
        text = tokenizer.decode(q.ids_N.tolist())
        name, value = text[-3:-1], text[-1]
        told = [text[at : at + BLOCK] for at in range(0, len(text) - 3, BLOCK)]
        assert 260 < len(q.ids_N) <= 300
        assert told.count(f"{name}{value} ") == sum(block[:2] == name for block in told) == 1
        assert abs(told.index(f"{name}{value} ") / (len(told) - 1) - depth) < 0.02
        assert q.begin == len(q.ids_N) - 1
        source = q.begin - 1 - q.distance
        assert value in tokenizer.decode(q.ids_N[source : source + 1].tolist())
        assert q.chance == 1 / len(LETTERS) < 0.02


def test_no_training_document_has_a_key_that_is_asked_for():
    asked = {BYTES.decode(needle(BYTES, "pairs", 128, 0.5, 0, n).ids_N.tolist())[-3:-1]
             for n in range(100)}  # fmt: skip
    seen = {text[at : at + 2] for text in training_texts() for at in range(0, len(text), BLOCK)}
    assert len(asked) > 60
    assert not asked & seen


def test_a_gist_is_as_far_as_its_stretch_ends():
    for depth, distance in ((0.0, 255), (0.5, 128), (1.0, 1)):
        q = needle(BYTES, "gist", 512, depth, 0, 0)
        assert (len(q.ids_N), q.begin) == (510, 509)
        assert q.distance == pytest.approx(distance, abs=2)


def test_attention_is_watched_on_documents_of_the_asked_kind():
    for kind in BLOCK_NEEDLES:
        ids_N = watched_document(BYTES, [kind, "single"], 256, 0)
        assert ids_N.tolist() == block_needle(BYTES, kind, 256, 0.0, 0, -1).ids_N.tolist()
    assert "The word of" in BYTES.decode(watched_document(BYTES, ["keys"], 256, 0).tolist())


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="needle of gist does not fit a document of 5 tokens"):
        block_needle(BYTES, "gist", 5, 0.0, 0, 0)
