"""Documents of a source: text files, JSON lines, Parquet, hub datasets, the embedded corpus.

Sources that fit the disk are random-access (:class:`Documents`): their text is copied once into one
cached file, and tokenised once into a token store (data/prepare.py). Sources that do not are read
in order (:class:`DocumentStream`). data/files.py says which files a path means, data/readers.py
reads one, data/hub.py asks the library ``datasets``.
"""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from data.cache import build_once, cache_root, digest, file_digest, save_array
from data.config import OnBadLine, SourceConfig, SourceKind
from data.corpus import embedded_documents
from data.errors import ConfigError
from data.files import FoundFiles, find_files, shown
from data.hub import HubDocuments, HubRows, cached_revision
from data.progress import progress_map
from data.readers import Place, RawDocument, UnreadableFile, json_rows, parquet_rows, text_rows
from data.synthetic import VERSION, SyntheticDocuments

logger = logging.getLogger(__name__)

_READING = 2  # rules by which files become documents: part of the cache key


class Documents(Protocol):
    """A finite, random-access list of texts; an empty text is no document.

    Attributes:
        at_once: how many to ask for in one call, so that reading is quick and memory is bounded.
        bad_lines: lines of the files that were left out.
    """

    at_once: int
    bad_lines: int

    def __len__(self) -> int: ...

    def texts(self, index_N: np.ndarray) -> list[str]:
        """Texts of some documents, in the order asked for."""
        ...


class CachedDocuments:
    """Texts end to end in one file of the cache.

    Args:
        folder: holds ``text.bin`` (UTF-8), ``ends.npy`` (the byte after each document) and, of a
            source of files, ``about.json``.
    """

    at_once = 1

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ends = np.load(folder / "ends.npy")
        path = folder / "text.bin"
        size, expected = path.stat().st_size, int(self._ends[-1]) if len(self._ends) else 0
        if size != expected:
            raise ConfigError(
                f"data.cache_dir: {path} has {size} bytes, {expected} expected: remove the folder"
                " to make it anew"
            )
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r") if size else np.empty(0, np.uint8)
        about = folder / "about.json"
        self.bad_lines: int = json.loads(about.read_text())["bad_lines"] if about.is_file() else 0

    def __reduce__(self) -> tuple[type[CachedDocuments], tuple[Path]]:
        return CachedDocuments, (self._folder,)  # other processes map the file themselves

    def __len__(self) -> int:
        return len(self._ends)

    def texts(self, index_N: np.ndarray) -> list[str]:
        """Texts of some documents."""
        return [self._text(int(i)) for i in index_N]

    def _text(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return self._bytes[start : self._ends[index]].tobytes().decode()


class FileRows:
    """The documents of a source of files, in order; bad lines are refused or counted.

    Args:
        name: of the source.
        source: its config.

    Raises:
        ConfigError: there are no files; while reading: one that cannot be read, a bad line.
    """

    def __init__(self, name: str, source: SourceConfig) -> None:
        self._key = f"data.sources.{name}"
        self._source = source
        self._skips = source.on_bad_line is OnBadLine.skip
        self.found: FoundFiles = find_files(name, source)
        self._file, self._place = 0, Place()
        self.bad_lines = 0
        self.without_documents: list[str] = []
        self._told = False

    def rows(self, state: Any) -> Iterator[str]:
        """Documents from a state on; None: from the start."""
        self._file, self._place = (state[0], Place(*state[1:])) if state else (0, Place())
        self.bad_lines, self.without_documents = 0, []
        return self._iterate()

    def state(self) -> list[int]:
        """Where the last document ended: file, byte and line (or row)."""
        return [self._file, *self._place]

    def _iterate(self) -> Iterator[str]:
        while self._file < len(self.found.files):
            path = self.found.files[self._file]
            count = 0
            for row in self._read(path):
                self._place = row.after
                if row.fault:
                    self._bad(path, row)
                    continue
                count += 1
                yield row.text
            if not count and self._place.number == 1:
                self.without_documents.append(path)
            self._file, self._place = self._file + 1, Place()

    def _read(self, path: str) -> Iterator[RawDocument]:
        source = self._source
        try:
            if source.kind is SourceKind.text:
                yield from text_rows(path, source.unit, self._place)
            elif source.kind is SourceKind.jsonl:
                yield from json_rows(path, source.text_key, self._place)
            else:
                yield from parquet_rows(path, source.text_key, self._place)
        except UnreadableFile as error:
            kind = source.kind.value
            raise ConfigError(
                f"{self._key}: {shown(path)} cannot be read as {kind}: {error}"
            ) from error

    def _bad(self, path: str, row: RawDocument) -> None:
        what = "row" if self._source.kind is SourceKind.parquet else "line"
        problem = f"{self._key}: {shown(path)} {what} {row.number}: {row.fault}"
        if not self._skips:
            raise ConfigError(f"{problem} ({self._key}.on_bad_line=skip leaves such a {what} out)")
        self.bad_lines += 1
        if not self._told:
            self._told = True
            logger.warning("data: left out, as all that cannot be read will be: %s", problem)


class DocumentStream:
    """Documents in the order of the source, pass after pass; can continue from a saved state.

    Args:
        name: of the source.
        source: its config.

    Raises:
        ConfigError: it cannot be opened.
    """

    def __init__(self, name: str, source: SourceConfig) -> None:
        self._key = f"data.sources.{name}"
        self._path = shown(source.path)
        if source.kind is SourceKind.hub:
            self._source: HubRows | FileRows = HubRows(name, source)
        else:
            self._source = FileRows(name, source)
            _tell_left_out(self._key, self._source.found)
        self.length: int | None = None  # documents of a pass, once its end was seen
        self.seek(0, None)

    def read(self, start: int, count: int) -> list[str]:
        """Documents ``start .. start + count - 1`` of a pass; fewer at its end.

        Reading on from where the last call ended is cheap, going back starts the pass anew.

        Raises:
            ConfigError: the stream has no document, not the column, or holds something else.
        """
        return list(self.each(start, count))

    def each(self, start: int, count: int) -> Iterator[str]:
        """The same, one document in memory."""
        if start < self._position:
            self.seek(0, None)
        while self._position < start + count:
            text = next(self._rows, None)
            if text is None:
                self._end()
                return
            self._position += 1
            if self._position > start:
                yield text

    def state(self) -> tuple[int, Any]:
        """Position and where it is in the files, for :meth:`seek`."""
        return self._position, self._source.state()

    def seek(self, position: int, state: Any) -> None:
        """Continue at a position with the state saved there (None: the start of a pass)."""
        if isinstance(self._source, FileRows) and not isinstance(state, list):
            state = None  # was saved by code that read files otherwise: read() goes the way again
        self._position = position if state is not None else 0
        self._rows = self._source.rows(state)

    def _end(self) -> None:
        if self._position == 0:
            raise ConfigError(f"{self._key}.path={self._path} has no documents")
        if isinstance(self._source, FileRows) and self._source.bad_lines and self.length is None:
            logger.warning("data: %s: %d bad lines left out", self._key, self._source.bad_lines)
        self.length = self._position
        self._rows = iter(())


def open_documents(
    name: str, source: SourceConfig, cache_dir: str, content: dict[str, Any] | None = None
) -> Documents:
    """The documents of a source that is neither a stream nor a token store.

    Args:
        name: of the source.
        source: its config.
        cache_dir: ``data.cache_dir``.
        content: its :func:`fingerprint`, where it is known.

    Raises:
        ConfigError: nothing is there, or it cannot be read; names the config key.
    """
    if source.kind is SourceKind.synthetic:
        return SyntheticDocuments(source)
    if source.kind in (SourceKind.embedded, SourceKind.package_sources):
        return CachedDocuments(_package_documents(source, cache_dir))
    before = fingerprint(name, source, cache_dir) if content is None else content
    key = digest(before)[:32]

    def unchanged() -> None:
        if fingerprint(name, source, cache_dir) != before:
            raise ConfigError(
                f"data.sources.{name}.path={shown(source.path)} changed while it was read: start"
                " again"
            )

    def copy(folder: Path) -> None:
        _copy(folder, name, source)
        unchanged()

    if source.kind is SourceKind.hub:
        of_commit = replace(source, revision=before.get("revision", source.revision))
        folder = f"{cache_root(cache_dir)}/datasets/{key}"
        documents: Documents = HubDocuments(name, of_commit, folder)
        unchanged()
    else:
        documents = CachedDocuments(build_once(cache_root(cache_dir) / "texts" / key, copy))
    if len(documents) == 0:
        raise ConfigError(f"data.sources.{name}.path={shown(source.path)} has no documents")
    return documents


def fingerprint(name: str, source: SourceConfig, cache_dir: str) -> dict[str, Any]:
    """What the documents of a source depend on, the key of what is cached of them.

    Files are known by their bytes and their order: neither a name nor a time can lie about them; a
    dataset of the hub by the commit that it stands at.

    Raises:
        ConfigError: there are none, or one cannot be read.
    """
    fields: dict[str, Any] = {"kind": source.kind.value}
    if source.kind is SourceKind.synthetic:
        tasks = [task.value for task in source.tasks]
        size = [source.documents, source.document_characters]
        return fields | {"rules": VERSION, "size": size, "tasks": tasks, "seed": source.seed}
    if source.kind in (SourceKind.embedded, SourceKind.package_sources):
        folder = _package_documents(source, cache_dir)
        return fields | {"files": [file_digest(folder / f) for f in ("text.bin", "ends.npy")]}
    if source.kind is not SourceKind.text:
        fields["text_key"] = source.text_key
    if source.kind is not SourceKind.hub:
        if source.kind is SourceKind.text:
            fields["unit"] = source.unit.value
        files = _digests(name, [Path(file) for file in find_files(name, source).files])
        return fields | {
            "files": files,
            "reading": _READING,
            "on_bad_line": source.on_bad_line.value,
        }
    fields |= {"subset": source.subset, "split": source.split}
    folder = Path(source.path)
    if not folder.exists():
        revision = cached_revision(source, cache_root(cache_dir) / "datasets")
        return fields | {"path": source.path, "revision": revision}
    if source.revision:
        raise ConfigError(
            f"data.sources.{name}.revision={source.revision} has no effect:"
            f" data.sources.{name}.path={source.path} is a folder here"
        )
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    names = [str(file.relative_to(folder)) for file in files]  # tell splits and formats
    return fields | {"names": names, "files": _digests(name, files)}


def _package_documents(source: SourceConfig, cache_dir: str) -> Path:
    whole = source.kind is SourceKind.package_sources
    return embedded_documents(source.packages, cache_root(cache_dir), whole)


def _digests(name: str, files: list[Path]) -> list[str]:
    """Hashes of files, with a bar on a terminal: a second for a gigabyte, about."""
    try:
        sizes = [file.stat().st_size for file in files]
        return progress_map(file_digest, files, sizes, 1, f"check {name}")
    except OSError as error:
        raise ConfigError(
            f"data.sources.{name}: cannot read {shown(str(error.filename))}: {error.strerror}"
        ) from error


def _copy(folder: Path, name: str, source: SourceConfig) -> None:
    """Write the text of all files into a folder of the cache, for :class:`CachedDocuments`."""
    reader = FileRows(name, source)
    _tell_left_out(f"data.sources.{name}", reader.found)
    ends, end = array("q"), 0
    with (
        (folder / "text.bin").open("wb") as file,
        tqdm(desc=f"read {name}", unit="B", unit_scale=True, disable=None) as bar,
    ):
        for text in reader.rows(None):
            end += file.write(text.encode())
            bar.update(end - bar.n)
            ends.append(end)
    save_array(folder / "ends.npy", np.array(ends, dtype=np.int64))
    if reader.bad_lines:
        logger.warning("data: source %s: %d bad lines left out", name, reader.bad_lines)
    if empty := reader.without_documents:
        logger.info(
            "data: source %s: %d files hold no document, first %s",
            name,
            len(empty),
            shown(empty[0]),
        )
    (folder / "about.json").write_text(json.dumps({"bad_lines": reader.bad_lines}, allow_nan=False))


def _tell_left_out(key: str, found: FoundFiles) -> None:
    if left_out := found.left_out():
        logger.info("data: %s: %d files; left out: %s", key, len(found.files), left_out)
