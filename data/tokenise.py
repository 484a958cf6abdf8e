"""Write a token store: training documents in shards, validation documents with their text.

Shards are made by one process or several and are the unit of resuming: one that was finished is
not made again after a kill. The manifest comes last (data/token_store.py has the format).
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.cache import digest, save_array
from data.errors import ConfigError
from data.pieces import PieceEncoder
from data.progress import progress_map
from data.sources import Documents
from data.split import Split, read_chunks
from data.token_store import (
    COUNTS,
    FORMAT,
    MANIFEST,
    TOKENIZER,
    content_digest,
    file_record,
    token_dtype,
    write_documents,
)
from data.tokenizer import Tokenizer, deserialise

SHARD_BYTES = 16 << 20  # text of a shard
FINISHED = "train-*.json"  # each a shard's record, its last file
_COUNTED = 1 << 22  # tokens that are counted at a time


@dataclass(frozen=True)
class StoreJob:
    """What a process needs to open one text source and write a part of its store.

    Attributes:
        name: of the source.
        documents: its texts.
        folder: the store, unfinished.
    """

    name: str
    documents: Documents
    folder: Path


def write_store(
    job: StoreJob,
    split: Split,
    tokenizer: Tokenizer,
    corpus: str,
    workers: int,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Tokenise one text source into a folder; what an earlier call finished there is kept.

    Args:
        job: the source, and the existing folder, which gets the manifest last.
        split: training and validation documents.
        tokenizer: makes the ids.
        corpus: key of the source and its split.
        workers: processes.
        shard_bytes: text of a shard, about.

    Raises:
        ValueError: the folder holds the beginnings of another store.
    """
    folder = job.folder
    plan = {"corpus": corpus, "source": job.name, "tokenizer": tokenizer.hash}
    plan["shard_bytes"] = str(shard_bytes)
    _check_plan(folder, plan)
    (folder / TOKENIZER).write_text(tokenizer.serialise())
    size_N = split.bytes_N[split.train]
    ranges = _shard_ranges(size_N, shard_bytes)
    records = progress_map(
        partial(_write_shard, job),
        [(number, split.train[a:b]) for number, (a, b) in enumerate(ranges)],
        [int(size_N[a:b].sum()) for a, b in ranges],
        workers,
        f"tokenise {job.name}",
    )
    save_array(folder / COUNTS, _count_tokens(folder, records, tokenizer.vocab_size))
    documents = job.documents
    validation = write_validation(folder, documents.texts(split.validation), tokenizer)
    held_text = [content_digest(folder, [validation]), validation["extra"]["text"]["sha256"]]
    manifest = {
        "format": FORMAT,
        "plan": plan,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_hash": tokenizer.hash,
        "content": {"train": content_digest(folder, records), "validation": digest(held_text)},
        "train": records,
        "validation": validation,
        "near_duplicates_removed": len(split.near_duplicates),
        "bad_lines_left_out": documents.bad_lines,
        "tokenizer": file_record(folder / TOKENIZER),
        "token_counts": file_record(folder / COUNTS),
    }
    text = json.dumps(manifest | {"checksum": digest(manifest)}, indent=1, allow_nan=False)
    _publish(folder / MANIFEST, text)


def write_validation(folder: Path, texts: list[str], tokenizer: Tokenizer) -> dict[str, Any]:
    """Write validation documents into a folder; returns their manifest record."""
    ids, byte_ends = encode_validation(texts, tokenizer)
    blobs = [text.encode() for text in texts]
    record = write_documents(folder, "validation", ids, token_dtype(tokenizer.vocab_size))
    flat_ends = np.concatenate([np.empty(0, np.int64), *byte_ends])
    save_array(folder / "validation.byte_ends.npy", flat_ends)
    save_array(
        folder / "validation.text_ends.npy", np.cumsum([len(b) for b in blobs], dtype=np.int64)
    )
    (folder / "validation.text.bin").write_bytes(b"".join(blobs))
    record["extra"] = {
        "byte_ends": file_record(folder / "validation.byte_ends.npy"),
        "text_ends": file_record(folder / "validation.text_ends.npy"),
        "text": file_record(folder / "validation.text.bin"),
    }
    return record


def encode_validation(
    texts: list[str], tokenizer: Tokenizer
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ids of each document with EOS, and where each token ends in the document's UTF-8 bytes."""
    encoder = PieceEncoder(tokenizer)
    ids, byte_ends = [], []
    for text in texts:
        id_T, end_T = encoder.with_byte_ends(text)
        ids.append(np.append(id_T, tokenizer.eos_id))
        byte_ends.append(np.append(end_T, len(text.encode())))
    return ids, byte_ends


def _check_plan(folder: Path, plan: dict[str, str]) -> None:
    path = folder / "plan.json"
    if path.is_file():
        found = json.loads(path.read_text())
        for key, value in plan.items():
            if found.get(key) != value:
                raise ConfigError(
                    f"{folder} holds the beginnings of another store ({key}"
                    f" {str(found.get(key))[:12]}, not {value[:12]}): remove it or name another"
                )
    _publish(path, json.dumps(plan, allow_nan=False))


def _publish(path: Path, text: str) -> None:
    partial_path = path.with_name(path.name + ".partial")
    partial_path.write_text(text)
    partial_path.rename(path)


def _shard_ranges(size_N: np.ndarray, shard_bytes: int) -> list[tuple[int, int]]:
    """Consecutive runs of documents of about so many bytes each."""
    number_N = (np.cumsum(size_N) - 1) // shard_bytes
    starts = [0, *(np.flatnonzero(np.diff(number_N)) + 1).tolist(), len(size_N)]
    return list(itertools.pairwise(starts))


def _write_shard(job: StoreJob, item: tuple[int, np.ndarray]) -> dict[str, Any]:
    number, index_N = item
    stem = f"train-{number:05d}"
    done = job.folder / f"{stem}.json"
    if done.is_file():
        return json.loads(done.read_text())
    path = job.folder / TOKENIZER
    tokenizer = deserialise(path.read_text(), str(path))
    documents = job.documents
    ids = list(PieceEncoder(tokenizer).documents(read_chunks(documents, index_N)))
    record = write_documents(job.folder, stem, ids, token_dtype(tokenizer.vocab_size))
    _publish(done, json.dumps(record, allow_nan=False))
    return record


def _count_tokens(folder: Path, records: list[dict[str, Any]], vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for record in records:
        tokens = np.load(folder / record["files"][0]["file"], mmap_mode="r")
        for start in range(0, len(tokens), _COUNTED):
            counts += np.bincount(tokens[start : start + _COUNTED], minlength=vocab_size)
    return counts
