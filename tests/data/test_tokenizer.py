"""Tokenizers: exact round trips, byte ends, special tokens, loading from files and folders."""

import json
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

from data.config import DataConfig
from data.errors import ConfigError
from data.prepare import build_tokenizer
from data.tokenizer import (
    ByteTokenizer,
    JsonTokenizer,
    Tokenizer,
    deserialise,
    load_tokenizer,
    train_bpe,
)
from tests.data.texts import TEXTS

V4_EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
V4_FIM = [
    "<\uff5cfim\u2581hole\uff5c>",
    "<\uff5cfim\u2581begin\uff5c>",
    "<\uff5cfim\u2581end\uff5c>",
]


@pytest.fixture(scope="module")
def bpe() -> JsonTokenizer:
    return train_bpe(TEXTS, 400)


@pytest.fixture(params=["byte", "bpe"])
def tokenizer(request, bpe) -> Tokenizer:
    return ByteTokenizer() if request.param == "byte" else bpe


def v4_sized(folder) -> None:
    """Save a tokenizer folder as DeepSeek-V4's is: 129,280 rows, its own names of specials."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<\uff5cbegin\u2581of\u2581sentence\uff5c>": 0, V4_EOS: 1}
    for piece in alphabet:
        vocab[piece] = len(vocab)
    left, merges = iter([(a, b) for a in alphabet for b in alphabet]), []
    while len(merges) < 60_000:
        a, b = next(left)
        if a + b not in vocab:
            vocab[a + b] = len(vocab)
            merges.append((a, b))
    while len(vocab) < 129_277:
        vocab[f"<unused {len(vocab)}>"] = len(vocab)
    inner = HFTokenizer(models.BPE(vocab, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([V4_EOS, *V4_FIM])
    folder.mkdir()
    inner.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": V4_EOS}}))


@pytest.mark.core
@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text
    assert tokenizer.encode_batch([text, text])[1].tolist() == ids
    assert max(ids) < tokenizer.vocab_size
    assert not {tokenizer.eos_id, *tokenizer.fim_ids} & set(ids)


@pytest.mark.core
@pytest.mark.parametrize("text", TEXTS)
def test_byte_ends_partition_the_text(tokenizer, text):
    ids, ends = tokenizer.encode_with_byte_ends(text)
    assert ids.tolist() == tokenizer.encode(text)
    assert ends[-1] == len(text.encode())
    assert (np.diff(ends) >= 0).all()
    if text.isascii():  # then a token's bytes are the bytes of its text
        for token, start, stop in zip(ids.tolist(), [0, *ends], ends, strict=False):
            assert tokenizer.decode([token]).encode() == text.encode()[start:stop]


def test_byte_ends_with_a_normaliser_hold_every_byte():
    inner = HFTokenizer(models.WordLevel({"</s>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    inner.normalizer = normalizers.Strip()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    ids, ends = JsonTokenizer(inner, "test").encode_with_byte_ends("  a \u4f60 b  ")
    assert ids.tolist() == [1, 3, 2]
    assert ends.tolist() == [3, 7, 11]


@pytest.mark.core
def test_hash_is_of_the_content(tokenizer, bpe):
    again = deserialise(tokenizer.serialise(), "test")
    assert again.hash == tokenizer.hash
    assert again.encode(TEXTS[5]) == tokenizer.encode(TEXTS[5])
    assert train_bpe(TEXTS, 400).hash == bpe.hash
    assert len({bpe.hash, train_bpe(TEXTS, 300).hash, ByteTokenizer().hash}) == 3


@pytest.mark.core
def test_bpe_has_the_asked_size_and_compresses(bpe):
    assert train_bpe(TEXTS, 270).vocab_size == 270
    assert bpe.vocab_size <= 400
    assert len(bpe.encode(TEXTS[5])) * 3 < len(TEXTS[5])


def test_v4_sized_folder_loads_and_works(tmp_path):
    v4_sized(tmp_path / "v4")
    tokenizer = load_tokenizer(str(tmp_path / "v4"))
    assert tokenizer.vocab_size == 129_280
    assert tokenizer.eos_id == 1
    assert tokenizer.fim_ids == (129_278, 129_277, 129_279)  # begin, hole, end
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    reference = HFTokenizer.from_file(str(tmp_path / "v4" / "tokenizer.json"))
    text = TEXTS[0] + TEXTS[1]
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids
    by_file = load_tokenizer(str(tmp_path / "v4" / "tokenizer.json"))
    assert by_file.hash == tokenizer.hash


@pytest.mark.core
def test_eos_is_the_one_that_the_folder_names(tmp_path, bpe):
    inner = json.dumps(json.loads(bpe.serialise())["tokenizer"])
    (tmp_path / "tokenizer.json").write_text(inner)
    assert load_tokenizer(str(tmp_path)).eos_id == bpe.eos_id
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": {"content": "<|fim_end|>"}}))
    assert load_tokenizer(str(tmp_path)).eos_id == bpe.fim_ids[2]
    config.write_text(json.dumps({"eos_token": "<nowhere>"}))
    with pytest.raises(ValueError, match="no end-of-document token, none of '<nowhere>'"):
        load_tokenizer(str(tmp_path))
    for text in ("{", "[]", '{"eos_token": ["</s>"]}', '{"eos_token": {"content": 7}}'):
        config.write_text(text)
        with pytest.raises(ConfigError, match="tokenizer_config"):
            load_tokenizer(str(tmp_path))


@pytest.mark.core
def test_a_stores_tokenizer_file_can_be_named(tmp_path, bpe):
    (tmp_path / "tokenizer.json").write_text(bpe.serialise())
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).hash == bpe.hash


@pytest.mark.core
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "no such file or folder"),
        ("tokenizer.json", "not json", "cannot be read"),
        ("tokenizer.json", "{}", "cannot be read"),
        ("tokenizer.json", '{"type":"json"}', "is not a tokenizer"),
        ("tokenizer.json", "\ud800", "cannot be read"),
        ("", None, "the folder has no tokenizer.json"),
    ],
)
def test_a_tokenizer_that_cannot_be_is_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(str(path))
    assert str(caught.value).startswith(f"data.tokenizer={path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.core
def test_an_unknown_name_is_refused_offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"data\.tokenizer=nobody/nothing: .* nor found on the hub"
    ):
        load_tokenizer("nobody/nothing")


@pytest.mark.core
def test_a_damaged_cached_bpe_is_refused(small_config: DataConfig, tmp_path, data_cache):
    small_config.tokenizer = "bpe"
    small_config.vocab_size = 600
    good = build_tokenizer(small_config)
    assert build_tokenizer(small_config).hash == good.hash
    (folder,) = (data_cache / "tokenizers").glob("bpe-600-*")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"eos_id": 0', '"eos_id": 1'))
    with pytest.raises(ValueError, match="is corrupt, hash"):
        build_tokenizer(small_config)
    shutil.rmtree(folder)
    assert build_tokenizer(small_config).hash == good.hash
