"""Which documents are held out for validation.

Whole documents in the order of a keyed hash of their text, until enough text is held out: a text is
held out wherever it lies and whatever its source is called. Those whose shingles stand in the
training text too (near-duplicates) go; they are not trained on either. Then the same again with
more candidates if too little is left. All together they are ``max_fraction`` of the text at most.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from data.config import ValidationConfig
from data.errors import ConfigError
from data.near_duplicates import OverlapCounter
from data.sources import Documents

logger = logging.getLogger(__name__)

_SPARE = 1.25  # candidates beyond the target, for the near-duplicates among them


@dataclass(frozen=True)
class Split:
    """Document indices of one source.

    Attributes:
        train: ascending; empty texts are in neither list.
        validation: in the order in which they were chosen.
        near_duplicates: candidates that the training text repeats.
        bytes_N: UTF-8 bytes of every document, 0 of those of white space only.
    """

    train: np.ndarray
    validation: np.ndarray
    near_duplicates: np.ndarray
    bytes_N: np.ndarray


Mark = Callable[[OverlapCounter, str, np.ndarray], None]


def read_chunks(documents: Documents, index_N: np.ndarray) -> Iterator[str]:
    """Texts of some documents, one after the other."""
    for start in range(0, len(index_N), documents.at_once):
        yield from documents.texts(index_N[start : start + documents.at_once])


@dataclass(frozen=True)
class Measured:
    """What the choice looks at.

    Attributes:
        bytes_N: UTF-8 bytes of each document, 0 of those of white space only.
        order_N: uint64, a hash of its text and of ``data.validation.seed``.
    """

    bytes_N: np.ndarray
    order_N: np.ndarray


def measure(documents: Documents, index_N: np.ndarray, seed: int) -> Measured:
    """Look at some documents.

    Args:
        documents: of a source.
        index_N: which.
        seed: ``data.validation.seed``.
    """
    key = hashlib.sha256(str(seed).encode()).digest()
    bytes_N = np.zeros(len(index_N), dtype=np.int64)
    order_N = np.zeros(len(index_N), dtype=np.uint64)
    for place, text in enumerate(read_chunks(documents, index_N)):
        if text.strip():
            blob = text.encode()
            mark = hashlib.blake2b(blob, digest_size=8, key=key).digest()
            bytes_N[place], order_N[place] = len(blob), int.from_bytes(mark, "little")
    return Measured(bytes_N, order_N)


def split_documents(
    sets: dict[str, Documents],
    measured: dict[str, Measured],
    cfg: ValidationConfig,
    mark: Mark,
) -> dict[str, Split]:
    """Split every source; near-duplicates are looked for in the training text of all of them.

    Args:
        sets: documents by source.
        measured: every document, by source.
        cfg: ``data.validation``.
        mark: ``mark(counter, name, index_N)`` adds the documents of a source to the counter.

    Raises:
        ValueError: a source has no text, or none is left to validate on or to train on.
    """
    bytes_of = {name: about.bytes_N for name, about in measured.items()}
    for name, sizes in bytes_of.items():
        if not sizes.any():
            raise ConfigError(f"data.sources.{name}: none of {len(sizes)} documents has any text")
    limits = {n: int(cfg.max_fraction * int(bytes_of[n].sum())) for n in sets}
    targets = {n: min(cfg.bytes, limits[n]) for n in sets}
    wanted = {n: min(int(targets[n] * _SPARE), limits[n]) for n in sets}
    while True:
        chosen = {n: _candidates(measured[n], wanted[n], limits[n]) for n in sets}
        splits = _without_duplicates(sets, bytes_of, chosen, cfg, mark)
        more = {n: _candidates_needed(splits[n], targets[n], wanted[n], limits[n]) for n in sets}
        if more == wanted:
            break
        wanted = more
    for name, split in splits.items():
        _check(name, split, targets[name], cfg)
    return splits


def _candidates(about: Measured, wanted: int, limit: int) -> np.ndarray:
    """Indices in order until they hold the wanted bytes; those that would go over the limit not."""
    chosen: list[int] = []
    held = 0
    for index in np.argsort(about.order_N, kind="stable").tolist() if wanted else ():
        size = int(about.bytes_N[index])
        if 0 < size <= limit - held:
            chosen.append(index)
            held += size
            if held >= wanted:
                break
    return np.array(chosen, dtype=np.int64)


def _candidates_needed(split: Split, target: int, wanted: int, limit: int) -> int:
    """Bytes of candidates for the next round: as before when enough is held out or none is left."""
    missing = target - int(split.bytes_N[split.validation].sum())
    return wanted if missing <= 0 else min(wanted + max(2 * missing, wanted), limit)


def _without_duplicates(
    sets: dict[str, Documents],
    bytes_of: dict[str, np.ndarray],
    chosen: dict[str, np.ndarray],
    cfg: ValidationConfig,
    mark: Mark,
) -> dict[str, Split]:
    train = {n: np.setdiff1d(np.flatnonzero(bytes_of[n]), chosen[n]) for n in sets}
    texts = [text for n in sets for text in read_chunks(sets[n], chosen[n])]
    counter = OverlapCounter(texts, cfg.ngram)
    if texts and cfg.max_overlap < 1:
        for name in sets:
            mark(counter, name, train[name])
    overlap = np.array(counter.overlaps())
    splits, first = {}, 0
    for name in sets:
        mine = overlap[first : first + len(chosen[name])]
        first += len(mine)
        repeated = mine > cfg.max_overlap
        splits[name] = Split(
            train[name], chosen[name][~repeated], chosen[name][repeated], bytes_of[name]
        )
    return splits


def _check(name: str, split: Split, target: int, cfg: ValidationConfig) -> None:
    total = len(split.bytes_N)
    if len(split.train) == 0:
        raise ConfigError(
            f"data.sources.{name}: no documents to train on: of {total} document(s) all are held"
            f" out (data.validation.max_fraction={cfg.max_fraction})"
        )
    if cfg.bytes and len(split.validation) == 0:
        raise ConfigError(
            f"data.sources.{name}: no validation documents: data.validation.bytes={cfg.bytes} but"
            f" of {total} document(s) none can be held out: {len(split.near_duplicates)} repeat"
            f" training text, the others are more than data.validation.max_fraction="
            f"{cfg.max_fraction} of its {int(split.bytes_N.sum())} bytes;"
            " data.validation.bytes=0 trains without validation, files of kind=text can be divided"
            f" by data.sources.{name}.unit=paragraph"
        )
    held = int(split.bytes_N[split.validation].sum())
    logger.info(
        "data: source %s: %d training documents, %d validation documents with %d bytes, %d"
        " near-duplicates removed",
        name, len(split.train), len(split.validation), held, len(split.near_duplicates),
    )  # fmt: skip
    if held < target:
        logger.warning(
            "data: source %s: %d bytes of validation text, %d were wanted", name, held, target
        )
