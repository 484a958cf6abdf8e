"""Long documents are encoded in pieces: the ids and their ends are those of the whole."""

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HFTokenizer

from data.near_duplicates import OverlapCounter, Shingler
from data.pieces import _KNOWN_SPLITS, PieceEncoder, pieces
from data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, train_bpe
from tests.data.texts import TEXTS
from train.errors import ROOT

DIGITS, CJK, DEEPSEEK, LLAMA, QWEN = _KNOWN_SPLITS
CORPUS = [
    *TEXTS,
    "a b\nc d",
    "it's a test. It'S\n\n\nx\r\ny",
    "1234 56\n7",
    "!\n?\n\n. a",
    "\u4f60\n\u597d a",
]


def split_tokenizer(patterns: list[str], normalizer=None) -> JsonTokenizer:
    """A BPE of a published family's pre-tokenizers."""
    inner = HFTokenizer(models.BPE())
    if normalizer is not None:
        inner.normalizer = normalizer
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(CORPUS * 3, trainer)
    return JsonTokenizer(inner, "test")


TOKENIZERS: dict[str, Tokenizer] = {
    "byte": ByteTokenizer(),
    "bpe": train_bpe(CORPUS * 3, 600),
    "deepseek": split_tokenizer([DIGITS, CJK, DEEPSEEK], normalizers.Sequence([])),
    "llama": split_tokenizer([LLAMA]),
    "qwen": split_tokenizer([QWEN], normalizers.NFC()),
}
# Letters, marks that combine, digits, quotes and other signs, every kind of white space.
HARD = (
    "aB\u00e9e\u0301\u4f60\u30a219\u0664'sd.!<|>\u3002\U0001f600 \n\r\t\u00a0\u2028\u200b\x1c\x85"
    "\x00\ufeff\u1100\u1161"
)
PARTS = [*"ab.1\n ", " a", "a b", "'s", "\n\n", "\r\n", "a\nb"]
texts = st.one_of(
    st.text(st.sampled_from("ab \n"), max_size=60),
    st.text(st.sampled_from(HARD), max_size=80),
    st.lists(st.sampled_from(PARTS), max_size=40).map("".join),
    st.text(max_size=60),
)


def check(name: str, document: str, other: str, size: int) -> None:
    tokenizer = TOKENIZERS[name]
    encoder = PieceEncoder(tokenizer, size)
    assert encoder._cuts
    for text, found in zip([document, other], encoder.documents([document, other]), strict=True):
        assert found.tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
    whole = tokenizer.encode_with_byte_ends(document)
    for one, two in zip(encoder.with_byte_ends(document), whole, strict=True):
        assert one.tolist() == two.tolist()
    assert "".join(pieces(document, size)) == document


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(document=texts, other=texts, size=st.integers(1, 9))
def test_pieces_have_the_tokens_of_the_whole(name, document, other, size):
    check(name, document, other, size)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=20_000, deadline=None, database=None)
@given(document=texts, other=texts, size=st.integers(1, 9))
def test_pieces_have_the_tokens_of_the_whole_for_many_texts(name, document, other, size):
    check(name, document, other, size)


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(document=texts, size=st.integers(1, 9))
def test_pieces_have_the_words_of_the_whole(document, size):
    split = [words for piece in pieces(document, size) for words in Shingler(1)(piece).tolist()]
    assert split == Shingler(1)(document).tolist()


def test_a_bpe_trained_on_pieces_is_that_of_the_whole():
    split = [piece for text in CORPUS * 3 for piece in pieces(text, 5)]
    assert len(split) > 2 * len(CORPUS * 3)
    assert train_bpe(split, 600).hash == TOKENIZERS["bpe"].hash


STRANGE = {
    "pre_tokenizer": [
        {"type": "Metaspace"},
        {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Removed", "invert": False},
        {"type": "Split", "pattern": {"Regex": LLAMA}, "behavior": "Removed", "invert": False},
        None,
    ],
    "normalizer": [{"type": "Prepend", "prepend": "_"}],
}


@pytest.mark.parametrize(("part", "step"), [(p, step) for p in STRANGE for step in STRANGE[p]])
def test_a_tokenizer_that_may_merge_anywhere_gets_the_whole(part, step, caplog, monkeypatch):
    monkeypatch.setattr("data.pieces._LONG", 20)
    tokenizer = train_bpe(CORPUS, 400)
    fields = json.loads(tokenizer.serialise())
    fields["tokenizer"][part] = step
    monkeypatch.setattr(tokenizer, "serialise", lambda: json.dumps(fields))
    text = "a b a b\na b " * 3
    with caplog.at_level(logging.WARNING):
        (found,) = PieceEncoder(tokenizer, 4).documents([text])
    assert found.tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
    (record,) = caplog.records
    assert "36 characters is encoded at once" in record.getMessage()
    assert "data.tokenizer is of an unknown kind" in record.getMessage()


def test_a_long_text_without_a_cut_is_told(caplog, monkeypatch):
    monkeypatch.setattr("data.pieces._LONG", 20)
    with caplog.at_level(logging.WARNING):
        list(PieceEncoder(TOKENIZERS["bpe"], 4).documents(["a\n\n" * 9]))
    assert "it has no cut" in caplog.text


MEMORY = """
import resource, sys
from data.near_duplicates import OverlapCounter
from data.pieces import PieceEncoder
from data.tokenizer import ByteTokenizer, deserialise
tokenizer = deserialise(sys.stdin.read(), "x")
text = "Some words of a line, and more of them.\\n" * 25_000 * int(sys.argv[1])
counter = OverlapCounter(["other words"], 13)
counter.add("few words")
list(PieceEncoder(tokenizer).documents([text[:100_000]]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(ids,) = PieceEncoder(tokenizer).documents([text])
counter.add(text)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, len(text), len(ids))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_memory_for_a_long_document_is_bounded(name):
    """20 MB: its ids and the hashes of its words, twice while they are joined, and little more."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, "20"],
        input=TOKENIZERS[name].serialise(),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    kilobytes, size, tokens = map(int, done.stdout.split())
    assert size == 20_000_000
    assert kilobytes * 1024 < 100e6 + 2 * 2 * tokens + 4 * 8 * size / 4


def test_nothing_is_remembered_where_nothing_is_held_out():
    counter = OverlapCounter([], 13)
    counter.add("a word")
    assert (counter.repeats("a word"), counter._shingler._words) == (0.0, {})


def test_words_of_a_stream_are_not_remembered_for_ever(monkeypatch):
    monkeypatch.setattr("data.near_duplicates._WORDS", 100)
    shingler, fresh = Shingler(3), Shingler(3)
    for number in range(200):
        text = " ".join(f"w{number}x{i}" for i in range(20))
        np.testing.assert_array_equal(shingler(text), fresh(text))
        assert len(shingler._words) <= 120
        fresh = Shingler(3)
