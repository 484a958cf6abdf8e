"""From sources to token stores; every step is cached under the hash of what it depends on.

1. :class:`Corpus`: which documents of the text sources are held out (data/split.py).
2. :func:`build_tokenizer`: a byte-level BPE is trained on training documents only.
3. :func:`cached_stores`: token stores of the text sources (data/tokenise.py).

Streams are tokenised while training; stores were prepared by scripts/prepare.py.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from data.cache import build_once, cache_root, digest
from data.config import DataConfig, SourceConfig, SourceKind
from data.errors import ConfigError
from data.keyed import mix, permute
from data.near_duplicates import OverlapCounter
from data.pieces import pieces
from data.progress import progress_map
from data.sources import Documents, DocumentStream, fingerprint, open_documents
from data.split import Measured, Split, measure, read_chunks, split_documents
from data.token_store import TOKENIZER, TokenStore
from data.tokenise import FINISHED, StoreJob, write_store
from data.tokenizer import Tokenizer, deserialise, load_tokenizer, train_bpe

logger = logging.getLogger(__name__)

TRAIN_BYTES = 16 << 20  # text that a BPE is trained on, at most, over all sources
_STREAM_DOCUMENTS = 4096  # of a stream that a BPE is trained on, at most
_PART = 4096  # documents that one process reads at a time
_RULES = 3  # of splitting and tokenising: part of every cache key
_SPLIT_FIELDS = ("train", "validation", "near_duplicates", "bytes_N")


def text_sources(cfg: DataConfig) -> dict[str, SourceConfig]:
    """The sources that are tokenised as a whole: neither streams nor stores."""
    named = cfg.named_sources().items()
    return {n: s for n, s in named if s.kind is not SourceKind.store and not s.streaming}


class Corpus:
    """The text sources of a config, known by content; their files are hashed once.

    Args:
        cfg: the ``data`` section.

    Attributes:
        sources: by name.
    """

    def __init__(self, cfg: DataConfig) -> None:
        self._cfg = cfg
        self.sources = text_sources(cfg)
        self._documents: dict[str, Documents] = {}

    @cached_property
    def contents(self) -> dict[str, dict[str, Any]]:
        """What the documents of each source depend on."""
        cache_dir = self._cfg.cache_dir
        return {name: fingerprint(name, s, cache_dir) for name, s in self.sources.items()}

    @cached_property
    def key(self) -> str:
        """Hash of the text sources and of how they are split; their names and places aside."""
        v = self._cfg.validation
        rules = [_RULES, v.bytes, v.max_fraction, v.seed, v.ngram, v.max_overlap]
        return digest({"rules": rules, "sources": list(self.contents.values())})

    def documents(self, name: str) -> Documents:
        """The documents of a source, which processes may be given.

        Raises:
            ConfigError: it cannot be read.
        """
        if name not in self._documents:
            content, cache_dir = self.contents[name], self._cfg.cache_dir
            self._documents[name] = open_documents(name, self.sources[name], cache_dir, content)
        return self._documents[name]

    @cached_property
    def split(self) -> dict[str, Split]:
        """Training and validation documents of every source.

        Raises:
            ConfigError: a source cannot be read, or cannot be split.
        """
        target = cache_root(self._cfg.cache_dir) / "splits" / self.key[:24]

        def build(folder: Path) -> None:
            for number, split in enumerate(_split(self._cfg, self).values()):
                np.savez(folder / f"{number}.npz", **{f: getattr(split, f) for f in _SPLIT_FIELDS})

        folder = build_once(target, build)
        splits = {}
        for number, name in enumerate(self.sources):
            with np.load(folder / f"{number}.npz") as arrays:
                splits[name] = Split(*(arrays[f] for f in _SPLIT_FIELDS))
        return splits


def build_tokenizer(cfg: DataConfig) -> Tokenizer:
    """The tokenizer of a run, trained first if it is ``bpe`` and not cached.

    With a token store among the sources, ``bpe`` means the tokenizer of that store.

    Raises:
        ValueError: it cannot be read, or a source cannot.
    """
    if cfg.tokenizer != "bpe":
        return load_tokenizer(cfg.tokenizer)
    for name, source in cfg.named_sources().items():
        if source.kind is SourceKind.store:
            return open_store(name, source).tokenizer
    corpus, texts = Corpus(cfg), _stream_texts(cfg)
    whole = corpus.key if corpus.sources else _RULES
    key = digest({"corpus": whole, "streams": texts, "vocab_size": cfg.vocab_size})
    target = cache_root(cfg.cache_dir) / "tokenizers" / f"bpe-{cfg.vocab_size}-{key[:24]}"

    def build(folder: Path) -> None:
        logger.info("data: training a byte-level BPE of %d entries", cfg.vocab_size)
        both = itertools.chain(_tokenizer_texts(cfg, corpus), *texts)
        tokenizer = train_bpe(itertools.chain.from_iterable(map(pieces, both)), cfg.vocab_size)
        (folder / TOKENIZER).write_text(tokenizer.serialise())
        (folder / "hash").write_text(tokenizer.hash)

    path = build_once(target, build) / TOKENIZER
    tokenizer = deserialise(path.read_text(), str(path))
    expected = path.with_name("hash").read_text()
    if tokenizer.hash != expected:
        raise ConfigError(
            f"data.tokenizer=bpe: {path} is corrupt, hash {tokenizer.hash[:12]}, {expected[:12]}"
            " expected: remove it"
        )
    if tokenizer.vocab_size < cfg.vocab_size:
        logger.info(
            "data: data.vocab_size=%d, but the text has pairs for %d entries only",
            cfg.vocab_size, tokenizer.vocab_size,
        )  # fmt: skip
    return tokenizer


def open_store(name: str, source: SourceConfig) -> TokenStore:
    """The token store that a source names."""
    return TokenStore(Path(source.path).expanduser(), f"data.sources.{name}.path={source.path}")


def cached_stores(cfg: DataConfig, tokenizer: Tokenizer) -> dict[str, TokenStore]:
    """Token stores of all text sources, made first where they are not cached."""
    corpus = Corpus(cfg)
    stores = {}
    for name in corpus.sources:
        key = digest({"corpus": corpus.key, "tokenizer": tokenizer.hash})
        folder = cache_root(cfg.cache_dir) / "stores" / f"{name}-{key[:24]}"

        def build(folder: Path, name: str = name) -> None:
            logger.info("data: tokenising source %s", name)
            job = StoreJob(name, corpus.documents(name), folder)
            write_store(job, corpus.split[name], tokenizer, corpus.key, cfg.workers)

        build_once(folder, build, resume=FINISHED)
        stores[name] = TokenStore(folder, f"data.cache_dir: {folder} (remove it to make it anew)")
    return stores


def reserved_documents(stream: DocumentStream, num_bytes: int) -> list[str]:
    """The first documents of a stream that hold so many bytes: its validation documents."""
    out: list[str] = []
    held = 0
    while held < num_bytes:
        text = stream.read(len(out), 1)
        if not text:
            break
        out += text
        held += len(text[0].encode())
    return out


def _split(cfg: DataConfig, corpus: Corpus) -> dict[str, Split]:
    logger.info("data: choosing validation documents, removing near-duplicates")
    sets = {name: corpus.documents(name) for name in corpus.sources}
    measured = {}
    for name, documents in sets.items():
        parts = _parts(np.arange(len(documents)))
        job = partial(measure, documents, seed=cfg.validation.seed)
        sizes = [len(part) for part in parts]
        found = progress_map(job, parts, sizes, cfg.workers, f"measure {name}")
        measured[name] = Measured(
            np.concatenate([some.bytes_N for some in found]),
            np.concatenate([some.order_N for some in found]),
        )

    def mark(counter: OverlapCounter, name: str, index_N: np.ndarray) -> None:
        parts = _parts(index_N)
        sizes = [int(measured[name].bytes_N[part].sum()) for part in parts]
        job = partial(_mark, counter, sets[name])
        for hit in progress_map(job, parts, sizes, cfg.workers, f"compare {name}"):
            counter.merge(hit)

    return split_documents(sets, measured, cfg.validation, mark)


def _parts(index_N: np.ndarray) -> list[np.ndarray]:
    return np.array_split(index_N, max(1, math.ceil(len(index_N) / _PART)))


def _mark(counter: OverlapCounter, documents: Documents, index_N: np.ndarray) -> np.ndarray:
    for text in read_chunks(documents, index_N):
        counter.add(text)
    return counter.hit


def _tokenizer_texts(cfg: DataConfig, corpus: Corpus) -> Iterator[str]:
    """Training documents of the text sources, in keyed order, up to their share in all."""
    share = TRAIN_BYTES // len(cfg.named_sources())
    for name in corpus.sources:
        split = corpus.split[name]
        count = len(split.train)
        order = split.train[permute(np.arange(count), count, mix(1, cfg.validation.seed))]
        upto = int(np.searchsorted(np.cumsum(split.bytes_N[order]), share)) + 1
        yield from read_chunks(corpus.documents(name), order[:upto])


def _stream_texts(cfg: DataConfig) -> list[list[str]]:
    """Of every stream the first training documents, up to their share in all."""
    share = TRAIN_BYTES // len(cfg.named_sources())
    out: list[list[str]] = []
    for name, source in cfg.named_sources().items():
        if source.streaming:
            stream = DocumentStream(name, source)
            held, taken = reserved_documents(stream, cfg.validation.bytes), 0
            out.append([])
            for text in stream.each(len(held), _STREAM_DOCUMENTS):
                out[-1].append(text)
                taken += len(text.encode())
                if taken >= share:
                    break
    return out
