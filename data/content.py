"""What the sources of a run hold, by content: equal wherever the files lie and whatever made them.

A token store is known by the checksums in its manifest. A stream is not read before it is trained
on: its files are known by size and samples of their bytes, a hub's repository by its revision.
Goes into the identity of a run (train/run_folder/identity.py).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.config import DataConfig, SourceConfig, SourceKind, ValidationConfig
from data.corpus import package_versions
from data.files import find_files
from data.hub import hub_revision
from data.token_store import TokenStore
from data.tokenizer import Tokenizer

_LIBRARIES = ("numpy", "datasets", "tokenizers")
_BLOCK, _BLOCKS = 1 << 18, 16  # bytes of a sample; samples of a file, evenly spread


def sources_content(cfg: DataConfig, stores: Mapping[str, TokenStore]) -> dict[str, Any]:
    """The content of every source.

    Args:
        cfg: the ``data`` section.
        stores: of the sources that are no streams.
    """
    return {
        name: store_content(stores[name])
        if name in stores
        else stream_content(name, source, cfg.validation)
        for name, source in cfg.named_sources().items()
    }


def tokenizer_content(tokenizer: Tokenizer) -> dict[str, Any]:
    """What fixes the meaning of ids; JSON values."""
    fim = tokenizer.fim_ids
    return {
        "hash": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "fim_ids": None if fim is None else list(fim),
    }


def library_versions(cfg: DataConfig) -> dict[str, str]:
    """Versions of what reads and tokenises text, and of the packages that are the text."""
    packages = [
        package
        for source in cfg.named_sources().values()
        if source.kind in (SourceKind.embedded, SourceKind.package_sources)
        for package in source.packages
    ]
    return package_versions(["stdlib", *_LIBRARIES, *packages])


def store_content(store: TokenStore) -> dict[str, Any]:
    """What is trained on and what is held out, by hashes, with documents and tokens of both."""
    return {
        "streamed": False,
        **store.content,
        "documents": len(store.train),
        "tokens": store.train.num_tokens,
        "validation_documents": len(store.validation),
        "validation_tokens": store.validation.num_tokens,
        "store": store.hash,  # what checkpoints knew before the two hashes above
    }


def stream_content(name: str, source: SourceConfig, validation: ValidationConfig) -> dict[str, Any]:
    """Repository and revision, or the files in their order; and what is held out of them.

    Raises:
        ValueError: there are no such files; names the key.
    """
    fields: dict[str, Any] = {
        "streamed": True,
        "held_out": [validation.bytes, validation.ngram, validation.max_overlap],
        "repository": "",
        "revision": "",
    }
    if source.kind is SourceKind.text:
        fields["unit"] = source.unit.value
    else:
        fields["text_key"] = source.text_key
    if source.kind is not SourceKind.hub:
        return fields | {"files": [file_content(file) for file in find_files(name, source).files]}
    fields |= {"subset": source.subset, "split": source.split}
    if Path(source.path).exists():
        files = sorted(p for p in Path(source.path).rglob("*") if p.is_file())
        return fields | {"files": [file_content(file) for file in files]}
    return fields | {"repository": source.path, "revision": hub_revision(source), "files": []}


def file_content(path: str | Path) -> list[Any]:
    """Size in bytes, and a hash of the whole file or, above 4 MiB, of samples of it."""
    size = os.path.getsize(path)
    found = hashlib.sha256()
    with open(path, "rb") as file:
        if size <= _BLOCK * _BLOCKS:
            found.update(file.read())
        else:
            for number in range(_BLOCKS):
                file.seek((size - _BLOCK) * number // (_BLOCKS - 1))
                found.update(file.read(_BLOCK))
    return [size, found.hexdigest()]
