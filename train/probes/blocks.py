"""Needles of ``data=recall``: the value of a key no training document has, and gists.

A document is written as in training (data/recall.py); its last block asks. The answer is one
character, whose distance is counted as in train/probes/tasks.py.
"""

from __future__ import annotations

import numpy as np

from data.keyed import mix
from data.recall import BLOCK, LETTERS, QUESTION, key, letter, pair, pairs, stretches
from data.synthetic import Writer
from data.tokenizer import Tokenizer
from train.errors import UserError
from train.probes.question import PROBE, Question

BLOCK_NEEDLES = ("pairs", "gist")
_SAMPLE = 4096  # characters from which tokens a character are estimated
_FEWER = 0.03  # by which a document that is too long is shortened


def block_needle(
    tokenizer: Tokenizer, kind: str, length: int, depth: float, seed: int, number: int
) -> Question:
    """A document of blocks that ends in an answer.

    Args:
        tokenizer: of the model.
        kind: ``pairs``: one pair among many others; ``gist``: the frequent letter of a stretch.
        length: tokens of the document, at most.
        depth: where the pair or the stretch stands; 0 = at the beginning, 1 = before the question.
        seed: of the probe.
        number: of the document in its cell.

    Raises:
        UserError: the document is too short for a block and a question.
    """
    name = mix(PROBE, seed, BLOCK_NEEDLES.index(kind), length, round(depth * 1000), number, 4)
    sample = pairs(Writer(PROBE), _SAMPLE)
    blocks = int(length * len(sample) / len(tokenizer.encode(sample)) / BLOCK)
    while blocks > 1:
        write = Writer(name)
        text, value, told = (_pair if kind == "pairs" else _gist)(write, blocks, depth)
        ids_N, byte_ends_N = tokenizer.encode_with_byte_ends(text + value)
        if len(ids_N) <= length:
            begin = int(np.searchsorted(byte_ends_N, len(text), side="right"))
            source = int(np.searchsorted(byte_ends_N, told, side="right"))
            return Question(ids_N, begin, begin - 1 - source, 1 / len(LETTERS))
        blocks = min(blocks - 1, int(blocks * (1 - _FEWER)))
    raise UserError(f"a needle of {kind} does not fit a document of {length} tokens")


def block_document(tokenizer: Tokenizer, kind: str, length: int, seed: int) -> np.ndarray:
    """A document that asks nothing in particular, so many tokens at most; int64."""
    return block_needle(tokenizer, kind, length, 0.0, seed, -1).ids_N


def _pair(write: Writer, blocks: int, depth: float) -> tuple[str, str, int]:
    """Text up to the answer, the answer, and the character from which it can be read."""
    name, value = key(write, held_out=True), letter(write)
    text = pairs(write, (blocks - 1) * BLOCK)
    at = round((blocks - 2) * depth) * BLOCK
    text = text[:at] + pair(name, value) + text[at + BLOCK :] + name
    return text, value, at + len(name)


def _gist(write: Writer, blocks: int, depth: float) -> tuple[str, str, int]:
    frequent = letter(write)
    text, end = stretches(write, blocks - 1, depth, frequent)
    return text + QUESTION, frequent, end - 1
