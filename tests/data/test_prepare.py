"""What is cached is known by content: no name, path or time of a file decides what a run reads."""

import errno
import json
import os
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data.sources
from data.config import DataConfig, SourceConfig, SourceKind, TextUnit, ValidationConfig
from data.corpus import package_key
from data.errors import DiskError
from data.loader import build_loader
from data.prepare import Corpus, build_tokenizer, cached_stores
from data.sources import open_documents
from data.token_store import TokenStore
from data.tokenizer import ByteTokenizer
from scripts.prepare import main

pytestmark = pytest.mark.core

TEXTS = [f"text {i:03d} " + " ".join(f"w{i}x{j}" for j in range(20)) for i in range(60)]


def write(path, kind, texts):
    """The texts in a file of a kind; returns the source."""
    if kind in (SourceKind.parquet, SourceKind.hub):
        pq.write_table(pa.table({"text": texts}), path, compression="none", use_dictionary=False)
    elif kind is SourceKind.jsonl:
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    else:
        path.write_text("\n".join(texts))
    place = path.parent if kind is SourceKind.hub else path
    unit = TextUnit.line if kind is SourceKind.text else TextUnit.document
    return SourceConfig(kind, str(place), unit=unit)


def trained(cfg):
    """All text that is trained on and held out."""
    (store,) = cached_stores(cfg, build_tokenizer(cfg)).values()
    documents = store.train
    length_N = documents.lengths(np.arange(len(documents))).tolist()
    texts = [bytes(documents.tokens(i, 0, n - 1).tolist()) for i, n in enumerate(length_N)]
    return {text.decode().strip() for text in [*texts, *store.validation_text]}


def config(cache, source, num_bytes=200):
    return DataConfig(
        tokenizer="byte", cache_dir=str(cache), sources={"s": source},
        validation=ValidationConfig(bytes=num_bytes),
    )  # fmt: skip


@pytest.mark.parametrize("kind", [SourceKind.text, SourceKind.jsonl, SourceKind.parquet,
                                  SourceKind.hub])  # fmt: skip
def test_a_rewritten_file_with_its_old_size_and_time_is_read_anew(tmp_path, kind):
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "train.parquet"
    cfg = config(tmp_path / "cache", write(path, kind, TEXTS))
    assert trained(cfg) == set(TEXTS)
    before = path.stat()
    changed = [text.upper() for text in TEXTS]
    write(path, kind, changed)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert trained(cfg) == set(changed)


def test_a_file_of_another_name_and_time_is_not_read_again(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    cfg = config(tmp_path / "cache", write(path, SourceKind.jsonl, TEXTS))
    first = trained(cfg)
    shutil.copy(path, tmp_path / "b.jsonl")
    cfg.sources["s"].path = str(tmp_path / "b.jsonl")
    monkeypatch.delattr(data.sources, "json_rows")  # who reads lines now fails
    assert trained(cfg) == first


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    source = write(path, SourceKind.jsonl, TEXTS)
    real = data.sources._copy

    def copy(folder, name, source):
        real(folder, name, source)
        write(path, SourceKind.jsonl, TEXTS[1:])

    monkeypatch.setattr(data.sources, "_copy", copy)
    with pytest.raises(ValueError, match=r"data\.sources\.s\.path=.* changed while it was read"):
        open_documents("s", source, str(tmp_path / "cache"))
    monkeypatch.undo()
    assert len(open_documents("s", source, str(tmp_path / "cache"))) == len(TEXTS) - 1


def test_a_bpe_of_a_stream_is_known_by_the_text_it_was_trained_on(tmp_path):
    path = tmp_path / "a.jsonl"
    source = write(path, SourceKind.jsonl, TEXTS)
    source.streaming = True
    cfg = config(tmp_path / "cache", source)
    cfg.tokenizer, cfg.vocab_size = "bpe", 512
    hashes = [build_tokenizer(cfg).hash for _ in range(2)]
    before = path.stat()
    write(path, SourceKind.jsonl, [text.upper() for text in TEXTS])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    hashes.append(build_tokenizer(cfg).hash)
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_disk_that_is_full_inside_a_library_is_no_error_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    source = write(tmp_path / "in" / "train.parquet", SourceKind.hub, TEXTS)

    def fill(*args, **options):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("generation failed") from error

    monkeypatch.setattr("datasets.load_dataset", fill)
    with pytest.raises(DiskError, match=r"data\.cache_dir: No space left .* the disk of .*cache"):
        open_documents("s", source, str(tmp_path / "cache"))


def test_a_package_that_changed_in_place_is_extracted_anew(tmp_path, monkeypatch):
    (tmp_path / "mypackage").mkdir()
    module = tmp_path / "mypackage" / "__init__.py"
    module.write_text('"""' + "old words " * 30 + '"""\n')
    monkeypatch.syspath_prepend(tmp_path)
    keys = [package_key(["mypackage"])]
    before = module.stat()
    module.write_text('"""' + "new words " * 30 + '"""\n')
    os.utime(module, ns=(before.st_atime_ns, before.st_mtime_ns))
    keys.append(package_key(["mypackage"]))
    assert keys[0] != keys[1]


@pytest.mark.parametrize("kind", [SourceKind.jsonl, SourceKind.hub])
def test_documents_can_be_given_to_another_process(tmp_path, kind):
    (tmp_path / "in").mkdir()
    source = write(tmp_path / "in" / "train.parquet", kind, TEXTS)
    documents = open_documents("s", source, str(tmp_path / "cache"))
    again = pickle.loads(pickle.dumps(documents))
    assert again.texts(np.arange(len(again))) == documents.texts(np.arange(60)) == TEXTS
    assert len(pickle.dumps(documents)) < 20_000


def test_the_split_does_not_depend_on_names(tmp_path):
    """Two stores of one file hold out the same documents; so does a run on the file itself."""
    path = tmp_path / "x.jsonl"
    source = write(path, SourceKind.jsonl, TEXTS)
    held = []
    for out in ("red", "blue"):
        code = main([
            "--out", str(tmp_path / out), "--kind", "jsonl", "--path", str(path), "--tokenizer",
            "byte", "--validation-bytes", "800", "--cache-dir", str(tmp_path / out / ".." / "c"),
        ])  # fmt: skip
        assert code == 0
        held.append(TokenStore(tmp_path / out, out).validation_text)
    moved = shutil.copytree(tmp_path, tmp_path.with_name(tmp_path.name + "_moved"))
    cfg = config(tmp_path / "other", SourceConfig(source.kind, str(moved / "x.jsonl")), 800)
    (store,) = cached_stores(cfg, ByteTokenizer()).values()
    held.append(store.validation_text)
    cfg.sources = {"another name": cfg.sources["s"]}
    held.append(next(iter(cached_stores(cfg, ByteTokenizer()).values())).validation_text)
    assert held[0] == held[1] == held[2] == held[3]
    assert len(held[0]) > 4
    trained_on = Corpus(cfg).split["another name"].train
    assert len(trained_on) + len(held[0]) == len(TEXTS)
    assert build_loader(cfg, ByteTokenizer(), 0, 1).validation(64)


def test_a_vocabulary_that_the_text_does_not_fill_is_told(tmp_path, caplog):
    cfg = config(
        tmp_path / "cache", write(tmp_path / "t.jsonl", SourceKind.jsonl, ["a b c"] * 9), 0
    )
    cfg.tokenizer, cfg.vocab_size = "bpe", 600
    caplog.set_level("INFO")
    found = build_tokenizer(cfg).vocab_size
    assert found < 600
    assert f"data.vocab_size=600, but the text has pairs for {found} entries only" in caplog.text
