"""Token store: tokenised documents on disk, memory-mapped, checksummed.

A folder with ``manifest.json`` (written last; without it the store does not exist), the serialised
tokenizer, training shards (``train-00000.tokens.npy`` uint16 or uint32, documents end to end, each
ended by EOS; ``train-00000.ends.npy`` int64, the position after each document), the counts of each
token id in the training text, and the validation documents: tokens, ends, text, and for each token
where it ends in its document's bytes, so that bits per byte are exact.

The manifest holds size and sha256 of every file. Sizes are checked on opening; the checksums of a
store up to ``VERIFY_BYTES`` too, those of larger ones shard by shard on first use.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.cache import digest, file_digest, save_array
from data.errors import ConfigError
from data.tokenizer import Tokenizer, deserialise

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
COUNTS = "token_counts.npy"
FORMAT = 1
VERIFY_BYTES = 1 << 30
_BLOCK = 1 << 24  # tokens hashed at a time


class TokenDocuments(Protocol):
    """Tokenised documents by index, each ended by EOS."""

    def __len__(self) -> int: ...

    def lengths(self, index_N: np.ndarray) -> np.ndarray:
        """Tokens of some documents, EOS included; int64."""
        ...

    def tokens(self, index: int, start: int, stop: int) -> np.ndarray:
        """Tokens ``start .. stop - 1`` of a document; int64."""
        ...


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest dtype that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def file_record(path: Path) -> dict[str, Any]:
    """What the manifest holds of a file."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": file_digest(path)}


def write_documents(folder: Path, stem: str, documents: list[np.ndarray], dtype: np.dtype) -> dict:
    """Write one shard.

    Args:
        folder: where.
        stem: its name, such as ``train-00000``.
        documents: ids of each document, EOS included.
        dtype: from :func:`token_dtype`.

    Returns:
        Its manifest record.
    """
    tokens = np.concatenate([np.empty(0, dtype), *documents])
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    paths = [folder / f"{stem}.tokens.npy", folder / f"{stem}.ends.npy"]
    save_array(paths[0], tokens.astype(dtype, copy=False))
    save_array(paths[1], ends)
    return {
        "stem": stem,
        "documents": len(documents),
        "tokens": len(tokens),
        "files": [file_record(path) for path in paths],
    }


def content_digest(folder: Path, records: list[dict[str, Any]]) -> str:
    """Hash of the documents of some shards: of their ids and lengths, however they are divided."""
    ids, lengths = hashlib.sha256(), hashlib.sha256()
    for record in records:
        tokens, ends = (np.load(folder / file["file"], mmap_mode="r") for file in record["files"])
        for start in range(0, len(tokens), _BLOCK):
            ids.update(tokens[start : start + _BLOCK].astype("<u4").data)
        lengths.update(np.diff(ends, prepend=0).astype("<i8").data)
    return digest([ids.hexdigest(), lengths.hexdigest()])


@dataclass(frozen=True)
class _Shard:
    tokens: np.ndarray
    ends: np.ndarray

    def span(self, local: int) -> tuple[int, int]:
        """First position and position after a document."""
        return int(self.ends[local - 1]) if local else 0, int(self.ends[local])


class StoredDocuments:
    """The documents of some shards of a store.

    Args:
        store: the store they belong to.
        records: their manifest records, in order.
    """

    def __init__(self, store: TokenStore, records: list[dict[str, Any]]) -> None:
        self._store = store
        self._records = records
        self._shards: dict[int, _Shard] = {}
        self._last = np.cumsum([record["documents"] for record in records], dtype=np.int64)
        self.num_tokens = sum(record["tokens"] for record in records)

    def __len__(self) -> int:
        return int(self._last[-1]) if len(self._last) else 0

    def lengths(self, index_N: np.ndarray) -> np.ndarray:
        """Tokens of some documents, EOS included."""
        out = np.empty(len(index_N), dtype=np.int64)
        shard_N = np.searchsorted(self._last, index_N, side="right")
        for number in np.unique(shard_N):
            chosen = shard_N == number
            local = index_N[chosen] - self._first(int(number))
            ends = self._shard(int(number)).ends
            out[chosen] = ends[local] - np.where(local > 0, ends[local - 1], 0)
        return out

    def tokens(self, index: int, start: int, stop: int) -> np.ndarray:
        """Some tokens of a document; int64."""
        shard, first, last = self._locate(index)
        return shard.tokens[first + start : min(first + stop, last)].astype(np.int64)

    def _locate(self, index: int) -> tuple[_Shard, int, int]:
        number = int(np.searchsorted(self._last, index, side="right"))
        shard = self._shard(number)
        return (shard, *shard.span(index - self._first(number)))

    def _first(self, number: int) -> int:
        return int(self._last[number - 1]) if number else 0

    def _shard(self, number: int) -> _Shard:
        if number not in self._shards:
            record = self._records[number]
            tokens, ends = (self._store.load(file) for file in record["files"])
            self._shards[number] = _Shard(tokens, np.asarray(ends))
        return self._shards[number]


class TokenStore:
    """An opened store.

    Args:
        folder: where it lies.
        key: config key and value that named it, for messages.

    Raises:
        ValueError: missing, incomplete or corrupt; names the file.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self._key = key
        self.manifest = self._read_manifest()
        self._verified: set[str] = set()
        self._check_sizes()
        if sum(record["bytes"] for record in self._files()) <= VERIFY_BYTES:
            self.verify()

    @property
    def hash(self) -> str:
        """Hash of the checksums of all files: equal for equal content, wherever it came from."""
        return digest([record["sha256"] for record in self._files()])

    @property
    def content(self) -> dict[str, str]:
        """Hashes of what is trained on (``train``) and what is held out (``validation``).

        Equal for equal documents and ids, however the shards are cut. A store from before these
        hashes has those of its files in their place.
        """
        known = self.manifest.get("content")
        if known is not None:
            return known
        held = self.manifest["validation"]
        train_files = [file for shard in self.manifest["train"] for file in shard["files"]]
        held_files = [*held["files"], *held["extra"].values()]
        return {
            "train": digest([file["sha256"] for file in train_files]),
            "validation": digest([file["sha256"] for file in held_files]),
        }

    @property
    def plan(self) -> dict[str, str]:
        """Keys of the source and the tokenizer that it was made from."""
        return self.manifest["plan"]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the store."""
        text = self.load_bytes(self.manifest["tokenizer"]["file"]).decode()
        return deserialise(text, str(self.folder / TOKENIZER))

    @cached_property
    def train(self) -> StoredDocuments:
        """Training documents."""
        return StoredDocuments(self, self.manifest["train"])

    @cached_property
    def validation(self) -> StoredDocuments:
        """Validation documents."""
        return StoredDocuments(self, [self.manifest["validation"]])

    @cached_property
    def validation_byte_ends(self) -> list[np.ndarray]:
        """For each validation document where its tokens end in its bytes."""
        ends = np.asarray(self.load(self.manifest["validation"]["files"][1]))
        return np.split(np.asarray(self.load(self._validation_file("byte_ends"))), ends)[:-1]

    @cached_property
    def validation_text(self) -> list[bytes]:
        """UTF-8 of each validation document."""
        blob = self.load_bytes(self._validation_file("text")["file"])
        ends = np.asarray(self.load(self._validation_file("text_ends"))).tolist()
        return [blob[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    @cached_property
    def token_counts(self) -> np.ndarray:
        """Occurrences of each token id in the training documents; int64 [V]."""
        return np.asarray(self.load(self.manifest["token_counts"]))

    def check_control(self, tokenizer: Tokenizer) -> None:
        """The only control token in the training documents is the one that ends each.

        Raises:
            ConfigError: text was read as control, as before version 2 of the rules it could be.
        """
        found = {i: int(self.token_counts[i]) for i in sorted(tokenizer.control_ids)}
        found[tokenizer.eos_id] -= len(self.train)
        wrong = next((i for i, times in found.items() if times), None)
        if wrong is not None:
            raise ConfigError(
                f"{self._key}: control token {wrong} stands {found[wrong]} times in its texts,"
                " which an older version took from them: prepare it again"
            )

    def load(self, record: dict[str, Any]) -> np.ndarray:
        """Memory-map one file of the manifest, verified."""
        self._verify_file(record)
        return np.load(self.folder / record["file"], mmap_mode="r", allow_pickle=False)

    def load_bytes(self, name: str) -> bytes:
        """The bytes of one file of the manifest, verified."""
        self._verify_file(next(r for r in self._files() if r["file"] == name))
        return (self.folder / name).read_bytes()

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            ValueError: the first that differs.
        """
        for record in self._files():
            self._verify_file(record)

    def _validation_file(self, name: str) -> dict[str, Any]:
        return self.manifest["validation"]["extra"][name]

    def _files(self) -> list[dict[str, Any]]:
        manifest = self.manifest
        shards = [*manifest["train"], manifest["validation"]]
        files = [file for shard in shards for file in shard["files"]]
        files += manifest["validation"]["extra"].values()
        return [*files, manifest["tokenizer"], manifest["token_counts"]]

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        if not self.folder.is_dir():
            partial = self.folder.with_name(self.folder.name + ".partial")
            hint = ": it was not finished, run prepare.py again" if partial.is_dir() else ""
            raise ConfigError(f"{self._key}: no such folder{hint}")
        if not path.is_file():
            raise ConfigError(f"{self._key}: no {MANIFEST} in it, so it is not a finished store")
        try:
            manifest = json.loads(path.read_text())
            checksum = manifest.pop("checksum")
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise ConfigError(f"{self._key}: corrupt token store: cannot read {path}") from error
        if checksum != digest(manifest):
            raise ConfigError(
                f"{self._key}: corrupt token store: {path} has checksum {digest(manifest)[:12]},"
                f" it was written with {str(checksum)[:12]}"
            )
        if manifest["format"] != FORMAT:
            raise ConfigError(f"{self._key}: format {manifest['format']}, this code reads {FORMAT}")
        return manifest

    def _check_sizes(self) -> None:
        for record in self._files():
            path = self.folder / record["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != record["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise ConfigError(
                    f"{self._key}: corrupt token store: {path} {found}, {record['bytes']} expected"
                )

    def _verify_file(self, record: dict[str, Any]) -> None:
        if record["file"] in self._verified:
            return
        found = file_digest(self.folder / record["file"])
        if found != record["sha256"]:
            raise ConfigError(
                f"{self._key}: corrupt token store: {self.folder / record['file']} has sha256"
                f" {found[:12]}, {record['sha256'][:12]} expected"
            )
        self._verified.add(record["file"])
