"""What a source holds: sizes, lengths, duplicates, scripts, strings of control tokens."""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.sources import Documents
from data.split import read_chunks
from data.token_store import StoredDocuments, TokenStore
from data.tokenizer import Tokenizer

QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
_LOOKED_AT = 2000  # characters of a document by which its scripts are told
_SHOWN = 5  # scripts


@dataclass(frozen=True)
class Summary:
    """Of all documents of a source, held-out ones included.

    Attributes:
        documents: that hold text.
        empty: that hold none, and are left out.
        bytes: of text, UTF-8.
        tokens: one at the end of each document included.
        lengths: tokens of a document at each of :data:`QUANTILES`.
        repeated: documents whose whole text came before.
        longest: number of the longest document, its bytes, and its first words.
        scripts: share of the letters by script, as Unicode names it; of each document's beginning.
        control: strings of the tokenizer's control tokens that stand in the text, with how many
            documents; they are read as plain text.
    """

    documents: int
    empty: int
    bytes: int
    tokens: int
    lengths: tuple[int, ...]
    repeated: int
    longest: tuple[int, int, str]
    scripts: dict[str, float]
    control: dict[str, int]

    def lines(self) -> Iterator[str]:
        """The summary, as one reads it."""
        yield f"documents   {self.documents:,} with text, {self.empty:,} empty"
        yield f"text        {self.bytes:,} bytes, {self.tokens:,} tokens"
        yield f"            {self.bytes / max(1, self.tokens):.2f} bytes a token"
        told = ", ".join(
            f"{quantile:.0%} {length:,}"
            for quantile, length in zip(QUANTILES, self.lengths, strict=True)
        )
        yield f"lengths     tokens at {told}"
        yield f"repeated    {self.repeated:,} documents whose whole text came before"
        number, size, begin = self.longest
        yield f"longest     document {number:,}, {size:,} bytes: {begin!r}"
        shares = sorted(self.scripts.items(), key=lambda item: -item[1])
        named = ", ".join(f"{script} {share:.1%}" for script, share in shares[:_SHOWN])
        yield f"scripts     {named or 'no letters'}"
        found = ", ".join(f"{text!r} in {count:,}" for text, count in self.control.items())
        yield f"control     {found or 'no string of a control token'}"


def summarise(documents: Documents, store: TokenStore, tokenizer: Tokenizer) -> Summary:
    """Read every document once.

    Args:
        documents: of the source.
        store: made of them.
        tokenizer: that made it.
    """
    seen: set[bytes] = set()
    letters: Counter[str] = Counter()
    control = dict.fromkeys(control_strings(tokenizer), 0)
    total = empty = repeated = 0
    longest = (0, 0, "")
    for number, text in enumerate(read_chunks(documents, np.arange(len(documents)))):
        if not text.strip():
            empty += 1
            continue
        blob = text.encode()
        total += len(blob)
        mark = hashlib.blake2b(blob, digest_size=16).digest()
        repeated += mark in seen
        seen.add(mark)
        if len(blob) > longest[1]:
            longest = (number, len(blob), " ".join(text[:200].split())[:60])
        letters.update(filter(None, map(script_of, text[:_LOOKED_AT])))
        for string in control:
            control[string] += string in text
    lengths = np.concatenate([_lengths(store.train), _lengths(store.validation)])
    quantiles = np.quantile(lengths, QUANTILES, method="lower") if len(lengths) else [0] * 6
    counted = max(1, letters.total())
    return Summary(
        documents=len(documents) - empty,
        empty=empty,
        bytes=total,
        tokens=int(lengths.sum()),
        lengths=tuple(int(length) for length in quantiles),
        repeated=repeated,
        longest=longest,
        scripts={script: count / counted for script, count in letters.items()},
        control={string: count for string, count in control.items() if count},
    )


def control_strings(tokenizer: Tokenizer) -> list[str]:
    """How the control tokens of a tokenizer are written."""
    written = json.loads(tokenizer.serialise()).get("tokenizer", {})
    return [
        token["content"]
        for token in written.get("added_tokens", [])
        if token["id"] in tokenizer.control_ids
    ]


@functools.cache
def script_of(character: str) -> str:
    """The script of a letter, ``latin`` or ``cjk``, from its Unicode name; empty: it is none."""
    if not character.isalpha():
        return ""
    return unicodedata.name(character, "unnamed").split()[0].lower()


def _lengths(part: StoredDocuments) -> np.ndarray:
    return part.lengths(np.arange(len(part)))
