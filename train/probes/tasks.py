"""Documents of the probes, written from a seed with the model's own tokenizer: no download.

The words are those of the synthetic training data (data/synthetic.py), the keys of another seed:
no key of a probe stood in training. A needle's distance is counted from the token that predicts the
answer's first token back to the first token of the value that was stated. Windows stacked over
layers relay what they hold, ``layers * (window - 1)`` tokens far at most: cells beyond that are
marked, and reported apart, since no window alone can solve them.
"""

# Legend: N tokens of a document
from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from data.keyed import mix, uniform
from data.synthetic import (
    KEY_SYLLABLES,
    NUM_VALUES,
    VALUE_SYLLABLES,
    Writer,
    answer,
    question,
    statement,
)
from data.tokenizer import Tokenizer
from model.config import ModelConfig
from train.errors import UserError
from train.probes.blocks import BLOCK_NEEDLES, block_document, block_needle
from train.probes.question import PROBE, Question

LEAST_TOKENS = 128  # of a document in which a needle fits
NEEDLES = ("single", "keys", "values")
ALL_NEEDLES = (*NEEDLES, *BLOCK_NEEDLES)
WITH_PLACE = (*NEEDLES, "pairs")  # whose answer stands in one place
_NUM_VALUES_ASKED = 4  # values of a key, where there are several
_MOST_KEYS, _KEY_TOKENS = 64, 48  # keys of a document with several; tokens for each, at least
_MARGIN = 0.03  # by which filler is shortened until the document fits
_SAMPLE = 20_000  # characters from which tokens a character are estimated


def window_reach(config: ModelConfig) -> int:
    """Tokens over which windows alone can relay, stacked over all layers."""
    return config.num_hidden_layers * (config.sliding_window - 1)


def needle(
    tokenizer: Tokenizer, kind: str, length: int, depth: float, seed: int, number: int
) -> Question:
    """Filler that states a key's value at some depth and asks for it at the end.

    Args:
        tokenizer: of the model.
        kind: ``single``; ``keys``: among many others; ``values``: a key with four values;
            ``pairs``, ``gist``: see train/probes/blocks.py.
        length: tokens of the document.
        depth: where the value is stated; 0 = at the beginning, 1 = before the question.
        seed: of the probe.
        number: of the document in its cell.

    Raises:
        UserError: the document is too short for what it has to say.
    """
    if kind in BLOCK_NEEDLES:
        return block_needle(tokenizer, kind, length, depth, seed, number)
    write = Writer(mix(PROBE, seed, NEEDLES.index(kind), length, round(depth * 1000), number))
    keys = min(_MOST_KEYS, max(4, length // _KEY_TOKENS)) if kind == "keys" else 1
    names = write.words(KEY_SYLLABLES, keys)
    told = [write.words(VALUE_SYLLABLES, _NUM_VALUES_ASKED if kind == "values" else 1)
            for _ in names]  # fmt: skip
    others = [statement(k, v) for k, v in zip(names[1:], told[1:], strict=True)]
    stated, asked = statement(names[0], told[0]), question(names[0], told[0])
    rate = _tokens_per_character(tokenizer)
    room = length - rate * len(stated + asked + answer(told[0]) + "".join(others))
    scale = 1.0
    while True:
        before, after = (max(0, int(room * part * scale / rate)) for part in (depth, 1 - depth))
        front = write.filler(before + int(0.2 * length / rate)) if before else ""
        texts = _scattered(write, others, before, after)
        text = front + texts[0] + stated + texts[1] + asked
        ids_N, begin, start, value = _encoded(
            tokenizer, text, stated, len(front + texts[0]), told[0]
        )
        cut = max(0, len(ids_N) - length)
        if cut <= start:
            chance = 1 / keys if keys > 1 else 1 / NUM_VALUES
            return Question(ids_N[cut:], begin - cut, begin - 1 - value, chance)
        scale -= _MARGIN
        if scale < 0:
            raise UserError(f"a needle of {kind} does not fit a document of {length} tokens")


def induction(vocabulary_N: np.ndarray, distance: int, seed: int, number: int) -> Question:
    """Random tokens twice: each of the second half stood ``distance`` tokens before.

    Args:
        vocabulary_N: ids to draw from.
        distance: tokens of a half.
        seed: of the probe.
        number: of the document.
    """
    drawn_N = uniform(mix(PROBE, seed, distance, number, 1), distance)
    half_N = vocabulary_N[(drawn_N * len(vocabulary_N)).astype(np.int64)]
    begin = distance + min(8, distance // 2)  # by then it is clear that all comes again
    return Question(np.concatenate([half_N, half_N]), begin, distance - 1, 1 / len(vocabulary_N))


def copy(tokenizer: Tokenizer, length: int, seed: int, number: int) -> Question:
    """A passage at the beginning that comes again at the end; scored behind its first words."""
    write = Writer(mix(PROBE, seed, length, number, 2))
    name = write.word(KEY_SYLLABLES)
    words = [write.word(VALUE_SYLLABLES) for _ in range(24)]
    rate = _tokens_per_character(tokenizer)
    passage = f"Passage {name}: {' '.join(words)}. "
    again = f"Again, passage {name}: {' '.join(words[:4])}"
    gap = max(0, int((length - rate * (len(passage) + len(again) + 120)) / rate))
    text = passage + write.filler(gap) + again
    source = len(passage.split(words[3], 1)[0].encode()) + len(words[3].encode())
    rest = " " + " ".join(words[4:])
    ids_N, byte_ends_N = tokenizer.encode_with_byte_ends(text + rest)
    begin = int(np.searchsorted(byte_ends_N, len(text.encode()), side="right"))
    value = int(np.searchsorted(byte_ends_N, source, side="right"))
    return Question(ids_N, begin, begin - 1 - value, 0.0)


def ordinary_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Ids that text can give; int64."""
    return np.setdiff1d(np.arange(tokenizer.vocab_size), sorted(tokenizer.control_ids))


def watched_document(
    tokenizer: Tokenizer, kinds: Sequence[str], length: int, seed: int
) -> np.ndarray:
    """What attention's probes read: of the first kind of needles that is asked for; int64."""
    if kinds[0] in BLOCK_NEEDLES:
        return block_document(tokenizer, kinds[0], length, seed)
    return filler_document(tokenizer, length, seed)


def filler_document(tokenizer: Tokenizer, length: int, seed: int) -> np.ndarray:
    """Keys and questions among filler, so many tokens; int64."""
    write = Writer(mix(PROBE, seed, length, 3))
    parts: list[str] = []
    ids_N = np.empty(0, np.int64)
    names: list[tuple[str, list[str]]] = []
    while len(ids_N) < length:
        for _ in range(20):
            names.append((write.word(KEY_SYLLABLES), [write.word(VALUE_SYLLABLES)]))
            key, values = names[write.below(len(names))]
            parts += [statement(*names[-1]), write.filler(80), question(key, values)]
            parts.append(answer(values) + ". ")
        ids_N = tokenizer.encode_batch(["".join(parts)])[0]
    return ids_N[:length]


def _scattered(write: Writer, others: Sequence[str], before: int, after: int) -> tuple[str, str]:
    """Filler of so many characters in front of the needle and behind it, with others in it."""
    places = sorted(write.draw() * (before + after) for _ in others)
    sides = ([p for p in places if p < before], [p - before for p in places if p >= before])
    told: Iterator[str] = iter(others)
    out = []
    for side, total in zip(sides, (before, after), strict=True):
        parts, at = [], 0.0
        for place in side:
            if place - at > 1:
                parts.append(write.filler(int(place - at)))
            parts.append(next(told))
            at = place
        if total - at > 1:
            parts.append(write.filler(int(total - at)))
        out.append("".join(parts))
    return out[0], out[1]


def _encoded(
    tokenizer: Tokenizer, text: str, stated: str, where: int, values: Sequence[str]
) -> tuple[np.ndarray, int, int, int]:
    """Ids, and the first token of the answer, of the statement and of its values."""
    ids_N, byte_ends_N = tokenizer.encode_with_byte_ends(text + answer(values))
    begin = int(np.searchsorted(byte_ends_N, len(text.encode()), side="right"))
    value = where + stated.rindex(answer(values))
    start, value = np.searchsorted(byte_ends_N, [where, value], side="right").tolist()
    return ids_N, begin, start, value


def _tokens_per_character(tokenizer: Tokenizer) -> float:
    text = Writer(PROBE).filler(_SAMPLE)
    return len(tokenizer.encode_batch([text])[0]) / len(text)
