"""Documents of one file, in order, with the line or row of each: text, JSON lines, Parquet.

Text is UTF-8; a byte order mark at the start of a file is taken off. In text files CRLF is a line's
end like LF and becomes it; what JSON and Parquet hold is taken as it is. Files are decompressed by
what their first bytes say (gzip, bzip2, xz, zstd), whatever their names. Of JSON lines and Parquet
only the column with the text is looked at: the others may hold and become anything.

A line that is no document comes as a row with a ``fault``, so that the reader can go on behind it.
A file that cannot be read on raises :class:`UnreadableFile`.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from data.config import TextUnit

_BATCH_BYTES = 4 << 20  # of Parquet rows whose text is decoded at a time
_BZIP2 = re.compile(rb"BZh[1-9]1AY&SY")
_ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # a frame, a skippable one
_READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
_ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError)
_DECODER = json.JSONDecoder(parse_int=float)  # no limit on the digits of other columns' numbers
_JSON_NAMES = {float: "a number", bool: "true or false", list: "a list", dict: "an object"}


class UnreadableFile(Exception):  # noqa: N818 - says what it is
    """A file as a whole, or from some place on, cannot be read; the text says why."""


class Place(NamedTuple):
    """Where a document begins.

    Attributes:
        offset: byte of the decompressed file; 0 for Parquet.
        number: line, or row of a Parquet file, from 1.
    """

    offset: int = 0
    number: int = 1


class RawDocument(NamedTuple):
    """A document, or a line that is none.

    Attributes:
        text: the document; empty text is no document, but counts as a row.
        number: its first line or its row, from 1; of a fault: the line that has it.
        after: where the next one begins.
        fault: why there is no text; empty where there is.
    """

    text: str
    number: int
    after: Place
    fault: str = ""


def text_rows(path: str, unit: TextUnit, start: Place) -> Iterator[RawDocument]:
    """Documents of a text file.

    Args:
        path: the file.
        unit: ``document``: the file is one; ``line``: each line, its end included; ``paragraph``:
            each run of lines that are not blank, without the last line's end.
        start: an earlier row's ``after``.

    Raises:
        UnreadableFile: it ends early, is damaged or may not be read.
    """
    with _open(path) as file:
        for raw, number, after in _UNITS[unit](file, start):
            raw = raw.replace(b"\r\n", b"\n")
            row = _row(raw, number, after)
            if "\0" in row.text:
                line = number + row.text[: row.text.index("\0")].count("\n")
                row = RawDocument("", line, after, "a NUL character: is this text?")
            yield row


def json_rows(path: str, column: str, start: Place) -> Iterator[RawDocument]:
    """Documents of a file of JSON lines; blank lines are passed over.

    Args:
        path: the file.
        column: key of the text in each line's object; null there is an empty text.
        start: an earlier row's ``after``.

    Raises:
        UnreadableFile: it ends early, is damaged or may not be read.
    """
    with _open(path) as file:
        for raw, number, after in _lines(file, start):
            if not raw.strip():
                continue
            row = _row(raw.rstrip(b"\r\n"), number, after)
            yield row if row.fault else _json_row(row, column)


def parquet_rows(path: str, column: str, start: Place) -> Iterator[RawDocument]:
    """Documents of a Parquet file.

    Args:
        path: the file.
        column: name of the column with the text; null there is an empty text.
        start: an earlier row's ``after``.

    Raises:
        UnreadableFile: it is no Parquet file, damaged, or has no such column of text.
    """
    number = 1
    try:
        with open(path, "rb") as raw, pq.ParquetFile(raw) as file:
            _check_column(file.schema_arrow, column)
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if number + rows <= start.number:
                    number += rows
                    continue
                for value in _column_values(file, group, column):
                    if number >= start.number:
                        yield _row(value or b"", number, Place(0, number + 1))
                    number += 1
    except _ARROW_ERRORS as error:
        raise UnreadableFile(f"{_reason(error)} (read up to row {number - 1})") from error


def _open(path: str) -> BinaryIO:
    """A file, decompressed."""
    try:
        with open(path, "rb") as file:
            head = file.read(10)
        if head.startswith(b"\x1f\x8b"):
            return cast(BinaryIO, gzip.open(path))
        if _BZIP2.match(head):
            return cast(BinaryIO, bz2.open(path))
        if head.startswith(b"\xfd7zXZ\0"):
            return cast(BinaryIO, lzma.open(path))
        if _ZSTD.match(head):  # Arrow's reader, unlike the package zstandard's, sees a missing end
            return io.BufferedReader(pa.CompressedInputStream(open(path, "rb"), "zstd"), 1 << 20)
        return open(path, "rb")
    except OSError as error:
        raise UnreadableFile(_reason(error)) from error


def _documents(file: BinaryIO, start: Place) -> Iterator[tuple[bytes, int, Place]]:
    """The whole file as one document."""
    try:
        _skip(file, start.offset)
        raw = file.read()
    except _READ_ERRORS as error:
        raise UnreadableFile(_reason(error)) from error
    if raw:
        yield raw.removeprefix(codecs.BOM_UTF8), 1, Place(len(raw), 2)


def _lines(file: BinaryIO, start: Place) -> Iterator[tuple[bytes, int, Place]]:
    """Lines with their ends, their numbers, and where the next ones begin."""
    offset, number = start
    try:
        _skip(file, offset)
        for line in file:
            offset += len(line)
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            yield line, number, Place(offset, number + 1)
            number += 1
    except _READ_ERRORS as error:
        raise UnreadableFile(f"{_reason(error)}, after line {number - 1}") from error


def _paragraphs(file: BinaryIO, start: Place) -> Iterator[tuple[bytes, int, Place]]:
    """Runs of lines that are not blank."""
    held: list[bytes] = []
    first = after = start
    for line, number, after in _lines(file, start):
        if line.strip():
            if not held:
                first = Place(0, number)
            held.append(line)
        elif held:
            yield b"".join(held).rstrip(b"\r\n"), first.number, after
            held = []
    if held:
        yield b"".join(held).rstrip(b"\r\n"), first.number, after


_UNITS = {
    TextUnit.document: _documents,
    TextUnit.line: _lines,
    TextUnit.paragraph: _paragraphs,
}


def _skip(file: BinaryIO, count: int) -> None:
    """Pass over the first bytes of a file that was just opened."""
    if file.seekable():
        file.seek(count)
        return
    while count > 0 and (read := len(file.read(min(count, 1 << 20)))):
        count -= read


def _row(raw: bytes, number: int, after: Place) -> RawDocument:
    """A row of UTF-8 bytes that begin at a line."""
    try:
        return RawDocument(raw.decode(), number, after)
    except UnicodeDecodeError as error:
        hint = (
            ": is it UTF-16?" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ""
        )
        line = number + raw.count(b"\n", 0, error.start)
        return RawDocument("", line, after, f"byte 0x{raw[error.start]:02x} is not UTF-8{hint}")


def _json_row(row: RawDocument, column: str) -> RawDocument:
    """The text in the object that a line holds."""
    try:
        found: Any = _DECODER.decode(row.text)
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        return row._replace(text="", fault=f"not JSON: {what} at column {error.colno}")
    except RecursionError:
        return row._replace(text="", fault="not JSON that can be read: nested too deeply")
    text, fault = "", ""
    if not isinstance(found, dict):
        hint = " (one JSON array is not JSON lines)" if row.number == 1 else ""
        fault = f"{_json_name(found)} instead of an object{hint}"
    elif column not in found:
        fault = f"text_key={column} is not among the keys {_listed(found)}"
    elif isinstance(found[column], str):
        text = found[column]
        try:
            text.encode()
        except UnicodeEncodeError:
            text, fault = "", f"text_key={column} holds half of a surrogate pair"
    elif found[column] is not None:
        fault = f"text_key={column} must hold text, not {_json_name(found[column])}"
    return row._replace(text=text, fault=fault)


def _json_name(value: Any) -> str:
    return _JSON_NAMES.get(type(value), "null")


def _check_column(schema: pa.Schema, column: str) -> None:
    places = schema.get_all_field_indices(column)
    if len(places) != 1:
        what = "is twice" if places else "is not"
        raise UnreadableFile(f"text_key={column} {what} among the columns {_listed(schema.names)}")
    held = schema.field(places[0]).type
    value = held.value_type if pa.types.is_dictionary(held) else held
    text = (pa.string(), pa.large_string(), pa.string_view(), pa.null())
    if value not in text:
        raise UnreadableFile(f"text_key={column} must hold text, not {held}")


def _column_values(file: pq.ParquetFile, group: int, column: str) -> Iterator[bytes | None]:
    """UTF-8 of the rows of a row group, some at a time."""
    about = file.metadata.row_group(group)  # not of its columns: pyarrow aborts on a damaged one
    rows = min(1024, max(1, _BATCH_BYTES * about.num_rows // max(about.total_byte_size, 1)))
    for batch in file.iter_batches(rows, row_groups=[group], columns=[column], use_threads=False):
        values = batch.column(column)
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        yield from values.cast(pa.large_binary()).to_pylist()


def _listed(names: Iterable[str]) -> str:
    return _one_line(", ".join(names)) or "(there are none)"


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return _one_line(text) or type(error).__name__


def _one_line(text: str) -> str:
    text = " ".join(text.split())[:200]
    return text if text.isprintable() else ascii(text)
