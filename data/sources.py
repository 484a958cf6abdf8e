"""Documents of a source: text files, JSON lines, Parquet, hub datasets, the embedded corpus.

Sources that fit the disk are random-access (:class:`Documents`); they are tokenised once into a
token store (data/prepare.py). Sources that do not are read in order (:class:`DocumentStream`).
Everything but the embedded corpus goes through ``datasets``.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.cache import cache_root
from data.config import SourceConfig, SourceKind
from data.corpus import embedded_documents, package_key
from data.errors import ConfigError

_BUILDERS = {SourceKind.text: "text", SourceKind.jsonl: "json", SourceKind.parquet: "parquet"}
_SUFFIXES = {
    SourceKind.text: (".txt", ".md", ".rst", ".text"),
    SourceKind.jsonl: (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".json.gz"),
    SourceKind.parquet: (".parquet",),
}


class Documents(Protocol):
    """A finite, random-access list of texts; an empty text is no document."""

    def __len__(self) -> int: ...

    def texts(self, index_N: np.ndarray) -> list[str]:
        """Texts of some documents, in the order asked for."""
        ...


class EmbeddedDocuments:
    """The embedded corpus, read from its cache (data/corpus.py)."""

    def __init__(self, folder: Path) -> None:
        self._bytes = np.memmap(folder / "text.bin", dtype=np.uint8, mode="r")
        self._ends = np.load(folder / "ends.npy")
        if len(self._bytes) != self._ends[-1]:
            raise ConfigError(
                f"data.cache_dir: {folder}/text.bin has {len(self._bytes)} bytes, {self._ends[-1]}"
                " expected: remove the folder to make it anew"
            )

    def __len__(self) -> int:
        return len(self._ends)

    def texts(self, index_N: np.ndarray) -> list[str]:
        """Texts of some documents."""
        return [self._text(int(i)) for i in index_N]

    def _text(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return self._bytes[start : self._ends[index]].tobytes().decode()


class TableDocuments:
    """One column of a ``datasets`` table.

    Raises:
        ValueError: the column is not there or holds no text.
    """

    def __init__(self, table: Any, column: str, key: str) -> None:
        _check_columns(table.column_names, column, key)
        self._table = table.select_columns([column])
        self._column = column
        self._key = key

    def __len__(self) -> int:
        return len(self._table)

    def texts(self, index_N: np.ndarray) -> list[str]:
        """Texts of some documents."""
        rows = self._table[index_N.tolist()][self._column]
        return [_as_text(row, self._key, self._column) for row in rows]


class DocumentStream:
    """Documents in the order of the source, pass after pass; can continue from a saved state.

    Args:
        name: of the source.
        source: its config.
        cache_dir: ``data.cache_dir``.
    """

    def __init__(self, name: str, source: SourceConfig, cache_dir: str) -> None:
        self._key = f"data.sources.{name}"
        self._what = f"{self._key}.path={source.path} cannot be read as {source.kind.value}"
        self._column = _column(source)
        self._table = _load(name, source, cache_dir, streaming=True)
        self._position = 0
        self._rows = self._iterate()
        self.length: int | None = None  # documents of a pass, once its end was seen

    def read(self, start: int, count: int) -> list[str]:
        """Documents ``start .. start + count - 1`` of a pass; fewer at its end.

        Reading on from where the last call ended is cheap, going back starts the pass anew.

        Raises:
            ValueError: the stream has no document, not the column, or holds something else.
        """
        if start < self._position:
            self.seek(0, None)
        out: list[str] = []
        while self._position < start + count:
            try:
                row = next(self._rows)
            except StopIteration:
                self.length = self._position
                self._rows = iter(())
                break
            except Exception as error:  # the library raises many kinds
                reason = " ".join(str(error.__cause__ or error).split())[:300]
                at = f"{self._what}: document {self._position}"
                raise ConfigError(f"{at}: {reason}") from error
            if self._position >= start:
                _check_columns(list(row), self._column, self._key)
                out.append(_as_text(row[self._column], self._key, self._column))
            self._position += 1
        if self.length == 0:
            raise ConfigError(f"{self._key} has no documents")
        return out

    def state(self) -> tuple[int, Any]:
        """Position and the library's state, for :meth:`seek`."""
        return self._position, self._table.state_dict()

    def seek(self, position: int, state: Any) -> None:
        """Continue at a position with the state saved there (None: the start of a pass)."""
        if state is None:
            position = 0
            state = self._initial
        self._table.load_state_dict(state)
        self._position = position
        self._rows = iter(self._table)

    def _iterate(self) -> Iterator[dict[str, Any]]:
        self._initial = self._table.state_dict()
        return iter(self._table)


def open_documents(name: str, source: SourceConfig, cache_dir: str) -> Documents:
    """The documents of a source that is neither a stream nor a token store.

    Raises:
        ValueError: nothing is there, or it cannot be read; names the config key.
    """
    if source.kind is SourceKind.embedded:
        folder = embedded_documents(source.packages, cache_root(cache_dir))
        return EmbeddedDocuments(folder)
    key = f"data.sources.{name}"
    table = _load(name, source, cache_dir, streaming=False)
    if len(table) == 0:
        raise ConfigError(f"{key}.path={source.path} has no documents")
    return TableDocuments(table, _column(source), key)


def fingerprint(name: str, source: SourceConfig) -> dict[str, Any]:
    """What the documents of a source depend on, without reading them: the key of their cache."""
    if source.kind is SourceKind.embedded:
        return {"kind": source.kind.value, "packages": package_key(source.packages)}
    fields: dict[str, Any] = {"kind": source.kind.value}
    if source.kind is not SourceKind.text:
        fields["text_key"] = source.text_key
    if source.kind is SourceKind.hub and source.revision and Path(source.path).exists():
        raise ConfigError(
            f"data.sources.{name}.revision={source.revision} has no effect:"
            f" data.sources.{name}.path={source.path} is a folder here"
        )
    if source.kind is SourceKind.hub and not Path(source.path).exists():
        return fields | {
            "path": source.path,
            "subset": source.subset,
            "split": source.split,
            "revision": source.revision,
        }
    files = (
        sorted(str(p) for p in Path(source.path).rglob("*") if p.is_file())
        if source.kind is SourceKind.hub
        else find_files(name, source)
    )
    stats = [(file, os.stat(file)) for file in files]
    fields["files"] = [[os.path.abspath(file), s.st_size, s.st_mtime_ns] for file, s in stats]
    if source.kind is SourceKind.text:
        fields["unit"] = source.unit.value
    if source.kind is SourceKind.hub:
        fields |= {"subset": source.subset, "split": source.split}
    return fields


def find_files(name: str, source: SourceConfig) -> list[str]:
    """The files that a path means: itself, a folder's files of this kind, or a glob's matches.

    Raises:
        ValueError: there are none, or one cannot be read.
    """
    key = f"data.sources.{name}.path={source.path}"
    path = os.path.expanduser(source.path)
    if os.path.isdir(path):
        suffixes = _SUFFIXES[source.kind]
        found = [str(p) for p in Path(path).rglob("*") if p.name.lower().endswith(suffixes)]
        if not found:
            raise ConfigError(f"{key}: the folder has no {' '.join(suffixes)} file")
    elif glob.has_magic(path):
        found = [p for p in glob.glob(path, recursive=True) if os.path.isfile(p)]
        if not found:
            raise ConfigError(f"{key}: no file matches")
    elif os.path.isfile(path):
        found = [path]
    else:
        raise ConfigError(f"{key}: no such file or folder")
    unreadable = next((p for p in found if not os.access(p, os.R_OK)), None)
    if unreadable is not None:
        raise ConfigError(f"{key}: no permission to read {unreadable}")
    return sorted(found)


def _load(name: str, source: SourceConfig, cache_dir: str, streaming: bool) -> Any:
    """A ``datasets`` table, or an iterable of rows."""
    import datasets  # noqa: PLC0415 - takes a second, which the default corpus need not wait for

    options: dict[str, Any] = {"split": "train", "streaming": streaming}
    if not streaming:
        options["cache_dir"] = str(cache_root(cache_dir) / "datasets")
    key = f"data.sources.{name}.path={source.path}"
    if source.kind is SourceKind.hub:
        builder = source.path
        options["split"] = source.split
        options["name"] = source.subset or None
        options["revision"] = source.revision or None
    else:
        builder = _BUILDERS[source.kind]
        options["data_files"] = _checked_files(name, source)
        if source.kind is SourceKind.text:
            options |= {"sample_by": source.unit.value, "keep_linebreaks": True}
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors come in our one line
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(builder, **options)
    except Exception as error:  # the library raises many kinds, some bare
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise ConfigError(f"{key} cannot be read as {source.kind.value}: {reason}") from error


def _checked_files(name: str, source: SourceConfig) -> list[str]:
    files = find_files(name, source)
    filled = [file for file in files if os.path.getsize(file)]
    if not filled:
        raise ConfigError(f"data.sources.{name}.path={source.path}: every file is empty")
    return filled


def _column(source: SourceConfig) -> str:
    return "text" if source.kind is SourceKind.text else source.text_key


def _check_columns(columns: list[str], column: str, key: str) -> None:
    if column not in columns:
        raise ConfigError(f"{key}.text_key={column} is not among the columns {', '.join(columns)}")


def _as_text(value: Any, key: str, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise ConfigError(f"{key}.text_key={column} must hold text, a document holds {kind}")
    return value
