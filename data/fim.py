"""Fill-in-the-middle by whole documents, before packing (DeepSeek-V3 section 4.1; reference E).

Prefix-suffix-middle: ``<begin> prefix <hole> suffix <end> middle <eos>``, cut at two uniform token
positions. It is a rearranged view of the stored tokens, so any slice can be read alone; which
documents and where they are cut depends on a key only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.keyed import uniform
from data.token_store import TokenDocuments

EXTRA_TOKENS = 3


@dataclass(frozen=True)
class FimCut:
    """Where one document is cut.

    Attributes:
        length: tokens of the document as stored, EOS included.
        first: tokens of the prefix.
        second: tokens of prefix and middle.
    """

    length: int
    first: int
    second: int


def fim_cut(length: int, rate: float, key: int) -> FimCut | None:
    """The cut of a document, or None for the documents that stay as they are.

    Args:
        length: its tokens, EOS included.
        rate: fraction of documents that are rearranged.
        key: of this document in this epoch.
    """
    draws = uniform(key, 3)
    if draws[0] >= rate:
        return None
    first, second = sorted(int(draw * length) for draw in draws[1:])  # each 0 .. length - 1
    return FimCut(length, first, second)


def fim_tokens(
    documents: TokenDocuments,
    index: int,
    cut: FimCut,
    ids: tuple[int, int, int],
    start: int,
    stop: int,
) -> np.ndarray:
    """Tokens ``start .. stop - 1`` of the rearranged document; int64.

    Args:
        documents: where the document is stored.
        index: its index there.
        cut: from :func:`fim_cut`.
        ids: the tokens that open prefix, suffix and middle.
        start: first position in the rearranged document.
        stop: position after the last.
    """
    begin, hole, end = (np.array([i], dtype=np.int64) for i in ids)
    eos_at = cut.length - 1
    layout: list[np.ndarray | tuple[int, int]] = [
        begin, (0, cut.first), hole, (cut.second, eos_at), end, (cut.first, cut.second),
        (eos_at, cut.length),
    ]  # fmt: skip
    parts, position = [np.empty(0, np.int64)], 0
    for part in layout:
        size = len(part) if isinstance(part, np.ndarray) else part[1] - part[0]
        a, b = max(start - position, 0), min(stop - position, size)
        if a < b:
            whole = isinstance(part, np.ndarray)
            parts.append(
                part if whole else documents.tokens(index, part[0] + a, part[0] + b)  # type: ignore[arg-type]
            )
        position += size
    return np.concatenate(parts)
