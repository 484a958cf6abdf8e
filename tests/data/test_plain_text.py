"""Text is never control, whatever tokenizer reads it; and none may drop what it cannot write.

Property: over every added token of every kind of tokenizer, special or not, alone and in any
company, no control id comes out of a text, while other texts get the ids that they always had.
"""

import random

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from data.fim import fim_cut, fim_tokens
from data.plain_text import PROBES
from data.stream import ListDocuments
from data.tokenise import encode_validation
from data.tokenizer import JsonTokenizer, load_tokenizer, train_bpe
from tests.data.texts import TEXTS

pytestmark = pytest.mark.core

V4 = ["<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(more=(), merges=(), **options) -> HFTokenizer:
    """Single bytes and what else is given."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = HFTokenizer(models.BPE(alphabet | dict(more), list(merges), **options))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def plain_eos():
    """End of document and the fill-in-the-middle tokens of V4 are not special."""
    inner = byte_level()
    inner.add_tokens(["</s>", *V4, "  ", "    ", "\n\n", "for"])
    return inner


def picky():
    """Added tokens that swallow the white space around them, or stand for whole words only."""
    inner = byte_level()
    inner.add_tokens([AddedToken("</s>", lstrip=True, rstrip=True),
                      AddedToken("cat", single_word=True, normalized=True)])  # fmt: skip
    inner.add_special_tokens([AddedToken("<fim_prefix>", rstrip=True), "<fim_suffix>",
                              "<fim_middle>"])  # fmt: skip
    return inner


def merged_eos():
    """The model's own merges make the end of document; it is not an added token."""
    more = {"</": 256, "s>": 257, "</s>": 258, "</s>!": 259, "<fim": 260}
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("</s>", "!")]
    return byte_level(more=more, merges=merges)


def whole_words():
    """An entry of the vocabulary is taken whole, without merges."""
    inner = byte_level(more={"</s>": 256, "<eos>": 257}, ignore_merges=True)
    inner.add_special_tokens(["</s>"])
    inner.add_tokens(["<eos>"])
    return inner


def unigram():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("\u2581", -2.0)]
    pieces += [(byte, -9.0) for byte in BYTES]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz<>/"]
    inner = HFTokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    inner.add_special_tokens(["<unk>", "</s>", "<s>"])
    inner.add_tokens(["\n"])
    return inner


def byte_fallback():
    """As Llama's: no pre-tokenizer, bytes where a character is not known."""
    vocab = {
        piece: i for i, piece in enumerate(["<unk>", "<s>", "</s>", *BYTES, "\u2581", *"abc</s>"])
    }
    inner = HFTokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    return inner


def word_level():
    words = {w: i for i, w in enumerate(["[UNK]", "</s>", "[SEP]", "the", "cat", "a"])}
    inner = HFTokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["[UNK]", "</s>"])
    inner.add_tokens(["[SEP]"])
    return inner


def word_piece():
    words = ["[UNK]", "</s>", "[MASK]", "a", "the", "##s", "cat", "[", "]", "##]", "<", ">", "/"]
    inner = HFTokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.WordPiece()
    inner.add_special_tokens(["[UNK]", "</s>", "[MASK]"])
    return inner


MAKERS = [plain_eos, picky, merged_eos, whole_words, unigram, byte_fallback, word_level, word_piece]
LOSSLESS = [plain_eos, picky, merged_eos, whole_words]


def control_texts(inner: HFTokenizer, tokenizer: JsonTokenizer) -> list[str]:
    names = [inner.id_to_token(i) for i in sorted(tokenizer.control_ids)]
    pick = random.Random(0)
    mixed = ["".join(pick.choices([*names, " ", "a", "the cat", "\n"], k=6)) for _ in range(40)]
    return [f for n in names for f in (n, n * 3, f"a {n} the", f" {n}", f"a{n}b", f"{n}!")] + mixed


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_no_text_gives_a_control_token(make):
    inner = make()
    tokenizer = JsonTokenizer(inner, "test")
    added = {
        i
        for i, token in inner.get_added_tokens_decoder().items()
        if token.content not in ("<unk>", "[UNK]")
    }
    assert tokenizer.control_ids >= added | {tokenizer.eos_id}
    texts = control_texts(inner, tokenizer)
    batch = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        assert tokenizer.control_ids.isdisjoint(ids.tolist())
        assert tokenizer.encode(text) == ids.tolist()
        assert tokenizer.encode_with_byte_ends(text)[0].tolist() == ids.tolist()
        if make in LOSSLESS:
            assert tokenizer.decode(ids.tolist()) == text
            assert tokenizer.decode([*ids.tolist(), tokenizer.eos_id]) == text


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_other_texts_keep_their_ids(make):
    inner = make()
    tokenizer = JsonTokenizer(make(), "test")
    for text in ("the a cats", "abc", "zebra \u4f60\u597d, caf\u00e9"):
        assert tokenizer.encode(text) == inner.encode(text, add_special_tokens=False).ids


def test_unknown_text_does_not_end_a_document():
    words = {"</s>": 0, "a": 1}
    inner = HFTokenizer(models.WordLevel(words, unk_token="</s>"))
    with pytest.raises(ValueError, match=r"test: it drops '\\x00' from a text"):
        JsonTokenizer(inner, "test")
    tokenizer = JsonTokenizer(byte_level(more={"</s>": 256}, unk_token="</s>"), "test")
    assert tokenizer.encode("</s>") == tokenizer.encode("<") + tokenizer.encode("/s>")


def test_sentinels_in_a_document_are_text_while_the_frameworks_own_cut_it():
    tokenizer = JsonTokenizer(plain_eos(), "test")
    assert tokenizer.fim_ids is not None
    text = "".join(V4) + "</s>" + TEXTS[0]
    (ids,), (ends,) = encode_validation([text], tokenizer)
    control = [i for i in ids.tolist() if i in tokenizer.control_ids]
    assert control == [tokenizer.eos_id]
    assert ends[-1] == len(text.encode())
    cut = fim_cut(len(ids), 1.0, 5)
    moved = fim_tokens(ListDocuments([ids]), 0, cut, tokenizer.fim_ids, 0, len(ids) + 3)
    begin, hole, end = tokenizer.fim_ids
    assert [i for i in moved.tolist() if i in tokenizer.control_ids] == [
        begin, hole, end, tokenizer.eos_id
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("inner", "lost"),
    [
        (HFTokenizer(models.WordLevel({"</s>": 0, "a": 1})), "\\x00"),
        (
            HFTokenizer(models.BPE({"</s>": 0, **{chr(c): c + 1 for c in range(256)}}, [])),
            "\\u0142",
        ),
        (byte_level(more={"</s>": 256}), None),
    ],
)
def test_a_tokenizer_that_drops_characters_is_refused(inner, lost):
    if lost is None:
        assert not JsonTokenizer(inner, "test").unknown
        return
    with pytest.raises(ValueError, match="test: it drops ") as caught:
        JsonTokenizer(inner, "test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", [0x00, 0x0A, 0x61, 0x80, 0xBF, 0xC3, 0xE4, 0xF0])
def test_every_byte_that_is_missing_is_found(missing):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    one = byte_level().pre_tokenizer.pre_tokenize_str
    letters = {letter for c in PROBES for letter, _ in one(c) for letter in letter}
    assert len(letters) == 256 - 13  # UTF-8 has no byte 0xC0, 0xC1 and above 0xF4
    assert letters <= set(alphabet)
    character = next(c for c in PROBES if missing in c.encode())
    gone = one(character)[0][0][character.encode().index(missing)]
    kept = {letter: i for i, letter in enumerate(alphabet) if letter != gone}
    inner = HFTokenizer(models.BPE({**kept, "</s>": 300}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    with pytest.raises(ValueError, match="test: it drops "):
        JsonTokenizer(inner, "test")


def test_characters_that_become_unknown_are_told(tmp_path, caplog):
    word_level().save(str(tmp_path / "tokenizer.json"))
    load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert "characters tried become its unknown token, '" in caplog.text
    assert train_bpe(TEXTS, 300).unknown == []
