"""Sources of every kind, whole and streamed; bad ones are told in one line."""

import gzip
import json
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import DataConfig, PackingConfig, SourceConfig, SourceKind, TextUnit
from data.config import ValidationConfig as Validation
from data.loader import build_loader
from data.prepare import build_tokenizer, cached_stores
from data.sources import DocumentStream, fingerprint, open_documents
from tests.data.pools import pools_of

TEXTS = [f"document {i} \u00e9 " + " ".join(f"w{i}x{j}" for j in range(3 + i)) for i in range(30)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The same documents in every kind of file."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "texts").mkdir()
    for i, text in enumerate(TEXTS):
        (folder / "texts" / f"{i:03d}.txt").write_text(text)
    (folder / "lines.txt").write_text("\n".join(TEXTS))
    (folder / "paragraphs.md").write_text("\n\n".join(TEXTS))
    rows = [json.dumps({"text": text, "id": i}) for i, text in enumerate(TEXTS)]
    (folder / "a.jsonl").write_text("\n".join(rows[:10]))
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(rows[10:]))
    table = pa.table({"content": TEXTS, "n": list(range(30)), "other": TEXTS})
    pq.write_table(table, folder / "c.parquet", row_group_size=7)
    (folder / "set").mkdir()
    pq.write_table(pa.table({"text": TEXTS}), folder / "set" / "train.parquet")
    return folder


KINDS = {
    "text": {"kind": SourceKind.text, "path": "texts"},
    "glob": {"kind": SourceKind.text, "path": "texts/*.txt"},
    "line": {"kind": SourceKind.text, "path": "lines.txt", "unit": TextUnit.line},
    "paragraph": {"kind": SourceKind.text, "path": "paragraphs.md", "unit": TextUnit.paragraph},
    "jsonl": {"kind": SourceKind.jsonl, "path": ".", "text_key": "text"},
    "parquet": {"kind": SourceKind.parquet, "path": "c.parquet", "text_key": "content"},
    "hub": {"kind": SourceKind.hub, "path": "set"},  # a dataset folder; names need a network
}


def source_of(files: Path, name: str, **changes) -> SourceConfig:
    fields = KINDS[name] | changes
    return SourceConfig(**(fields | {"path": str(files / fields["path"])}))


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_its_documents(files, data_cache, name):
    source = source_of(files, name)
    documents = open_documents("s", source, str(data_cache))
    assert [t.rstrip("\n") for t in documents.texts(np.arange(len(documents)))] == TEXTS
    assert documents.texts(np.array([7, 2]))[1].startswith("document 2 ")
    assert fingerprint("s", source, "") == fingerprint("s", source, "")


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_streams_and_resumes(files, name):
    stream = DocumentStream("s", source_of(files, name, streaming=True))
    first = stream.read(0, 11)
    position, state = stream.state()
    state = json.loads(json.dumps(state))
    rest = stream.read(11, 100)
    assert [t.rstrip("\n") for t in first + rest] == TEXTS
    assert stream.length == 30
    assert stream.read(4, 2) == first[4:6]
    other = DocumentStream("s", source_of(files, name, streaming=True))
    other.seek(position, state)
    assert other.read(13, 100) == rest[2:]
    assert other.length == 30


def config_of(cache: Path, **sources: SourceConfig) -> DataConfig:
    return DataConfig(
        tokenizer="byte",
        cache_dir=str(cache),
        sources=sources,
        packing=PackingConfig(pool_documents=6, pool_rows=4),
        validation=Validation(bytes=300, max_overlap=0.5),
    )


def test_a_streamed_epoch_holds_every_document_once_in_order(files, data_cache):
    cfg = config_of(data_cache, s=source_of(files, "jsonl", streaming=True))
    cfg.validate()
    loader = build_loader(cfg, build_tokenizer(cfg), 0, 1)
    pools = list(pools_of(loader.mixture))
    assert len(pools) > 3
    read = [documents_of(pool) for pool in pools]
    trained = list(chain(*read))
    held = TEXTS[: len(TEXTS) - len(trained)]
    assert trained == TEXTS[len(held) :]
    assert loader.validation_bytes(64) == b"".join(text.encode()[1:] for text in held)
    assert documents_of(next(pools_of(loader.mixture, 1))) == read[0]


def test_a_streamed_document_is_found_again_by_its_place(files, data_cache):
    cfg = config_of(data_cache, s=source_of(files, "jsonl", streaming=True))
    loader = build_loader(cfg, build_tokenizer(cfg), 0, 1)
    planned = [sample for row in range(4) for sample in loader.plan(4, 64).samples(row)]
    for sample in planned:
        found = bytes(t for t in loader.sample_tokens(sample).tolist() if t != 256)
        assert found == TEXTS[sample.document].encode()[sample.start : sample.stop]
    with pytest.raises(ValueError, match=r"data\.sources\.s trains on no document 500"):
        loader.sample_tokens(planned[0]._replace(document=500))


def documents_of(pool) -> list[str]:
    texts = [pool.tokens(d, 0, int(n)) for d, n in enumerate(pool.lengths)]
    assert all(tokens[-1] == 256 for tokens in texts)
    return [bytes(tokens[:-1].tolist()).decode() for tokens in texts]


def test_a_streamed_copy_of_validation_text_is_not_trained_on(tmp_path, data_cache):
    texts = [*TEXTS[20:], "start " + TEXTS[20], *TEXTS[:10]]  # document 20 is held out
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    source = SourceConfig(SourceKind.jsonl, str(tmp_path / "x.jsonl"), streaming=True)
    cfg = config_of(data_cache, s=source)
    loader = build_loader(cfg, build_tokenizer(cfg), 0, 1)
    assert TEXTS[20].encode()[1:] in loader.validation_bytes(1000)
    trained = list(chain(*map(documents_of, pools_of(loader.mixture))))
    assert "start " + TEXTS[20] not in trained
    assert set(TEXTS[:10]) <= set(trained)


@pytest.mark.parametrize("weighted", [False, True])
def test_resume_in_a_stream_is_exact(files, data_cache, weighted):
    sources = {"s": source_of(files, "parquet", streaming=True)}
    if weighted:
        sources["t"] = source_of(files, "line", weight=0.25)
        sources["s"].weight = 0.75
    cfg = config_of(data_cache, **sources)
    tokenizer = build_tokenizer(cfg)
    loader = build_loader(cfg, tokenizer, 0, 2)
    states, rows = [], []
    for _ in range(40):  # more than one pass
        states.append(json.loads(json.dumps(loader.state_dict())))
        rows.append(loader.plan(3, 80).batch(0, 3).labels_BTK)
    for step in (0, 7, 23, 38):
        resumed = build_loader(cfg, tokenizer, 0, 2)
        resumed.load_state_dict(states[step])
        for labels in rows[step:]:
            assert resumed.plan(3, 80).batch(0, 3).labels_BTK.equal(labels)


def test_files_of_one_content_make_one_store(files, data_cache):
    stores = [
        cached_stores(config_of(data_cache, s=source_of(files, name)), build_tokenizer(config_of(
            data_cache, s=source_of(files, name))))["s"]
        for name in ("jsonl", "parquet")
    ]  # fmt: skip
    assert stores[0].hash == stores[1].hash
    assert stores[0].folder != stores[1].folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "text", "path": "nowhere"}, r"s\.path=.*nowhere: no such file or folder"),
        ({"kind": "text", "path": "no*.txt"}, r"no file matches"),
        ({"kind": "parquet", "path": "texts"}, r"the folder has no \.parquet file"),
        ({"kind": "text", "path": "empty.txt"}, r"empty\.txt has no documents"),
        ({"kind": "text", "path": "latin.txt"}, r"latin\.txt line 1: byte 0xe9 is not UTF-8"),
        ({"kind": "parquet", "path": "a.jsonl"}, r"a\.jsonl cannot be read as parquet"),
        ({"kind": "jsonl", "path": "lines.txt"}, r"lines\.txt line 1: not JSON: Expecting"),
        ({"kind": "jsonl", "path": "a.jsonl", "text_key": "body"}, r"text_key=body is not among"),
        ({"kind": "parquet", "path": "c.parquet", "text_key": "n"}, r"text_key=n must hold text"),
        ({"kind": "text", "path": "blank.txt"}, r"none of 1 documents has any text"),
        ({"kind": "hub", "path": "set", "split": "nosplit"}, r"set cannot be read as hub: .*split"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # datasets leaves a failed file open
def test_a_bad_source_is_refused_in_one_line(files, data_cache, fields, message, streaming, capfd):
    (files / "empty.txt").touch()
    (files / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (files / "blank.txt").write_text("  \n ")
    fields = fields | {"kind": SourceKind(fields["kind"]), "path": str(files / fields["path"])}
    cfg = config_of(data_cache, s=SourceConfig(**fields, streaming=streaming))
    if streaming and "none of 1" in message:
        message = "no documents to train on"
    with pytest.raises(ValueError, match=message) as caught:
        build_loader(cfg, build_tokenizer(cfg), 0, 1)
    assert str(caught.value).startswith("data.sources.s")
    assert capfd.readouterr() == ("", "")
    assert "\n" not in str(caught.value)
