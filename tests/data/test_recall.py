"""Documents of ``data=recall``: what is asked for can be known, from far behind alone."""

import re
from collections import Counter

import pytest

from data.config import SourceConfig, SourceKind, Task
from data.recall import BLOCK, LETTERS, QUESTION, SIGNS, key, pairs, stretches
from data.synthetic import Writer, document

pytestmark = pytest.mark.core


def texts(task, count):
    source = SourceConfig(kind=SourceKind.synthetic, tasks=[task], document_characters=2048)
    return [document(source, number) for number in range(count)]


def blocks(text):
    return [text[at : at + BLOCK] for at in range(0, len(text), BLOCK)]


def test_a_key_keeps_its_value_and_comes_again_far_behind():
    again = told = far = 0
    for text in texts(Task.pairs, 20):
        known = {}
        for place, block in enumerate(blocks(text)):
            assert re.fullmatch(rf"[{re.escape(SIGNS)}]{{2}}[a-zA-Z] ", block)
            value, last = known.get(block[:2], (block[2], place))
            assert value == block[2]
            again += block[:2] in known
            far += place - last > 64
            told += 1
            known[block[:2]] = value, place
    assert 0.5 < again / told < 0.7  # of the blocks can be known
    assert far > told / 20


def test_keys_that_probes_ask_for_are_new_and_their_signs_are_not():
    write = Writer(0)
    held = {key(write, held_out=True) for _ in range(4000)}
    seen = {block[:2] for text in texts(Task.pairs, 40) for block in blocks(text)}
    assert not held & seen
    assert len(held) > 0.95 * len(SIGNS) ** 2 / 8
    assert {name[0] for name in seen} == {name[1] for name in seen} == set(SIGNS)


def test_a_letter_is_frequent_in_its_stretch_alone():
    for depth, begin, end in ((0.0, 0, 40_000), (0.5, 20_000, 60_000), (1.0, 40_000, 80_000)):
        text, told = stretches(Writer(3), 20_000, depth, "Q")
        assert (len(text), told) == (80_000, end)
        inside = Counter(text[begin:end])
        # 0.25 beyond the fair share of what is left, within four sigmas
        assert inside["Q"] / 40_000 == pytest.approx(0.25 + 0.75 / 52, abs=0.009)
        assert set(inside) == set(LETTERS)
        outside = text[:begin] + text[end:]
        assert outside.count("Q") / 40_000 == pytest.approx(1 / 52, abs=0.003)


def test_a_section_of_a_gist_ends_in_its_answer():
    found = [
        section for text in texts(Task.gist, 60) for section in re.findall(r"([^?]+)\?(.)  ", text)
    ]
    assert {len(letters) % BLOCK for letters, _ in found} == {0}
    lengths = sorted(len(letters) for letters, _ in found)
    assert lengths[0] == 12  # of four blocks
    assert lengths[-1] > 1000
    assert lengths[len(lengths) // 2] < 400  # short ones are as frequent as long ones
    long = [(letters, answer) for letters, answer in found if len(letters) > 100]
    right = [Counter(letters).most_common(1)[0][0] == answer for letters, answer in long]
    assert sum(right) > 0.97 * len(long)  # counting finds it, where there is enough to count
    assert all(text.endswith("  ") and set(text) <= {*LETTERS, QUESTION, " "}
               for text in texts(Task.gist, 5))  # fmt: skip


def test_short_documents_have_a_block():
    assert len(pairs(Writer(0), 1)) == BLOCK
