"""Documents of files: only the text counts, and what cannot be read is told by file and line."""

import bz2
import gzip
import json
import logging
import lzma
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data.config import DataConfig, OnBadLine, SourceConfig, SourceKind, TextUnit
from data.config import ValidationConfig as Validation
from data.errors import ConfigError
from data.prepare import build_tokenizer, cached_stores
from data.sources import DocumentStream, open_documents

PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def read(path: Path, kind: str = "jsonl", **fields) -> list[str]:
    """The documents of a source, read whole and as a stream."""
    source = SourceConfig(SourceKind(kind), str(path), **fields)
    documents = open_documents("s", source, str(path.parent / "cache"))
    whole = documents.texts(np.arange(len(documents)))
    assert DocumentStream("s", source).read(0, 1000) == whole
    return whole


def refusals(path: Path, kind: str = "jsonl", **fields) -> str:
    """The one line in which a source is refused, read whole and as a stream."""
    source = SourceConfig(SourceKind(kind), str(path), **fields)
    with pytest.raises(ConfigError) as whole:
        open_documents("s", source, str(path.parent / "cache"))
    with pytest.raises(ConfigError) as streamed:
        DocumentStream("s", source).read(0, 1000)
    assert str(whole.value) == str(streamed.value)
    assert str(whole.value).isprintable()
    assert str(whole.value).startswith("data.sources.s")
    return str(whole.value)


def lines(*objects: object) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in objects)


def test_only_the_text_of_json_lines_is_looked_at(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "1", "url": "u"}, {"text": "2", "url": 5}))
    many = [{"text": "3", "n": i} for i in range(3)] + [{"n": {"x": []}, "text": "4"}]
    huge = b'{"n": ' + b"9" * 5000 + b', "x": NaN, "text": "5"}\n\n{"text": null}'
    (tmp_path / "b.ndjson").write_bytes(lines({"text": "\x00", "meta": [1]}, *many) + huge)
    assert read(tmp_path) == ["1", "2", "\x00", "3", "3", "3", "4", "5", ""]


def test_only_the_text_column_of_parquet_is_looked_at(tmp_path):
    (tmp_path / "set").mkdir()
    text_types = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
    a_map = pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int8()))
    others = [pa.array([{"a": 1}, None]), a_map, pa.array([1, 2])]
    for i, (kind, other) in enumerate(zip(text_types, others, strict=True)):
        text = pa.array([f"x{i}", None], pa.string()).cast(kind)
        pq.write_table(pa.table({"other": other, "a.b": text}), tmp_path / "set" / f"{i}.parquet")
    empty = pa.table({"a.b": pa.array([], pa.string()), "other": pa.array([], pa.int8())})
    pq.write_table(empty, tmp_path / "set" / "1b.parquet")  # a shard without rows among full ones
    pq.write_table(pa.table({"a.b": pa.nulls(1)}), tmp_path / "set" / "4.parquet")
    assert read(tmp_path / "set", "parquet", text_key="a.b") == ["x0", "", "x1", "", "x2", "", ""]


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_compressed_file_is_read_resumed_in_and_never_half(tmp_path, suffix):
    texts = [f"text {i} " + "\u00e9" * (i % 50) for i in range(500)]
    packed = PACKERS[suffix](lines(*({"text": text} for text in texts)))
    path = tmp_path / f"x.jsonl{suffix}"
    path.write_bytes(packed)
    assert read(path) == texts
    (tmp_path / "named.txt").write_bytes(packed)  # the content says it, not the name
    assert read(tmp_path / "named.txt") == texts
    stream = DocumentStream("s", SourceConfig(SourceKind.jsonl, str(path)))
    stream.read(0, 137)
    state = json.loads(json.dumps(stream.state()))
    other = DocumentStream("s", SourceConfig(SourceKind.jsonl, str(path)))
    other.seek(*state)
    assert other.read(137, 1000) == texts[137:]
    for cut in (len(packed) // 2, len(packed) - 2):
        path.write_bytes(packed[:cut])
        assert f"x.jsonl{suffix}" in refusals(path)
    path.write_bytes(b"")
    assert "has no documents" in refusals(path)


def test_a_stream_goes_on_from_a_state_that_it_cannot_use(tmp_path):
    """Saved by code that read files through ``datasets``: it reads its way there again."""
    (tmp_path / "a.txt").write_text("".join(f"{i}\n" for i in range(9)))
    source = SourceConfig(SourceKind.text, str(tmp_path / "a.txt"), unit=TextUnit.line)
    stream = DocumentStream("s", source)
    stream.seek(5, {"examples_iterable": {}})
    assert stream.read(5, 2) == ["5\n", "6\n"]


def test_byte_order_marks_and_line_ends_of_text_files(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\rthree\r\n\r\n \t\nfour\n\ufeff".encode())
    assert read(tmp_path / "a.txt", "text") == ["one\ntwo\rthree\n\n \t\nfour\n\ufeff"]
    by_line = ["one\n", "two\rthree\n", "\n", " \t\n", "four\n", "\ufeff"]
    assert read(tmp_path / "a.txt", "text", unit=TextUnit.line) == by_line
    paragraphs = ["one\ntwo\rthree", "four\n\ufeff"]
    assert read(tmp_path / "a.txt", "text", unit=TextUnit.paragraph) == paragraphs
    (tmp_path / "a.jsonl").write_bytes("\ufeff".encode() + lines({"text": "a\r\n"}, {"text": "b"}))
    assert read(tmp_path / "a.jsonl") == ["a\r\n", "b"]


GOOD = lines({"text": "good"})
BAD_LINES = {
    b'{"text": "caf\xe9"}': "byte 0xe9 is not UTF-8",
    b'{"text": "a\x00b"}': "not JSON: Invalid control character at column 12",
    b"\x00\x00\x00": "not JSON: Expecting value at column 1",
    b'{"text": "trunc': "not JSON: Unterminated string starting at column 10",
    b'{"body": "x", "id": 3}': "text_key=text is not among the keys body, id",
    b'{"text": 5}': "text_key=text must hold text, not a number",
    b'{"text": ["x"]}': "text_key=text must hold text, not a list",
    b'{"text": "\\ud800"}': "text_key=text holds half of a surrogate pair",
    b'["text"]': "a list instead of an object",
    b"null": "null instead of an object",
    b'{"text": "a", "x": ' + b"[" * 200_000: "not JSON that can be read: nested too deeply",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_told_with_its_number_or_left_out_and_counted(tmp_path, bad, caplog):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(GOOD * 3)
    (folder / "b.jsonl").write_bytes(GOOD * 2 + b"\n" + bad + b"\n" + GOOD + bad)
    told = refusals(folder)
    assert told.startswith(f"data.sources.s: {folder}/b.jsonl line 4: {BAD_LINES[bad]}")
    assert told.endswith("(data.sources.s.on_bad_line=skip leaves such a line out)")
    with caplog.at_level(logging.WARNING):
        assert read(folder, on_bad_line=OnBadLine.skip) == ["good"] * 6
    messages = [record.getMessage() for record in caplog.records]
    assert "data: source s: 2 bad lines left out" in messages
    assert sum("b.jsonl line 4" in message for message in messages) == 2  # whole and as a stream


def test_a_file_of_one_json_array_is_explained(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"text": "a"}]')
    assert "line 1: a list instead of an object (one JSON array is not JSON" in refusals(tmp_path)


@pytest.mark.parametrize(
    ("unit", "kept"),
    [("document", ["fine\n"]), ("paragraph", ["a\nb", "e", "fine"]),
     ("line", ["a\n", "b\n", "\n", "\n", "e\n", "fine\n"])],
)  # fmt: skip
@pytest.mark.parametrize("bad", [b"caf\xe9", b"c\x00d"])
def test_a_bad_text_is_told_with_its_line(tmp_path, unit, kept, bad):
    (tmp_path / "a.txt").write_bytes(b"a\nb\n\n" + bad + b"\n\ne\n")
    (tmp_path / "b.txt").write_bytes(b"fine\n")
    unit = TextUnit(unit)
    assert f"{tmp_path}/a.txt line 4: " in refusals(tmp_path, "text", unit=unit)
    assert read(tmp_path, "text", unit=unit, on_bad_line=OnBadLine.skip) == kept


def test_utf_16_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16"))
    assert "a.txt line 1: byte 0xff is not UTF-8: is it UTF-16?" in refusals(tmp_path, "text")


def test_a_bad_parquet_row_is_told_with_its_number(tmp_path):
    raw = [b"a", b"b", b"c\xff", b"d\x00", b"e\xff"]
    text = pa.array(raw, pa.binary()).view(pa.string())
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": text}), path, row_group_size=2)
    assert f"{path} row 3: byte 0xff is not UTF-8" in refusals(path, "parquet")
    assert read(path, "parquet", on_bad_line=OnBadLine.skip) == ["a", "b", "d\x00"]


def test_a_parquet_file_that_cannot_be_is_told(tmp_path):
    path = tmp_path / "x.parquet"
    table = pa.table({"text": ["a"] * 500, "id": range(500)})
    pq.write_table(table, path)
    whole = path.read_bytes()
    wrong = refusals(path, "parquet", text_key="body")
    assert wrong.endswith(
        "x.parquet cannot be read as parquet: text_key=body is not among the columns text, id"
    )
    assert "text_key=id must hold text, not int64" in refusals(path, "parquet", text_key="id")
    pq.write_table(table.select(["text", "text"]), tmp_path / "two.parquet")
    assert "text_key=text is twice among" in refusals(tmp_path / "two.parquet", "parquet")
    for content in (whole[:-20], whole[: len(whole) // 2], b"PAR1", b"x"):
        path.write_bytes(content)
        assert f"{path} cannot be read as parquet: " in refusals(path, "parquet")
    # A file as a whole is never a bad line that may be left out.
    assert "cannot be read" in refusals(path, "parquet", on_bad_line=OnBadLine.skip)


def test_a_file_that_goes_away_is_told(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    stream = DocumentStream("s", SourceConfig(SourceKind.text, str(tmp_path)))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ConfigError, match=r"a\.txt cannot be read as text: No such file"):
        stream.read(0, 1)


def test_lines_left_out_stand_in_the_manifest_of_the_store(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD * 20 + b"{\n" + GOOD + b"[]")
    source = SourceConfig(SourceKind.jsonl, str(tmp_path / "a.jsonl"), on_bad_line=OnBadLine.skip)
    cfg = DataConfig(
        tokenizer="byte",
        cache_dir=str(tmp_path / "cache"),
        sources={"s": source},
        validation=Validation(bytes=0),
    )
    store = cached_stores(cfg, build_tokenizer(cfg))["s"]
    assert (store.manifest["bad_lines_left_out"], len(store.train)) == (2, 21)
