"""Documents with far dependencies, written from a seed: keys, copies and tables among filler.

What is stated once is asked for again, anywhere behind it in the same document, so that reading a
whole document pays and a window does not suffice. Words are made of syllables: a key is one of a
million, a value one of ten thousand, so nothing is known by heart and guessing is hopeless. The
probes (train/probes) ask in the same words with keys of another seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from data import recall
from data.config import SourceConfig, Task
from data.keyed import mix, uniform

VERSION = 1  # of the rules by which documents are written: part of what is cached
KEY_SYLLABLES, VALUE_SYLLABLES = 3, 2
NUM_VALUES = 100**VALUE_SYLLABLES
_SYLLABLES = [c + v for c in "bdfgklmnprstvzhjcwyx" for v in "aeiou"]
_FILLER = (
    "the of and to in that it was for on are as with they be at one have this from or had by hot"
    " some what there we can out other were all your when up use how said an each she which do"
    " their time if will way about many then them would write like so these her long make thing"
    " see him two has look more day could go come did sound no most number who over know water"
).split()
_BUFFER = 4096  # draws made at once
_SHORTEST = 8  # the shortest document is this many times shorter than the longest


class Writer:
    """Words and filler of one key; the same key writes the same."""

    def __init__(self, key: int) -> None:
        self._key, self._block = key, 0
        self._draws: Iterator[float] = iter(())

    def draw(self) -> float:
        """A number in [0, 1)."""
        for value in self._draws:
            return value
        self._block += 1
        self._draws = iter(uniform(mix(self._key, self._block), _BUFFER).tolist())
        return next(self._draws)

    def below(self, count: int) -> int:
        """A whole number below ``count``."""
        return int(self.draw() * count)

    def word(self, syllables: int) -> str:
        """A word of so many syllables."""
        return "".join(_SYLLABLES[self.below(len(_SYLLABLES))] for _ in range(syllables))

    def words(self, syllables: int, count: int) -> list[str]:
        """Words that all differ."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.word(syllables)] = None
        return list(found)

    def filler(self, characters: int) -> str:
        """Sentences that say nothing, at least so many characters; a space behind them."""
        sentences: list[str] = []
        length = 0
        while length < characters:
            some = [_FILLER[self.below(len(_FILLER))] for _ in range(4 + self.below(10))]
            sentences.append(" ".join(some).capitalize() + ". ")
            length += len(sentences[-1])
        return "".join(sentences)


def statement(key: str, values: Sequence[str]) -> str:
    """What says the values of a key; a space behind it."""
    if len(values) == 1:
        return f"The word of {key} is {values[0]}. "
    return f"The words of {key} are {', '.join(values)}. "


def question(key: str, values: Sequence[str]) -> str:
    """What :func:`answer` follows."""
    return f"The word{'s' if len(values) > 1 else ''} of {key} {'were' if values[1:] else 'was'}"


def answer(values: Sequence[str]) -> str:
    """The values, as they are asked for; a space before them."""
    return " " + ", ".join(values)


class SyntheticDocuments:
    """All documents of a source, each written when it is asked for.

    Args:
        source: how many, how long, of which tasks and from which seed.
    """

    at_once = 1
    bad_lines = 0

    def __init__(self, source: SourceConfig) -> None:
        self._source = source

    def __len__(self) -> int:
        return self._source.documents

    def texts(self, index_N: np.ndarray) -> list[str]:
        """Texts of some documents."""
        return [document(self._source, int(index)) for index in index_N]


def document(source: SourceConfig, number: int) -> str:
    """One document of a source: of the tasks in turn, its length drawn evenly in its logarithm."""
    write = Writer(mix(source.seed, VERSION, number))
    length = int(source.document_characters * _SHORTEST ** (write.draw() - 1))
    task = Task(source.tasks[number % len(source.tasks)])
    if task in _WHOLE:
        return _WHOLE[task](write, length)
    events = sorted(_EVENTS[task](write, length), key=lambda event: event[0])
    parts: list[str] = []
    written, spent = 0, sum(len(text) for _, text in events)
    for place, text in events:
        gap = int(place * max(0, length - spent)) - written
        if gap > 0:
            parts.append(write.filler(gap))
            written += len(parts[-1])
        parts.append(text)
    if written + spent < length:
        parts.append(write.filler(length - written - spent))
    return "".join(parts)


def _keys(write: Writer, length: int) -> Iterator[tuple[float, str]]:
    """Where in the filler what is said: keys with values, each asked for up to three times."""
    for key in write.words(KEY_SYLLABLES, max(2, length // 1000)):
        values = write.words(VALUE_SYLLABLES, 1 if write.draw() < 0.8 else 3)
        place = write.draw()
        yield place, statement(key, values)
        for _ in range(1 + write.below(3)):
            later = place + (1 - place) * write.draw()
            yield later, question(key, values) + answer(values) + ". "


def _copies(write: Writer, length: int) -> Iterator[tuple[float, str]]:
    """Passages that come again."""
    for name in write.words(KEY_SYLLABLES, max(1, length // 2000)):
        passage = " ".join(write.word(VALUE_SYLLABLES) for _ in range(8 + write.below(40)))
        place = write.draw()
        yield place, f"Passage {name}: {passage}. "
        yield place + (1 - place) * write.draw(), f"Again, passage {name}: {passage}. "


def _tables(write: Writer, length: int) -> Iterator[tuple[float, str]]:
    """Tables whose cells are asked for later."""
    for name in write.words(KEY_SYLLABLES, max(1, length // 4000)):
        columns = write.words(VALUE_SYLLABLES, 3)
        rows = {
            key: [write.word(VALUE_SYLLABLES) for _ in columns]
            for key in write.words(KEY_SYLLABLES, 4 + write.below(12))
        }
        place = write.draw()
        lines = [f"{key} | {' | '.join(cells)}" for key, cells in rows.items()]
        yield place, "\n".join([f"\nTable {name} | {' | '.join(columns)}", *lines]) + "\n"
        for key, cells in rows.items():
            column = write.below(3)
            asked = f"In table {name} the {columns[column]} of {key} is {cells[column]}. "
            yield place + (1 - place) * write.draw(), asked


_WHOLE = {Task.pairs: recall.pairs, Task.gist: recall.gist}
_EVENTS = {Task.keys: _keys, Task.copies: _copies, Task.tables: _tables}
