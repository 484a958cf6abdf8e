"""From sources to token stores; every step is cached under the hash of what it depends on.

1. :func:`corpus_split`: which documents of the text sources are held out (data/split.py).
2. :func:`build_tokenizer`: a byte-level BPE is trained on training documents only.
3. :func:`cached_stores`: token stores of the text sources (data/tokenise.py).

Streams are tokenised while training; stores were prepared by scripts/prepare_data.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data.cache import build_once, cache_root, digest
from data.config import DataConfig, SourceConfig, SourceKind
from data.errors import ConfigError
from data.keyed import mix, permute
from data.near_duplicates import OverlapCounter
from data.pieces import pieces
from data.progress import progress_map
from data.sources import DocumentStream, fingerprint, open_documents
from data.split import CHUNK, Split, byte_lengths, read_chunks, split_documents
from data.token_store import TOKENIZER, TokenStore
from data.tokenise import StoreJob, write_store
from data.tokenizer import Tokenizer, deserialise, load_tokenizer, train_bpe

logger = logging.getLogger(__name__)

TRAIN_BYTES = 16 << 20  # text that a BPE is trained on, at most, over all sources
_STREAM_DOCUMENTS = 4096  # of a stream that a BPE is trained on, at most
_PART = 16 * CHUNK  # documents that one process reads at a time
_RULES = 2  # of splitting and tokenising: part of every cache key
_SPLIT_FIELDS = ("train", "validation", "near_duplicates", "bytes_N")


def text_sources(cfg: DataConfig) -> dict[str, SourceConfig]:
    """The sources that are tokenised as a whole: neither streams nor stores."""
    named = cfg.named_sources().items()
    return {n: s for n, s in named if s.kind is not SourceKind.store and not s.streaming}


def corpus_key(cfg: DataConfig) -> str:
    """Hash of the text sources and of how they are split."""
    v = cfg.validation
    rules = [_RULES, v.bytes, v.max_fraction, v.seed, v.ngram, v.max_overlap]
    sources = {name: fingerprint(name, source) for name, source in text_sources(cfg).items()}
    return digest({"rules": rules, "sources": sources})


def corpus_split(cfg: DataConfig) -> dict[str, Split]:
    """Training and validation documents of every text source.

    Raises:
        ValueError: a source cannot be read, or cannot be split.
    """
    target = cache_root(cfg.cache_dir) / "splits" / corpus_key(cfg)[:24]

    def build(folder: Path) -> None:
        for number, split in enumerate(_split(cfg).values()):
            np.savez(folder / f"{number}.npz", **{f: getattr(split, f) for f in _SPLIT_FIELDS})

    folder = build_once(target, build)
    splits = {}
    for number, name in enumerate(text_sources(cfg)):
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
    streams = {n: fingerprint(n, s) for n, s in cfg.named_sources().items() if s.streaming}
    corpus = corpus_key(cfg) if text_sources(cfg) else cfg.validation.bytes
    key = digest({"corpus": corpus, "streams": streams, "vocab_size": cfg.vocab_size})
    target = cache_root(cfg.cache_dir) / "tokenizers" / f"bpe-{cfg.vocab_size}-{key[:24]}"

    def build(folder: Path) -> None:
        texts = _tokenizer_texts(cfg)
        logger.info("data: training a byte-level BPE of %d entries", cfg.vocab_size)
        tokenizer = train_bpe(texts, cfg.vocab_size)
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
    return tokenizer


def open_store(name: str, source: SourceConfig) -> TokenStore:
    """The token store that a source names."""
    return TokenStore(Path(source.path).expanduser(), f"data.sources.{name}.path={source.path}")


def cached_stores(cfg: DataConfig, tokenizer: Tokenizer) -> dict[str, TokenStore]:
    """Token stores of all text sources, made first where they are not cached."""
    sources = text_sources(cfg)
    if not sources:
        return {}
    corpus = corpus_key(cfg)
    key = digest({"corpus": corpus, "tokenizer": tokenizer.hash})
    stores = {}
    for name, source in sources.items():
        folder = cache_root(cfg.cache_dir) / "stores" / f"{name}-{key[:24]}"

        def build(folder: Path, name: str = name, source: SourceConfig = source) -> None:
            logger.info("data: tokenising source %s", name)
            job = StoreJob(name, source, cfg.cache_dir, folder)
            write_store(job, corpus_split(cfg)[name], tokenizer, corpus, cfg.workers)

        build_once(folder, build, resume=True)
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


def _split(cfg: DataConfig) -> dict[str, Split]:
    logger.info("data: choosing validation documents, removing near-duplicates")
    sources = text_sources(cfg)
    sets = {name: open_documents(name, s, cfg.cache_dir) for name, s in sources.items()}
    bytes_of = {}
    for name, documents in sets.items():
        parts = _parts(np.arange(len(documents)))
        job = partial(_measure, name, sources[name], cfg.cache_dir)
        sizes = [len(part) for part in parts]
        bytes_of[name] = np.concatenate(
            progress_map(job, parts, sizes, cfg.workers, f"measure {name}")
        )

    def mark(counter: OverlapCounter, name: str, index_N: np.ndarray) -> None:
        parts = _parts(index_N)
        sizes = [int(bytes_of[name][part].sum()) for part in parts]
        job = partial(_mark, counter, name, sources[name], cfg.cache_dir)
        for hit in progress_map(job, parts, sizes, cfg.workers, f"compare {name}"):
            counter.merge(hit)

    return split_documents(sets, bytes_of, cfg.validation, mark)


def _parts(index_N: np.ndarray) -> list[np.ndarray]:
    return np.array_split(index_N, max(1, math.ceil(len(index_N) / _PART)))


def _measure(name: str, source: SourceConfig, cache_dir: str, index_N: np.ndarray) -> np.ndarray:
    return byte_lengths(open_documents(name, source, cache_dir), index_N)


def _mark(
    counter: OverlapCounter, name: str, source: SourceConfig, cache_dir: str, index_N: np.ndarray
) -> np.ndarray:
    for text in read_chunks(open_documents(name, source, cache_dir), index_N):
        counter.add(text)
    return counter.hit


def _tokenizer_texts(cfg: DataConfig) -> Iterator[str]:
    """Training documents of all sources, in keyed order, up to ``TRAIN_BYTES`` in all."""
    share = TRAIN_BYTES // len(cfg.named_sources())
    sources = text_sources(cfg)
    splits = corpus_split(cfg) if sources else {}
    for name, source in sources.items():
        train = splits[name].train
        order = train[permute(np.arange(len(train)), len(train), mix(1, cfg.validation.seed))]
        upto = int(np.searchsorted(np.cumsum(splits[name].bytes_N[order]), share)) + 1
        for text in read_chunks(open_documents(name, source, cfg.cache_dir), order[:upto]):
            yield from pieces(text)
    for name, source in cfg.named_sources().items():
        if source.streaming:
            stream = DocumentStream(name, source)
            held = reserved_documents(stream, cfg.validation.bytes)
            taken = 0
            for text in stream.each(len(held), _STREAM_DOCUMENTS):
                yield from pieces(text)
                taken += len(text.encode())
                if taken >= share:
                    break
