"""Synthetic documents: what is asked for was stated before, from a seed, and is hard to guess."""

import re

import numpy as np
import pytest

from data.config import DataConfig, SourceConfig, SourceKind, Task, ValidationConfig
from data.corpus import embedded_documents
from data.loader import build_loader
from data.prepare import build_tokenizer
from data.synthetic import SyntheticDocuments, answer, document, question, statement

pytestmark = pytest.mark.core


def source(**keys):
    return SourceConfig(kind=SourceKind.synthetic, **keys)


def test_documents_depend_on_seed_and_number_alone():
    documents = SyntheticDocuments(source(documents=12))
    assert len(documents) == 12
    texts = documents.texts(np.arange(12))
    assert texts == [document(source(), i) for i in range(12)]
    assert len({*texts, *(document(source(seed=1), i) for i in range(12))}) == 24
    assert documents.texts(np.array([7, 2])) == [texts[7], texts[2]]


def test_lengths_are_those_asked_for():
    lengths = [len(document(source(document_characters=20_000), i)) for i in range(90)]
    assert 2_400 < min(lengths) < 4_000
    assert 16_000 < max(lengths) < 23_000


def test_every_question_about_a_key_has_one_answer_which_was_stated_before():
    far = 0
    for number in range(10):
        text = document(source(tasks=[Task.keys]), number)
        stated = {m[2]: (m[3], m.end()) for m in
                  re.finditer(r"The (words? of (\w+)) (?:is|are) ([\w, ]+)\.", text)}  # fmt: skip
        asked = list(re.finditer(r"The words? of (\w+) (?:was|were) ([\w, ]+)\.", text))
        assert len(asked) >= len(stated) >= 2
        for found in asked:
            values, where = stated[found[1]]
            assert values == found[2]
            assert where < found.start()
            far += found.start() - where > 4096
    assert far > 20


def test_passages_and_cells_come_again():
    passages = re.compile(r"(?:Passage|Again, passage) (\w+): ([\w ]+)\.")
    found = passages.findall(document(source(tasks=[Task.copies]), 5))
    assert len(found) >= 2
    assert len(set(found)) * 2 == len(found)
    text = document(source(tasks=[Task.tables]), 5)
    asked = re.findall(r"In table (\w+) the (\w+) of (\w+) is (\w+)\.", text)
    assert len(asked) >= 4
    for name, column, key, cell in asked:
        head = re.search(rf"Table {name} \| (.*)\n", text)
        row = re.search(rf"\n{key} \| (.*)\n", text)
        assert row[1].split(" | ")[head[1].split(" | ").index(column)] == cell


def test_questions_read_as_in_documents():
    assert statement("bakido", ["lamu"]) == "The word of bakido is lamu. "
    asked = question("bakido", ["lamu", "gado"]) + answer(["lamu", "gado"])
    assert asked == "The words of bakido were lamu, gado"


def test_folders_of_packages_are_documents(tmp_path):
    folder = embedded_documents(["json", "logging"], tmp_path, whole=True)
    text = (folder / "text.bin").read_text()
    assert "# ---- json.decoder\n" in text
    assert "class JSONDecoder" in text
    assert len(np.load(folder / "ends.npy")) == 2
    assert folder != embedded_documents(["json", "logging"], tmp_path)


def test_both_kinds_make_rows(tmp_path):
    cfg = DataConfig(
        tokenizer="byte", cache_dir=str(tmp_path), validation=ValidationConfig(bytes=3000),
        sources={
            "s": source(documents=30, document_characters=4000, weight=0.5),
            "p": SourceConfig(
                SourceKind.package_sources, packages=["json", "email", "http", "xml"], weight=0.5),
        },
    )  # fmt: skip
    cfg.validate()
    loader = build_loader(cfg, build_tokenizer(cfg), 0, 1)
    planned = loader.plan(256, 1024)
    assert planned.source_shares() == pytest.approx({"s": 0.5, "p": 0.5}, abs=0.1)
    assert loader.validation_bytes(64)


@pytest.mark.parametrize(("keys", "says"), [
    ({"streaming": True}, "streaming=true cannot be"),
    ({"tasks": []}, r"s\.tasks=\[\] must name"),
    ({"document_characters": 100}, r"document_characters=100 must lie in \[256, "),
    ({"packages": ["json"]}, r"packages=\['json'\] has no effect: data\.sources\.s\.kind=synth"),
])  # fmt: skip
def test_bad_sources_are_named(keys, says):
    with pytest.raises(ValueError, match=says):
        DataConfig(sources={"s": source(**keys)}).validate()
