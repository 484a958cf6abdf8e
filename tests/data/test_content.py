"""What sources hold is told by content: a move changes nothing, one byte does."""

import json
import logging
import os
import shutil
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pytest

from data.config import DataConfig, PackingConfig, SourceConfig, SourceKind, ValidationConfig
from data.content import file_content, stream_content
from data.loader import build_loader
from data.network import HubAnswer
from data.prepare import build_tokenizer
from data.sources import open_documents

TEXTS = [f"document {i}: " + " ".join(f"w{i * j % 97}" for j in range(60)) for i in range(40)]


def write(folder, texts=TEXTS, name="a.jsonl"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder


def config(folder, cache, **changes):
    source = SourceConfig(SourceKind.jsonl, str(folder), **changes)
    return DataConfig(
        tokenizer="byte", cache_dir=str(cache), sources={"docs": source},
        packing=PackingConfig(pool_documents=8),
        validation=ValidationConfig(bytes=1000, max_overlap=1.0),
    )  # fmt: skip


def loader_of(cfg):
    return build_loader(cfg, build_tokenizer(cfg), 0, 2)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_moved_corpus_continues_exactly(tmp_path, streaming):
    first = loader_of(config(write(tmp_path / "a"), tmp_path / "c", streaming=streaming))
    first.plan(3, 80)
    state = json.loads(json.dumps(first.state_dict()))
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "a" / "a.jsonl", tmp_path / "elsewhere" / "b.jsonl")
    cfg = config(tmp_path / "elsewhere", tmp_path / "other cache", streaming=streaming)
    moved = loader_of(cfg)
    assert moved.manifest == first.manifest
    moved.load_state_dict(state)
    for _ in range(4):
        ours, theirs = (x.plan(3, 80).batch(0, 3).labels_BTK for x in (moved, first))
        assert ours.equal(theirs)


@pytest.mark.parametrize("streaming", [False, True])
def test_other_text_is_other_content(tmp_path, streaming):
    known = [
        loader_of(config(write(tmp_path / name, texts), tmp_path / "c", streaming=streaming))
        for name, texts in (("a", TEXTS), ("b", [*TEXTS[:-1], TEXTS[-1][:-1] + "x"]))
    ]
    contents = [k.manifest["sources"]["docs"] for k in known]
    assert contents[0].keys() == contents[1].keys()
    assert contents[0] != contents[1]


def test_what_is_held_out_is_told_apart_from_what_is_trained_on(tmp_path):
    cfg = config(write(tmp_path / "a"), tmp_path / "c")
    first = loader_of(cfg).manifest["sources"]["docs"]
    cfg.validation.seed = 1
    second = loader_of(cfg).manifest["sources"]["docs"]
    assert first["train"] != second["train"]
    assert first["validation"] != second["validation"]
    assert first["documents"] + first["validation_documents"] == len(TEXTS)


def test_a_rewritten_file_with_its_old_size_and_time_is_seen(tmp_path):
    path = write(tmp_path / "a") / "a.jsonl"
    before, stat = file_content(path), path.stat()
    path.write_text(path.read_text().replace("w1 ", "w2 ", 1))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert file_content(path) != before


def test_of_a_large_file_both_ends_and_its_size_count(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(b"\0" * (5 << 20))
    before = [file_content(path)]
    for place in (0, (5 << 20) - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        before.append(file_content(path))
    with path.open("ab") as file:
        file.write(b"x")
    before.append(file_content(path))
    assert len({str(b) for b in before}) == 4


def test_a_hub_stream_is_known_by_the_commit_it_stands_at(monkeypatch):
    asked = []

    class Hub:
        def dataset_info(self, path, revision, timeout):
            asked.append((path, revision))
            return SimpleNamespace(sha="c" * 40)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    source = SourceConfig(SourceKind.hub, "some/text", streaming=True)
    found = stream_content("s", source, ValidationConfig())
    assert (found["repository"], found["revision"]) == ("some/text", "c" * 40)
    assert asked == [("some/text", None)]
    source.revision = "d" * 40
    assert stream_content("s", source, ValidationConfig())["revision"] == "d" * 40
    assert len(asked) == 1, "a commit needs no question"


def test_a_hub_that_does_not_answer_leaves_the_revision_unknown_and_says_so(monkeypatch, caplog):
    def fail(self, *args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    source = SourceConfig(SourceKind.hub, "some/text", streaming=True)
    with caplog.at_level(logging.INFO):
        assert stream_content("s", source, ValidationConfig())["revision"] is None
    assert "does not tell the revision of some/text" in caplog.text


def test_a_hub_dataset_is_read_anew_when_it_changed_and_from_the_cache_when_the_hub_is_away(
    tmp_path, monkeypatch
):
    stands_at, loaded = ["a" * 40], []

    class Hub:
        def dataset_info(self, path, revision, timeout):
            if not stands_at:
                raise OSError("no network")
            return SimpleNamespace(sha=stands_at[-1])

    def load(path, revision, cache_dir, **options):
        loaded.append((revision, cache_dir))
        return datasets.Dataset.from_dict({"text": [f"text of {revision}"]})

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr("data.hub.ask_hub", lambda kind, name: HubAnswer())
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = SourceConfig(SourceKind.hub, "some/text")

    def text():
        return open_documents("s", source, str(tmp_path)).texts(np.arange(1))[0]

    assert text() == f"text of {'a' * 40}"
    stands_at.append("b" * 40)
    assert text() == f"text of {'b' * 40}"
    stands_at.clear()
    assert text() == f"text of {'b' * 40}"
    assert loaded[0] != loaded[1] == loaded[2]
