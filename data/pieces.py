"""Encoding in bounded memory: long documents in pieces whose ids, joined, are those of the whole.

The library ``tokenizers`` needs some 130 bytes for each byte that it encodes at a time. A document
may be cut where the tokenizer splits it anyway, before a merge could reach over the place:

* before the one space between two ASCII letters, and
* behind a line feed between two characters that are not white space.

Each of the pre-tokenizers in :data:`_KNOWN_SPLITS` splits at both, whatever stands around, and none
looks further ahead than the run of white space that it is in. Where a tokenizer is made of anything
else, or a document has no such place, it is encoded whole, and if it is long a warning says so.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from data.token_store import token_dtype
from data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

PIECE = 1 << 16  # characters of a piece, about
_TOGETHER = 1 << 20  # characters that are encoded at a time, in threads
_LONG = 8 << 20  # characters that are worth a warning when they cannot be cut
_CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=\S\n)(?=\S)")
_KNOWN_SPLITS = (  # regular expressions, line ends escaped
    # DeepSeek-V3 and V4: these three, one after the other
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # cl100k, Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen 2 and 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
)
_KNOWN_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD"}


class PieceEncoder:
    """Encodes documents with bounded memory.

    Args:
        tokenizer: makes the ids.
        piece: characters of a piece, about.
    """

    def __init__(self, tokenizer: Tokenizer, piece: int = PIECE) -> None:
        self._tokenizer = tokenizer
        self._piece = piece
        self._cuts = _may_be_cut(tokenizer)
        self._eos = np.array([tokenizer.eos_id], token_dtype(tokenizer.vocab_size))
        self._told = False

    def documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Ids of each text and EOS, in the smallest dtype."""
        waiting: list[tuple[str, bool]] = []  # pieces, and whether a document ends with each
        parts: list[np.ndarray] = []
        size = 0
        for text in texts:
            for piece, last in self._pieces(text):
                waiting.append((piece, last))
                size += len(piece)
                if size >= _TOGETHER:
                    yield from self._encoded(waiting, parts)
                    waiting, size = [], 0
        yield from self._encoded(waiting, parts)

    def with_byte_ends(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`Tokenizer.encode_with_byte_ends`."""
        ids, ends, before = [], [], 0
        for piece, _ in self._pieces(text):
            id_T, end_T = self._tokenizer.encode_with_byte_ends(piece)
            ids.append(id_T)
            ends.append(end_T + before)
            before += len(piece.encode())
        return np.concatenate(ids), np.concatenate(ends)

    def _encoded(
        self, waiting: list[tuple[str, bool]], parts: list[np.ndarray]
    ) -> Iterator[np.ndarray]:
        """Documents that end among the pieces; ``parts`` keeps what has begun."""
        ids = self._tokenizer.encode_batch([piece for piece, _ in waiting])
        for (_, last), id_T in zip(waiting, ids, strict=True):
            parts.append(id_T.astype(self._eos.dtype))
            if last:
                yield np.concatenate([*parts, self._eos])
                parts.clear()

    def _pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """Pieces of a text, and whether each is the last."""
        length = 0
        for piece in pieces(text, self._piece) if self._cuts else (text,):
            self._tell(len(piece))
            length += len(piece)
            yield piece, length == len(text)

    def _tell(self, length: int) -> None:
        if length >= _LONG and not self._told:
            self._told = True
            why = "data.tokenizer is of an unknown kind" if not self._cuts else "it has no cut"
            logger.warning(
                "data: a text of %d characters is encoded at once, which needs some %d MB: %s",
                length, length * 130 >> 20, why,
            )  # fmt: skip


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """A text in pieces of at least so many characters, cut where a known tokenizer splits it.

    No word is cut, and a byte-level BPE that is trained on the pieces is that of the text.
    """
    start = 0
    while (found := _CUT.search(text, start + size)) is not None:
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def _may_be_cut(tokenizer: Tokenizer) -> bool:
    fields = json.loads(tokenizer.serialise())
    if fields["type"] == "byte":
        return True
    inner: dict[str, Any] = fields["tokenizer"]
    normalizers = _steps(inner["normalizer"], "normalizers")
    known = all(step["type"] in _KNOWN_NORMALIZERS for step in normalizers)
    return known and _splits(_steps(inner["pre_tokenizer"], "pretokenizers"))


def _steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The parts of a sequence, flat."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step[key] for inner in _steps(part, key)]


def _splits(steps: list[dict[str, Any]]) -> bool:
    """Whether pre-tokenizers are known, and one of them splits at white space."""
    whole = False
    for step in steps:
        if step["type"] == "ByteLevel":
            if step["add_prefix_space"]:
                return False
            whole |= step["use_regex"]
        elif step["type"] == "Split":
            pattern = step["pattern"].get("Regex", "").replace("\r", r"\r").replace("\n", r"\n")
            if pattern not in _KNOWN_SPLITS or step["behavior"] != "Isolated" or step["invert"]:
                return False
            whole |= r"\s+(?!\S)" in pattern
        elif step["type"] != "Digits":
            return False
    return whole
