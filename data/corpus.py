"""The embedded corpus: real English technical text that every machine with the trainer has.

The docstrings of installed packages, read from their source files without importing them. All
docstrings of a module make one document, so that documents are long enough for the compressed
attention branches (one by one their median is 92 tokens). Not contained: strings that do not stand
on a line of their own (templates, regular expressions), repeated docstrings, code.

The kind ``package_sources`` takes the files themselves, all those of a folder as one document: long
real text, of which a line often rests on another far before it.

``transformers`` is left out of the default packages although it has much more of such text: it is
a development dependency, and installing it between two calls must not change a run's data.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import json
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.cache import build_once, digest, save_array
from data.errors import ConfigError

_VERSION = 1  # of the extraction rules: part of the cache key
_MIN_CHARS = 120
_STDLIB = "stdlib"
_LINE_START = re.compile(r"[ \t]*[rRuU]?")


def package_key(packages: Sequence[str], whole: bool = False) -> str:
    """Hash of what the corpus is made from: rules, packages, their versions and files.

    Of a file size and times, that of its last change too, which nobody can set: where packages are
    put anew the text is extracted again, and known by its own hash from there on.
    """
    found = {name: [_version(name), *_times(name)] for name in packages}
    rules = [_VERSION, "folders"] if whole else _VERSION
    return digest({"rules": rules, "packages": found})


def _times(package: str) -> Iterator[list[Any]]:
    for name, path in _modules(package):
        stat = path.stat()
        yield [name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions by import name; Python's for ``stdlib``."""
    return {name: _version(name) for name in packages}


def embedded_documents(packages: Sequence[str], cache: Path, whole: bool = False) -> Path:
    """Extract the documents of some packages once.

    Args:
        packages: ``stdlib`` or names of installed packages.
        cache: cache folder.
        whole: whole files, a document for each folder, instead of docstrings.

    Returns:
        A folder with ``text.bin`` (UTF-8, documents end to end), ``ends.npy`` (int64, the byte
        after each document) and ``names.json`` (dotted names of modules or folders).

    Raises:
        ValueError: a package is not installed or has no docstrings.
    """
    target = cache / "corpus" / package_key(packages, whole)[:32]

    def build(folder: Path) -> None:
        names, texts = _folders(packages) if whole else _extract(packages)
        blobs = [text.encode() for text in texts]
        (folder / "text.bin").write_bytes(b"".join(blobs))
        save_array(folder / "ends.npy", np.cumsum([len(blob) for blob in blobs], dtype=np.int64))
        (folder / "names.json").write_text(json.dumps(names, allow_nan=False))

    return build_once(target, build)


def module_text(source: str, seen: set[str]) -> str:
    """The docstrings of one source file, dedented, blank lines between them.

    Args:
        source: text of a Python file.
        seen: docstrings met before, white space folded; they are left out, new ones are added.
    """
    parts = []
    for text in _docstrings(source):
        text = inspect.cleandoc(text).strip()
        folded = " ".join(text.split())
        if len(folded) >= _MIN_CHARS and folded not in seen:
            seen.add(folded)
            parts.append(text)
    return "\n\n".join(parts) + "\n" if parts else ""


def _docstrings(source: str) -> Iterator[str]:
    """Triple-quoted strings that begin a line; str.find makes this 5 times a regex's speed."""
    quotes = ('"""', "'''")
    following = [source.find(quote) for quote in quotes]
    while max(following) >= 0:
        which = min((at, i) for i, at in enumerate(following) if at >= 0)[1]
        start = following[which]
        stop = source.find(quotes[which], start + 3)
        if stop < 0:
            return
        line_start = source.rfind("\n", 0, start) + 1
        if stop - start > _MIN_CHARS and _LINE_START.fullmatch(source, line_start, start):
            yield source[start + 3 : stop]
        for i, quote in enumerate(quotes):
            if 0 <= following[i] < stop + 3:
                following[i] = source.find(quote, stop + 3)


def _extract(packages: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names and texts of all documents, sorted by package as given, then by path."""
    names: list[str] = []
    texts: list[str] = []
    seen: set[str] = set()
    for package in packages:
        before = len(texts)
        for name, path in _modules(package):
            text = module_text(path.read_text("utf-8", errors="ignore"), seen)
            if text:
                names.append(name)
                texts.append(text)
        if len(texts) == before:
            raise ConfigError(
                f"data.sources: package {package} has no docstrings in {_root(package)}"
            )
    return names, texts


def _folders(packages: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names and texts of all folders with source files, each file behind a line with its name."""
    files: dict[str, list[str]] = {}
    for package in packages:
        for name, path in _modules(package):
            text = path.read_text("utf-8", errors="ignore").strip()
            if text:
                folder = name.rpartition(".")[0] or package
                files.setdefault(folder, []).append(f"# ---- {name}\n{text}\n")
    if not files:
        raise ConfigError(f"data.sources: packages {', '.join(packages)} have no source files")
    return list(files), ["\n".join(texts) for texts in files.values()]


def _modules(package: str) -> Iterator[tuple[str, Path]]:
    root = _root(package)
    paths = [root] if root.is_file() else sorted(root.rglob("*.py"))
    base = root.parent if package != _STDLIB else root
    for path in paths:
        relative = path.relative_to(base)
        if not {"site-packages", "dist-packages"} & set(relative.parts):
            yield ".".join(relative.with_suffix("").parts), path


def _root(package: str) -> Path:
    if package == _STDLIB:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        raise ConfigError(f"data.sources: package {package} is not installed here")
    origin = Path(spec.origin)
    return origin.parent if origin.name == "__init__.py" else origin


def _version(package: str) -> str:
    """Version of a package by its import name; Python's for parts of the standard library."""
    if package in sys.stdlib_module_names or package == _STDLIB:
        return platform.python_version()
    _root(package)  # the clear error, where it is not installed
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        names = importlib.metadata.packages_distributions().get(package, [])
        return " ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
