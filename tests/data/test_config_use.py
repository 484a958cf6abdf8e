"""What the config says acts on nothing is what nothing reads, for every mixture of sources.

Oracle: the reads that happen while the data is prepared and opened, first anew, then cached.
"""

import itertools
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import DataConfig, SourceConfig, SourceKind, TextUnit, ValidationConfig
from data.loader import build_loader
from data.prepare import build_tokenizer
from scripts.prepare import main as prepare
from tests.train.audit.config_reads import ConfigReads
from train.errors import ROOT

pytestmark = pytest.mark.core
CONF = ROOT / "conf" / "data"


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, SourceConfig]:
    """One source of every kind, streams beside."""
    folder: Path = tmp_path_factory.mktemp("sources")
    texts = [f"text {i} " + " ".join(f"w{i}x{j}" for j in range(3 + i)) for i in range(30)]
    (folder / "a.txt").write_text("\n".join(texts))
    (folder / "set").mkdir()
    pq.write_table(pa.table({"text": texts}), folder / "set" / "train.parquet")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    store = str(folder / "store")
    made = prepare([
        "--out", store, "--kind", "text", "--path", str(folder / "a.txt"), "--unit", "line",
        "--tokenizer", "byte", "--validation-bytes", "200", "--cache-dir", str(folder / "cache"),
    ])  # fmt: skip
    assert made == 0
    files = {"path": str(folder / "a.jsonl"), "kind": SourceKind.jsonl}
    return {
        "embedded": SourceConfig(packages=["asyncio"]),
        "text": SourceConfig(SourceKind.text, str(folder / "a.txt"), unit=TextUnit.line),
        "jsonl": SourceConfig(**files),
        "parquet": SourceConfig(SourceKind.parquet, str(folder / "set")),
        "hub": SourceConfig(SourceKind.hub, str(folder / "set")),
        "stream": SourceConfig(**files, streaming=True),
        "store": SourceConfig(kind=SourceKind.store, path=store),
    }


KINDS = ("embedded", "text", "jsonl", "parquet", "hub", "stream", "store")
PAIRS = itertools.combinations(("embedded", "jsonl", "stream", "store"), 2)
MIXTURES = [*((kind,) for kind in KINDS), *PAIRS]


@pytest.mark.parametrize("names", MIXTURES, ids="+".join)
@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_keys_without_use_are_those_that_nothing_reads(sources, tmp_path, names, tokenizer):
    for first in (True, False):
        weight = 1 / len(names)
        cfg = DataConfig(
            tokenizer=tokenizer,
            vocab_size=512,
            cache_dir=str(tmp_path),
            sources={n: SourceConfig(**vars(sources[n]) | {"weight": weight}) for n in names},
            validation=ValidationConfig(bytes=100),
        )
        cfg.validate()
        reads = ConfigReads(cfg)
        build_loader(cfg, build_tokenizer(cfg), 0, 1).plan(2, 64)
        unread = set(reads.unread())
        reads.stop()
        if not first:  # an earlier run prepared the corpus
            unread -= {"workers"} - set(cfg.unused())
        assert unread == set(cfg.unused())


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("store", "max_overlap", 0.5),
        ("store", "ngram", 5),
        ("stream", "max_fraction", 0.5),
        ("store", "max_fraction", 0.5),
    ],
)
def test_a_given_key_without_use_is_refused(sources, name, key, value):
    cfg = DataConfig(sources={name: sources[name]}, validation=ValidationConfig(**{key: value}))
    with pytest.raises(ValueError, match=rf"data\.validation\.{key}={value} has no effect: "):
        cfg.validate()


def test_any_vocabulary_goes_with_the_tokenizer_of_a_store(sources):
    DataConfig(vocab_size=260, sources={"store": sources["store"]}).validate()
    with pytest.raises(ValueError, match=r"data\.vocab_size=260 must be 512 or more"):
        DataConfig(vocab_size=260, sources={"text": sources["text"]}).validate()


def test_a_revision_of_a_folder_is_refused(sources, tmp_path):
    hub = SourceConfig(**vars(sources["hub"]) | {"revision": "main"})
    cfg = DataConfig(tokenizer="byte", sources={"hub": hub}, cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"sources\.hub\.revision=main has no effect"):
        build_loader(cfg, build_tokenizer(cfg), 0, 1)


def test_every_group_that_the_documents_name_exists():
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("conf/**/*.yaml"),
             *(ROOT / "scripts").glob("*.py")]  # fmt: skip
    named = {g for path in texts for g in re.findall(r"\bdata=(\w+)", path.read_text())}
    assert named >= {"text", "jsonl", "store"}
    assert named <= {path.stem for path in CONF.glob("*.yaml")}
