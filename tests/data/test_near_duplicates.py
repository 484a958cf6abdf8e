"""Near-duplicates: planted ones are found whatever their case, layout and surroundings."""

import random
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest

from data.config import ValidationConfig
from data.errors import ConfigError
from data.near_duplicates import OverlapCounter, Shingler
from data.split import measure, split_documents

pytestmark = pytest.mark.core

WORDS = Path(random.__file__).read_text().split()


def words(seed: int, count: int) -> list[str]:
    """A text in which no run of 13 words comes twice, whatever the seeds."""
    rng = random.Random(seed)
    return [f"{rng.choice(WORDS)} x{seed}n{i}" for i in range(count)]


class Texts:
    """Documents in memory."""

    at_once = 7
    bad_lines = 0

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def texts(self, index_N: np.ndarray) -> list[str]:
        return [self._texts[i] for i in index_N]


def split(texts: list[str], cfg: ValidationConfig):
    documents = Texts(texts)
    measured = measure(documents, np.arange(len(texts)), cfg.seed)

    def mark(counter, name, index_N):
        for text in documents.texts(index_N):
            counter.add(text)

    return split_documents({"s": documents}, {"s": measured}, cfg, mark)["s"]


def test_overlap_is_the_exact_fraction_of_shared_runs():
    own, common = words(1, 50), words(2, 50)
    candidate = " ".join(own + common)  # 100 pairs: 200 words and more
    counter = OverlapCounter([candidate, " ".join(own)], 13)
    counter.add("before " + " ".join(common) + " after")
    both, none = counter.overlaps()
    shingles = naive_shingles(candidate)
    shared = naive_shingles(" ".join(common))
    assert both == pytest.approx(sum(s in set(shared) for s in shingles) / len(shingles))
    assert none == 0.0


def naive_shingles(text: str) -> list[tuple[str, ...]]:
    tokens = "".join(c if c.isalnum() or c == "_" else " " for c in text.lower()).split()
    return [tuple(tokens[i : i + 13]) for i in range(len(tokens) - 12)]


def test_case_punctuation_and_layout_do_not_hide_a_copy():
    original = words(3, 60)
    copy = "\n\n\t".join(word.upper() + "!?" for word in original)
    counter = OverlapCounter([copy], 13)
    counter.add(" ".join(original))
    assert counter.overlaps() == [1.0]


def test_shingles_are_equal_in_every_process():
    """Golden: they are compared across worker processes."""
    assert Shingler(2)("One two, three").tolist() == [17898366591077449017, 11418333532430138187]


def test_repeats_sees_a_copy_inside_a_long_document():
    held = " ".join(words(4, 40))
    counter = OverlapCounter([" ".join(words(5, 400)), held], 13)
    assert counter.repeats(" ".join([*words(6, 2000), held])) == 1.0
    assert counter.repeats(" ".join(words(6, 2000))) == 0.0
    assert counter.repeats(held[: len(held) // 2]) > 0.9
    assert counter.overlaps() == [0.0, 0.0]


def test_planted_near_duplicates_leave_the_validation_split():
    texts = [" ".join(words(seed, 80)) for seed in range(60)]
    cfg = ValidationConfig(bytes=12_000, max_fraction=0.5)
    before = split(texts, cfg)
    planted = before.validation[:3]
    # Copies of three held-out documents among the training text: whole, half, with other layout.
    copies = [texts[planted[0]], "".join(texts[planted[1]][:700]), texts[planted[2]].upper()]
    for place, copy in zip(before.train[:3], copies, strict=True):
        texts[place] = texts[place][: len(texts[place]) - len(copy)] + copy
    after = split(texts, cfg)
    assert set(planted) <= set(after.near_duplicates)
    assert not set(after.validation) & set(after.near_duplicates)
    assert sum(len(texts[i]) for i in after.validation) >= 12_000
    assert len(after.train) + len(after.validation) + len(after.near_duplicates) == 60


def test_split_is_deterministic_and_keyed():
    texts = [" ".join(words(seed, 30)) for seed in range(50)]
    chosen = [split(texts, ValidationConfig(bytes=3000, seed=s)).validation for s in (0, 0, 1)]
    assert chosen[0].tolist() == chosen[1].tolist() != chosen[2].tolist()


def test_empty_documents_are_in_no_split():
    texts = [" ".join(words(s, 30)) if s % 2 else " \n" for s in range(20)]
    result = split(texts, ValidationConfig(bytes=500))
    assert all(i % 2 for i in [*result.train, *result.validation])


def test_two_documents_are_enough_and_one_is_not():
    cfg = ValidationConfig(bytes=1000, max_fraction=0.5)
    result = split([" ".join(words(1, 30)), " ".join(words(2, 20))], cfg)
    assert (result.train.tolist(), result.validation.tolist()) == ([0], [1])
    with pytest.raises(ValueError, match=r"data\.sources\.s: no validation documents"):
        split([" ".join(words(1, 30))], cfg)
    with pytest.raises(ValueError, match="none of 2 documents has any text"):
        split([" ", ""], cfg)


FRACTIONS = [0.001, 0.01, 0.2, 0.35, 0.5, 0.8, 0.999]


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("num_bytes", [300, 10**9])
@pytest.mark.parametrize("kind", ["equal", "various", "repeating"])
def test_at_most_the_asked_fraction_is_held_out(fraction, num_bytes, kind):
    rng = random.Random(7)
    lengths = [20 if kind == "equal" else rng.choice([1, 20, 90]) for _ in range(100)]
    texts = [" ".join(words(seed, length)) for seed, length in enumerate(lengths)]
    if kind == "repeating":  # many candidates are near-duplicates and go too
        texts = texts[:50] + [text + " and more" for text in texts[:50]]
    total = sum(len(text) for text in texts)
    cfg = ValidationConfig(bytes=num_bytes, max_fraction=fraction)
    fits = min(map(len, texts)) <= fraction * total
    if kind != "repeating" and not fits:
        with pytest.raises(ValueError, match=r"no validation documents: .* more than data\.valid"):
            split(texts, cfg)
        return
    with suppress(ConfigError) if kind == "repeating" else nullcontext():
        result = split(texts, cfg)
        out = sum(len(texts[i]) for i in [*result.validation, *result.near_duplicates])
        assert out <= fraction * total
        if kind == "equal":  # and no less than what is asked or allowed, up to one document
            assert out >= min(num_bytes, fraction * total) - max(map(len, texts))


def test_what_is_held_out_depends_on_the_texts_alone():
    texts = [" ".join(words(seed, 25)) for seed in range(80)]
    cfg = ValidationConfig(bytes=2500)
    held = {texts[i] for i in split(texts, cfg).validation}
    assert len(held) > 5
    order = random.Random(1).sample(range(80), 80)
    moved = [texts[i] for i in order]
    assert {moved[i] for i in split(moved, cfg).validation} == held
    more = {texts[i] for i in split(texts, ValidationConfig(bytes=3500)).validation}
    assert held < more


def test_a_corpus_that_repeats_itself_cannot_be_validated_on():
    texts = [" ".join(words(1, 30))] * 10
    with pytest.raises(ValueError, match=r"no validation documents.*repeat training text"):
        split(texts, ValidationConfig(bytes=1000))


def test_validation_can_be_left_out():
    result = split([" ".join(words(1, 30))], ValidationConfig(bytes=0))
    assert (len(result.train), len(result.validation)) == (1, 0)
