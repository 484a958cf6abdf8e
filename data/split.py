"""Which documents are held out for validation.

Whole documents, chosen by a keyed permutation of their indices, until enough text is held out.
Those whose shingles stand in the training text too (near-duplicates) go; they are not trained on
either. Then the same again with more candidates if too little is left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from data.config import ValidationConfig
from data.errors import ConfigError
from data.keyed import mix, permute
from data.near_duplicates import OverlapCounter
from data.sources import Documents

logger = logging.getLogger(__name__)

CHUNK = 256  # documents looked at at a time
_SPARE = 1.25  # candidates beyond the target, for the near-duplicates among them


@dataclass(frozen=True)
class Split:
    """Document indices of one source.

    Attributes:
        train: ascending; empty texts are in neither list.
        validation: in the order in which they were chosen.
        near_duplicates: candidates that the training text repeats.
        bytes_N: UTF-8 bytes of every document.
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


def byte_lengths(documents: Documents, index_N: np.ndarray) -> np.ndarray:
    """UTF-8 bytes of some documents; 0 for those of white space only."""
    sizes = (len(t.encode()) if t.strip() else 0 for t in read_chunks(documents, index_N))
    return np.fromiter(sizes, dtype=np.int64, count=len(index_N))


def split_documents(
    sets: dict[str, Documents],
    bytes_of: dict[str, np.ndarray],
    cfg: ValidationConfig,
    mark: Mark,
) -> dict[str, Split]:
    """Split every source; near-duplicates are looked for in the training text of all of them.

    Args:
        sets: documents by source.
        bytes_of: bytes of each document, by source.
        cfg: ``data.validation``.
        mark: ``mark(counter, name, index_N)`` adds the documents of a source to the counter.

    Raises:
        ValueError: a source has no text, or none is left to validate on or to train on.
    """
    for name, sizes in bytes_of.items():
        if not sizes.any():
            raise ConfigError(f"data.sources.{name}: none of {len(sizes)} documents has any text")
    targets = {n: min(cfg.bytes, cfg.max_fraction * int(bytes_of[n].sum())) for n in sets}
    wanted = {name: target * _SPARE for name, target in targets.items()}
    while True:
        chosen = {n: _candidates(n, bytes_of[n], wanted[n], cfg) for n in sets}
        splits = _without_duplicates(sets, bytes_of, chosen, cfg, mark)
        more = {n: _candidates_needed(splits[n], targets[n], wanted[n], cfg) for n in sets}
        if more == wanted:
            break
        wanted = more
    for name, split in splits.items():
        _check(name, split, targets[name], cfg)
    return splits


def _candidates(name: str, sizes: np.ndarray, wanted: float, cfg: ValidationConfig) -> np.ndarray:
    """Indices in keyed order until they hold the wanted bytes; the smallest if none fits."""
    chosen: list[int] = []
    held, limit = 0, max(cfg.max_fraction * int(sizes.sum()), wanted)
    key = mix(cfg.seed, *name.encode())
    for start in range(0, len(sizes), CHUNK):
        if held >= wanted:
            break
        index_N = np.arange(start, min(start + CHUNK, len(sizes)))
        for index in permute(index_N, len(sizes), key).tolist():
            size = int(sizes[index])
            if 0 < size <= limit - held and held < wanted:
                chosen.append(index)
                held += size
    filled = np.flatnonzero(sizes)
    if wanted > 0 and not chosen and len(filled) > 1:
        chosen.append(int(filled[np.argmin(sizes[filled])]))
    return np.array(chosen, dtype=np.int64)


def _candidates_needed(split: Split, target: float, wanted: float, cfg: ValidationConfig) -> float:
    """Bytes of candidates for the next round: as before when enough is held out or none is left."""
    missing = target - int(split.bytes_N[split.validation].sum())
    limit = max(wanted, cfg.max_fraction * int(split.bytes_N.sum()))
    return wanted if missing <= 0 else min(wanted + 2 * missing, limit)


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


def _check(name: str, split: Split, target: float, cfg: ValidationConfig) -> None:
    total = len(split.bytes_N)
    if len(split.train) == 0:
        raise ConfigError(
            f"data.sources.{name}: no documents to train on: of {total} document(s) all are held"
            f" out (data.validation.max_fraction={cfg.max_fraction})"
        )
    if cfg.bytes and len(split.validation) == 0:
        raise ConfigError(
            f"data.sources.{name}: no validation documents: data.validation.bytes={cfg.bytes} but"
            f" of {total} document(s) none can be held out ({len(split.near_duplicates)} repeat"
            " training text); data.validation.bytes=0 trains without validation, files of kind=text"
            f" can be divided by data.sources.{name}.unit=paragraph"
        )
    held = int(split.bytes_N[split.validation].sum())
    logger.info(
        "data: source %s: %d training documents, %d validation documents with %d bytes, %d"
        " near-duplicates removed",
        name, len(split.train), len(split.validation), held, len(split.near_duplicates),
    )  # fmt: skip
    if held < int(target):
        logger.warning(
            "data: source %s: %d bytes of validation text, %d were wanted", name, held, target
        )
