"""Token stores: what was written is read, from several shards; damage is always found."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import data.token_store
from data.cache import digest, save_array
from data.config import DataConfig, PackingConfig, SourceConfig, SourceKind
from data.loader import build_loader
from data.prepare import Corpus, build_tokenizer, cached_stores
from data.token_store import TokenStore, file_record, token_dtype, write_documents
from data.tokenise import StoreJob, write_store, write_validation
from data.tokenizer import ByteTokenizer

pytestmark = pytest.mark.core


@pytest.fixture
def store(small_config: DataConfig, tmp_path) -> TokenStore:
    """The small data in shards of some 20 kB, in a folder that a test may damage."""
    folder = tmp_path / "store"
    folder.mkdir()
    corpus = Corpus(small_config)
    job = StoreJob("docs", corpus.documents("docs"), folder)
    write_store(job, corpus.split["docs"], ByteTokenizer(), "key", 1, 20_000)
    return TokenStore(folder, "store")


def test_store_holds_every_document(store, small_config):
    corpus = Corpus(small_config)
    split, documents = corpus.split["docs"], corpus.documents("docs")
    assert len(store.manifest["train"]) > 3
    for held, index_N in ((store.train, split.train), (store.validation, split.validation)):
        texts = documents.texts(index_N)
        assert len(held) == len(texts)
        lengths = held.lengths(np.arange(len(held))[::-1])[::-1]
        assert lengths.tolist() == [len(text.encode()) + 1 for text in texts]
        for i, text in enumerate(texts):
            tokens = held.tokens(i, 0, len(text.encode()) + 10)
            assert bytes(tokens[:-1].tolist()).decode() == text
            assert tokens[-1] == 256
            assert held.tokens(i, 5, 9).tolist() == tokens[5:9].tolist()
    assert [t.decode() for t in store.validation_text] == documents.texts(split.validation)
    assert store.token_counts.sum() == store.train.num_tokens


def test_store_is_the_same_whatever_its_shards_but_for_their_files(store, small_config):
    one = cached_stores(small_config, ByteTokenizer())["docs"]
    assert len(one.manifest["train"]) == 1
    assert one.train.num_tokens == store.train.num_tokens
    index_N = np.arange(len(one.train))
    assert one.train.lengths(index_N).tolist() == store.train.lengths(index_N).tolist()
    assert one.content == store.content
    assert one.hash != store.hash
    store.manifest.pop("content")  # as before there was one
    assert one.content.keys() == store.content.keys()
    assert one.content != store.content


@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_a_flipped_byte_in_any_file_is_found(store, monkeypatch, limit):
    """At once in a small store, at the first use of a shard in one too large to hash each time."""
    monkeypatch.setattr(data.token_store, "VERIFY_BYTES", limit)
    for path in sorted(p for p in store.folder.iterdir() if p.suffix in (".npy", ".bin")):
        content = path.read_bytes()
        broken = bytearray(content)
        broken[len(broken) // 2] ^= 4
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"corrupt token store: .*{path.name} has sha256"):
            read_all(TokenStore(store.folder, "store"))
        path.write_bytes(content)
    read_all(TokenStore(store.folder, "store"))


def read_all(store: TokenStore) -> None:
    for held in (store.train, store.validation):
        for i in range(len(held)):
            held.tokens(i, 0, 3)
    assert len(store.validation_text) == len(store.validation_byte_ends)
    assert store.token_counts.sum() > 0
    assert store.tokenizer.vocab_size == 260


def test_missing_truncated_or_foreign_files_are_found(store, tmp_path):
    folder = store.folder

    def message() -> str:
        with pytest.raises(ValueError, match=r"^data\.sources\.x\.path=") as caught:
            TokenStore(folder, f"data.sources.x.path={folder}")
        return str(caught.value)

    shard = folder / "train-00001.tokens.npy"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2])
    assert f"has {len(content) - 2} bytes, {len(content)} expected" in message()
    shard.unlink()
    assert "train-00001.tokens.npy is missing" in message()
    shard.write_bytes(content)
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"vocab_size": 260', '"vocab_size": 261'))
    assert "manifest.json has checksum" in message()
    manifest.write_text(text[:-40])
    assert "cannot read" in message()
    fields = json.loads(text)
    del fields["checksum"]
    fields["format"] = 99
    manifest.write_text(json.dumps(fields | {"checksum": digest(fields)}))
    assert "format 99, this code reads 1" in message()
    manifest.unlink()
    assert "not a finished store" in message()
    folder.rename(tmp_path / "store.partial")
    assert "prepare.py again" in message()


def test_killed_writing_goes_on_with_the_missing_shards(store, small_config):
    folder, expected = store.folder, store.hash
    (folder / "manifest.json").unlink()
    (folder / "train-00002.json").unlink()
    (folder / "train-00002.tokens.npy").write_bytes(b"half")
    kept = (folder / "train-00001.tokens.npy").stat().st_mtime_ns
    corpus = Corpus(small_config)
    job, split = StoreJob("docs", corpus.documents("docs"), folder), corpus.split["docs"]
    write_store(job, split, ByteTokenizer(), "key", 1, 20_000)
    assert TokenStore(folder, "store").hash == expected
    assert (folder / "train-00001.tokens.npy").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="beginnings of another store"):
        write_store(job, split, ByteTokenizer(), "other", 1, 20_000)


def test_a_store_gives_the_rows_of_the_source_it_was_made_from(store, small_config, make_loader):
    source = SourceConfig(kind=SourceKind.store, path=str(store.folder))
    cfg = DataConfig(
        tokenizer="bpe",  # with a store: the store's own
        cache_dir=small_config.cache_dir,
        sources={"docs": source},
        packing=PackingConfig(pool_documents=8),
    )
    tokenizer = build_tokenizer(cfg)
    assert tokenizer.hash == ByteTokenizer().hash
    ours = build_loader(cfg, tokenizer, 0, 2).plan(9, 300).batch(0, 9)
    direct = make_loader().plan(9, 300).batch(0, 9)
    assert ours.input_ids_BT.tolist() == direct.input_ids_BT.tolist()
    cfg.tokenizer = "byte"
    shutil.copytree(store.folder, Path(small_config.cache_dir) / "moved", dirs_exist_ok=True)
    source.path = str(Path(small_config.cache_dir) / "moved")
    assert build_loader(cfg, build_tokenizer(cfg), 0, 2).manifest["sources"] is not None


def test_a_store_of_another_tokenizer_is_refused(store, small_config):
    small_config.tokenizer = "bpe"
    small_config.vocab_size = 520
    other = build_tokenizer(small_config)
    small_config.sources = {
        "docs": SourceConfig(kind=SourceKind.store, path=str(store.folder)),
    }
    with pytest.raises(ValueError, match=r"was made with tokenizer .*, data\.tokenizer=bpe is"):
        build_loader(small_config, other, 0, 1)


def test_ids_get_the_smallest_type_that_holds_them():
    assert token_dtype(1 << 16) == np.uint16
    assert token_dtype((1 << 16) + 1) == np.uint32


def test_a_store_that_took_control_tokens_from_text_is_refused(tmp_path):
    """As an older version could make it, from a tokenizer whose sentinels are not special."""
    ids = [np.array([65, 257, 66, 256]), np.array([65, 256])]
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(ByteTokenizer().serialise())
    manifest = {
        "format": 1,
        "plan": {},
        "vocab_size": 260,
        "tokenizer_hash": ByteTokenizer.hash,
        "train": [write_documents(folder, "train-00000", ids, np.dtype(np.uint16))],
        "validation": write_validation(folder, ["a"], ByteTokenizer()),
        "tokenizer": file_record(folder / "tokenizer.json"),
    }
    save_array(folder / "token_counts.npy", np.bincount(np.concatenate(ids), minlength=260))
    manifest["token_counts"] = file_record(folder / "token_counts.npy")
    text = json.dumps(manifest | {"checksum": digest(manifest)})
    (folder / "manifest.json").write_text(text)
    source = SourceConfig(kind=SourceKind.store, path=str(folder))
    cfg = DataConfig(tokenizer="byte", sources={"old": source})
    with pytest.raises(
        ValueError, match=r"data\.sources\.old\.path=.* control token 257 stands 1 t"
    ):
        build_loader(cfg, build_tokenizer(cfg), 0, 1)
