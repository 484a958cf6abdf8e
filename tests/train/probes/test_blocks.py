"""Needles of blocks: the pair asked for stands once, its key in no training document."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from data.config import SourceConfig, SourceKind, Task
from data.recall import BLOCK, LETTERS
from data.synthetic import document
from data.tokenizer import ByteTokenizer, train_bpe
from model.init import init_weights
from model.transformer import DeepSeekV4
from scripts.cli.model_yaml import load_model_config
from train.errors import UserError
from train.probes.blocks import BLOCK_NEEDLES, block_needle
from train.probes.found import answers_found
from train.probes.tasks import needle, watched_document

BYTES = ByteTokenizer()


def training_texts(count=300):
    source = SourceConfig(kind=SourceKind.synthetic, tasks=[Task.pairs])
    return [document(source, number) for number in range(count)]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(training_texts(3), 400)


@pytest.mark.parametrize("of", ["bytes", "bpe"])
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_a_pair_stands_once_before_it_is_asked_for(of, depth, bpe):
    tokenizer = BYTES if of == "bytes" else bpe
    for number in range(3):
        q = needle(tokenizer, "pairs", 300, depth, 0, number)
        text = tokenizer.decode(q.ids_N.tolist())
        name, value = text[-3:-1], text[-1]
        told = [text[at : at + BLOCK] for at in range(0, len(text) - 3, BLOCK)]
        assert 260 < len(q.ids_N) <= 300
        assert told.count(f"{name}{value} ") == sum(block[:2] == name for block in told) == 1
        assert abs(told.index(f"{name}{value} ") / (len(told) - 1) - depth) < 0.02
        assert q.begin == len(q.ids_N) - 1
        source = q.begin - 1 - q.distance
        assert value in tokenizer.decode(q.ids_N[source : source + 1].tolist())
        assert q.chance == 1 / len(LETTERS) < 0.02


def test_no_training_document_has_a_key_that_is_asked_for():
    asked = {BYTES.decode(needle(BYTES, "pairs", 128, 0.5, 0, n).ids_N.tolist())[-3:-1]
             for n in range(100)}  # fmt: skip
    seen = {text[at : at + 2] for text in training_texts() for at in range(0, len(text), BLOCK)}
    assert len(asked) > 60
    assert not asked & seen


def test_a_gist_is_as_far_as_its_stretch_ends():
    for depth, distance in ((0.0, 255), (0.5, 128), (1.0, 1)):
        q = needle(BYTES, "gist", 512, depth, 0, 0)
        assert (len(q.ids_N), q.begin) == (510, 509)
        assert q.distance == pytest.approx(distance, abs=2)


def test_attention_is_watched_on_documents_of_the_asked_kind():
    for kind in BLOCK_NEEDLES:
        ids_N = watched_document(BYTES, [kind, "single"], 256, 0)
        assert ids_N.tolist() == block_needle(BYTES, kind, 256, 0.0, 0, -1).ids_N.tolist()
    assert "The word of" in BYTES.decode(watched_document(BYTES, ["keys"], 256, 0).tolist())


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="needle of gist does not fit a document of 5 tokens"):
        block_needle(BYTES, "gist", 5, 0.0, 0, 0)


@pytest.fixture(scope="module")
def model():
    config = replace(load_model_config("v4_tiny"), vocab_size=260, sliding_window=16, index_topk=4)
    model = DeepSeekV4(config)
    init_weights(model, 0, torch.ones(260, dtype=torch.int64))
    return model.requires_grad_(False)


def test_an_answer_is_found_where_attention_goes(model):
    """Without queries all scores are 0: entries, the window's 16 tokens and the sink get alike."""
    model = deepcopy(model)
    far, near = (block_needle(BYTES, "pairs", 256, d, 0, 0) for d in (0.0, 1.0))
    layers = answers_found(model, [far])
    assert [row["kind"] for row in layers] == [str(k) for k in model.config.layer_kinds]
    assert {row["window"] for row in layers} == {0.0}
    for block in model.layers.values():
        block.attn.wq_b.weight.zero_()
        block.attn.topk = 1000
    for row in answers_found(model, [near]):
        shares = {"swa": 17, "csa": 17 + 63, "hca": 17 + 15}[row["kind"]]
        assert row["window"] == pytest.approx(1 / shares, rel=1e-3)
    for row in answers_found(model, [far]):
        if row["kind"] == "swa":
            continue
        ratio, last = (4, 252) if row["kind"] == "csa" else (16, 252)
        assert row["fair"] == pytest.approx((2 if ratio == 4 else 1) / ((last + 2) // ratio))
        entries = (last + 2) // ratio
        expected = row["fair"] * entries / (entries + 17)
        assert row["entries"] == pytest.approx(expected, rel=1e-3)
        if row["kind"] == "csa":
            assert row["chosen"] == row["by_chance"] == 1


def test_chance_of_a_choice_is_that_of_lots(model):
    q = block_needle(BYTES, "pairs", 256, 0.0, 0, 0)
    row = next(row for row in answers_found(model, [q]) if row["kind"] == "csa")
    # 4 of 63 entries are chosen, 2 are ours: 1 - 59/63 * 58/62
    assert row["by_chance"] == pytest.approx(1 - 59 / 63 * 58 / 62)
    assert row["chosen"] in (0.0, 1.0)
