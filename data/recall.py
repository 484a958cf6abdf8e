"""Documents in which everything hangs on far dependencies: pairs to be found, gists to be felt.

The words of data/synthetic.py take a model hours to spell; these documents are the same question in
single characters, so that a model of minutes learns to answer it. All text comes in blocks of four
characters, the ratio of CSA, so that with plain bytes an entry may hold one block.

``pairs``: every block names a key of two signs and its value, one letter: ``3#K ``. A key comes
again with the same value, anywhere behind; from its second time on the value can be known, and only
from there. One of eight pairs of signs is never a key of training documents: the probes ask for
those, so a key that is asked for was never seen, while both of its signs were.

``gist``: sections of letters, all as frequent but for one stretch, half of the section, in which
one of them comes more often; at a section's end ``?x  ``, x being that letter. No single place
tells it: what was read since the last question must be weighed together.
"""

from __future__ import annotations

import string
from typing import Protocol

SIGNS = string.digits + string.punctuation.replace("?", "")
LETTERS = string.ascii_letters
BLOCK = 4  # characters
QUESTION = "?"  # before the answer of a gist
_HELD_OUT = 8  # one of so many keys is never trained on
_AGAIN = 0.6  # of the blocks name a key that was named before
_FREQUENT = 0.25  # how often a letter of a gist is the frequent one beyond its fair share
_TOLD = 0.5  # share of the blocks of a section in which it is
_SHORTEST = 4  # blocks of a section of a gist


class Draws(Protocol):
    """Where numbers come from: ``data.synthetic.Writer``."""

    def draw(self) -> float:
        """A number in [0, 1)."""
        ...

    def below(self, count: int) -> int:
        """A whole number below ``count``."""
        ...


def key(draws: Draws, held_out: bool) -> str:
    """A key that training documents have, or one that they never have."""
    n = len(SIGNS)
    while True:
        first, second = draws.below(n), draws.below(n)
        if ((first + second) % _HELD_OUT == 0) == held_out:
            return SIGNS[first] + SIGNS[second]


def letter(draws: Draws) -> str:
    """Any of the values."""
    return LETTERS[draws.below(len(LETTERS))]


def pair(name: str, value: str) -> str:
    """A block of ``pairs``."""
    return f"{name}{value} "


def pairs(draws: Draws, length: int) -> str:
    """Blocks of keys and values, at least one, up to ``length`` characters."""
    known: dict[str, str] = {}
    order: list[str] = []
    most = len(SIGNS) ** 2 // 2  # keys of a document: new ones are found by trying
    for _ in range(max(1, length // BLOCK)):
        if known and (draws.draw() < _AGAIN or len(known) >= most):
            name = list(known)[draws.below(len(known))]
        else:
            name = key(draws, held_out=False)
            known.setdefault(name, letter(draws))
        order.append(name)
    return "".join(pair(name, known[name]) for name in order)


def gist(draws: Draws, length: int) -> str:
    """Sections of letters, each with its question and answer, up to ``length`` characters.

    Their lengths are as often short as long (log-uniform up to what is left), so that questions
    which are easily answered are there to begin with.
    """
    text, left = "", max(_SHORTEST, length // BLOCK)
    while left >= _SHORTEST:
        blocks = min(left, int(_SHORTEST * ((left + 1) / _SHORTEST) ** draws.draw()))
        frequent = letter(draws)
        told, _ = stretches(draws, blocks - 1, draws.draw(), frequent)
        text += f"{told}{QUESTION}{frequent}  "
        left -= blocks
    return text


def stretches(draws: Draws, blocks: int, depth: float, frequent: str) -> tuple[str, int]:
    """The letters of a gist, and how many of them stand before the end of its stretch.

    Args:
        draws: numbers.
        blocks: of four letters.
        depth: where the stretch lies; 0 = at the beginning, 1 = before the question.
        frequent: its letter.
    """
    letters = blocks * BLOCK
    told = int(letters * _TOLD)
    start = round((letters - told) * depth)
    text = [
        frequent if start <= place < start + told and draws.draw() < _FREQUENT else letter(draws)
        for place in range(letters)
    ]
    return "".join(text), start + told
