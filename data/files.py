"""Which files a path means, in which order; nothing here reads what is in them.

A path is taken literally where it exists, part by part, and as a glob pattern otherwise, so that
``br[1]/a*b.txt`` names the file of that name where there is one. A folder means the files below it
that have a suffix of the kind, compressed ones included; symbolic links are followed, each file
comes once. Files and folders whose names begin with a dot (``._a.jsonl``, ``.ipynb_checkpoints``)
are left out unless the path spells the dot. A file that the path names is read whatever its suffix.

The order is that of the names below the path, compared by code points: it depends neither on the
machine nor on where the folder lies.
"""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.config import SourceConfig, SourceKind, TextUnit
from data.errors import ConfigError

_COMPRESSED = ("", ".gz", ".bz2", ".xz", ".zst")
_PLAIN_SUFFIXES = {
    SourceKind.text: (".txt", ".text", ".md", ".rst"),
    SourceKind.jsonl: (".jsonl", ".ndjson", ".json"),
}
_SUFFIXES = {SourceKind.parquet: (".parquet",)} | {
    kind: tuple(plain + packed for plain in suffixes for packed in _COMPRESSED)
    for kind, suffixes in _PLAIN_SUFFIXES.items()
}
_LOOKED_AT = 10_000  # names in a folder by which its kind is told


@dataclass
class FoundFiles:
    """What a path means.

    Attributes:
        files: paths to open, in the order in which they are read.
        others: files of other kinds in the folders, by suffix.
        hidden: names in the folders that begin with a dot.
        first_other: one of the others.
    """

    files: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    first_other: str = ""

    def left_out(self) -> str:
        """The files that are not read, in words; empty where all are."""
        words = []
        if self.others:
            kinds = ", ".join(f"{suffix} {n}" for suffix, n in sorted(self.others.items()))
            words.append(f"{self.others.total()} of other kinds ({kinds}; {self.first_other})")
        if self.hidden:
            words.append(f"{self.hidden} with hidden names")
        return " and ".join(words)


def kind_of(path: Path) -> SourceKind:
    """The kind of source that a path most likely is: by the suffixes of most of its files.

    Args:
        path: a file or a folder; one that does not exist is the name of a hub dataset.
    """
    if not path.exists():
        return SourceKind.hub
    if (path / "manifest.json").is_file() and any(path.glob("tokenizer*")):
        return SourceKind.store
    files = [path] if path.is_file() else itertools.islice(path.rglob("*"), _LOOKED_AT)
    counts = Counter(
        kind for file in files for kind, ends in _SUFFIXES.items() if file.name.endswith(ends)
    )
    return counts.most_common(1)[0][0] if counts else SourceKind.text


def find_files(name: str, source: SourceConfig) -> FoundFiles:
    """The files that the path of a text, jsonl or parquet source means.

    Args:
        name: of the source, for messages.
        source: its config.

    Raises:
        ConfigError: there are none, or one is a broken link, no regular file or not readable.
    """
    return _Search(f"data.sources.{name}.path={shown(source.path)}", source).run()


def is_one_document(name: str, source: SourceConfig) -> bool:
    """Whether a source is a text file that is not divided: nothing of it can be held out.

    Raises:
        ConfigError: see :func:`find_files`.
    """
    if source.kind is not SourceKind.text or source.unit is not TextUnit.document:
        return False
    files = find_files(name, source).files
    return len(files) == 1 and os.path.getsize(files[0]) > 0


def shown(path: str) -> str:
    """A path as one printable line."""
    return path if path.isprintable() else ascii(path)


class _Search:
    """One search; remembers where it was, so that links in circles end."""

    def __init__(self, key: str, source: SourceConfig) -> None:
        self._key = key
        self._path = os.path.expanduser(source.path)
        self._kind, self._suffixes = source.kind, _SUFFIXES[source.kind]
        self._found = FoundFiles()
        self._seen: set[str] = set()  # real paths of files and folders

    def run(self) -> FoundFiles:
        """The files of the path."""
        named = sorted(self._matches("", _parts(self._path)))
        if not named:
            magic = glob.has_magic(self._path)
            raise ConfigError(
                f"{self._key}: {'no file matches' if magic else 'no such file or folder'}"
            )
        for path in named:
            real = os.path.realpath(path)
            if stat.S_ISDIR(self._mode(path)):
                self._add_folder(path, real)
            else:
                self._add(path, real)
        if not self._found.files:
            left_out = self._found.left_out() or "nothing"
            raise ConfigError(
                f"{self._key}: the folder has no {self._kinds()} file, but {left_out}"
                f"{self._how_to_read_others()}"
            )
        self._found.files.sort()
        return self._found

    def _kinds(self) -> str:
        """The suffixes that are looked for, in words."""
        if self._kind not in _PLAIN_SUFFIXES:
            return " ".join(self._suffixes)
        packed = " ".join(filter(None, _COMPRESSED))
        return f"{' '.join(_PLAIN_SUFFIXES[self._kind])} (or with {packed})"

    def _how_to_read_others(self) -> str:
        """The pattern behind the path that names the most frequent other suffix, as text."""
        if self._kind is not SourceKind.text:
            return ""
        found = [(n, suffix) for suffix, n in self._found.others.items() if suffix != "none"]
        if not found:
            return ""
        return f"; with {shown(f'/**/*{max(found)[1]}')} behind it the path names files of any kind"

    def _add(self, path: str, real: str) -> None:
        if real in self._seen:
            return
        self._seen.add(real)
        if not stat.S_ISREG(self._mode(path)):
            raise ConfigError(f"{self._key}: {shown(path)} is not a regular file")
        if not os.access(path, os.R_OK):
            raise ConfigError(f"{self._key}: no permission to read {shown(path)}")
        self._found.files.append(path)

    def _add_folder(self, folder: str, real: str) -> None:
        waiting = [(folder, real)]
        while waiting:
            folder, real = waiting.pop()
            if real in self._seen:
                continue
            self._seen.add(real)
            below = []
            for name in self._names(folder):
                path = os.path.join(folder, name)
                if name.startswith("."):
                    self._found.hidden += 1
                    continue
                own = os.path.realpath(path) if os.path.islink(path) else os.path.join(real, name)
                mode = self._mode(path)
                if stat.S_ISDIR(mode):
                    below.append((path, own))
                elif stat.S_ISREG(mode) and name.lower().endswith(self._suffixes):
                    self._add(path, own)
                else:
                    self._found.others[shown(os.path.splitext(name)[1].lower()) or "none"] += 1
                    self._found.first_other = self._found.first_other or shown(path)
            waiting += reversed(below)

    def _matches(self, base: str, parts: list[str]) -> Iterator[str]:
        """Existing paths that begin with ``base`` and go on as the parts say."""
        if not parts:
            yield base or os.curdir
            return
        part, rest = parts[0], parts[1:]
        literal = os.path.join(base, part)
        if self._exists(literal):
            yield from self._matches(literal, rest)
        elif part == "**":
            for folder in self._folders_below(base):
                yield from self._matches(folder, rest)
        elif glob.has_magic(part) and os.path.isdir(base or os.curdir):
            for name in self._names(base or os.curdir):
                hidden = name.startswith(".") and not part.startswith(".")
                path = os.path.join(base, name)
                if fnmatch.fnmatchcase(name, part) and not hidden:
                    if not rest or os.path.isdir(path):
                        yield from self._matches(path, rest)

    def _folders_below(self, base: str) -> Iterator[str]:
        """A folder and all below it; hidden ones left out, each once."""
        seen: set[str] = set()
        waiting = [base]
        while waiting:
            folder = waiting.pop()
            real = os.path.realpath(folder or os.curdir)
            if real in seen or not os.path.isdir(real):
                continue
            seen.add(real)
            yield folder
            names = [name for name in self._names(folder or os.curdir) if name[0] != "."]
            waiting += [os.path.join(folder, name) for name in reversed(names)]

    def _names(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(folder))
        except OSError as error:
            raise ConfigError(
                f"{self._key}: cannot list {shown(folder)}: {error.strerror}"
            ) from error

    def _exists(self, path: str) -> bool:
        """Whether something of this name is there, be it a broken link."""
        try:
            os.lstat(path)
        except PermissionError as error:
            raise ConfigError(f"{self._key}: no permission to look for {shown(path)}") from error
        except (OSError, ValueError):  # a ValueError: a NUL in the name
            return False
        return True

    def _mode(self, path: str) -> int:
        try:
            return os.stat(path).st_mode
        except OSError as error:
            what = "a broken link" if os.path.islink(path) else error.strerror
            raise ConfigError(f"{self._key}: {shown(path)}: {what}") from error


def _parts(path: str) -> list[str]:
    """Components of a path; the first of an absolute one is the root."""
    parts = [part for part in path.split(os.sep) if part]
    return [os.sep, *parts] if path.startswith(os.sep) else parts or [os.curdir]
