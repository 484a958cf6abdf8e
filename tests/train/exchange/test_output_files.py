"""What commands write: complete or absent, with the modes of new files, over nothing of others."""

import os
import re
import stat

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import processors
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from data.tokenizer import JsonTokenizer, train_bpe
from tests.train.exchange.exchange_models import write_run
from train.errors import UserError
from train.exchange.export import ExportFormat, ExportJob, FloatType, export_folder
from train.exchange.import_model import import_checkpoint
from train.exchange.open import open_source
from train.exchange.output_files import replacing, write_bytes
from train.exchange.tokenizer_files import tokenizer_files

JOB = ExportJob(ExportFormat.official, FloatType.fp32, shard_bytes=256 << 10)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    write_run(folder)
    return open_source(folder)


def export(source, target, job=JOB):
    export_folder(source, target, job)


WRITERS = [export, import_checkpoint]


def content(folder):
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns)
        for p in folder.rglob("*")
        if p.is_file()
    }


# ---- one file ------------------------------------------------------------------------------------
def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "x"
    write_bytes(path, b"old")

    def stopped():
        with replacing(path) as aside:
            aside.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path / "file" / "x", "Not a directory"),
        (tmp_path / "no" / "x", "No such file"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(UserError, match=re.escape(f"{path} cannot be written: {reason}")):
            write_bytes(path, b"")
    assert os.listdir(tmp_path) == ["file"]


# ---- folders -------------------------------------------------------------------------------------
@pytest.mark.core
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"mine": 1}'),
        ("tokenizer.json", "{}"),
        ("notes.txt", ""),
        ("model.safetensors", ""),
        ("config.yaml", ""),
    ],
)
def test_a_folder_with_something_else_is_refused_and_kept(write, name, text, source, tmp_path):
    (tmp_path / name).write_text(text)
    before = content(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"target {tmp_path} holds {name}, which is not")):
        write(source, tmp_path)
    assert content(tmp_path) == before


@pytest.mark.core
@pytest.mark.parametrize("write", WRITERS)
def test_a_file_as_target_is_refused(write, source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file is a file|Not a directory"):
        write(source, tmp_path / "file")


def test_exports_and_imports_do_not_mix(source, tmp_path):
    export(source, tmp_path / "out")
    before = content(tmp_path)
    with pytest.raises(UserError, match="which is not of this import"):
        import_checkpoint(source, tmp_path / "out")
    other = ExportJob(ExportFormat.transformers, FloatType.fp32)
    with pytest.raises(UserError, match=r"config\.json, which is not of this export"):
        export(source, tmp_path / "out", other)
    halves = ExportJob(ExportFormat.official, FloatType.fp32, shard_bytes=128 << 10)
    with pytest.raises(UserError, match=r"model-00001-of-.* is not of this export"):
        export(source, tmp_path / "out", halves)
    assert content(tmp_path) == before
    import_checkpoint(source, tmp_path / "back")
    with pytest.raises(UserError, match="holds a model already"):
        import_checkpoint(source, tmp_path / "back")
    with pytest.raises(UserError, match="holds checkpoints, which is not of this export"):
        export(source, tmp_path / "back")
    (tmp_path / "new").touch()
    modes = {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*") if p.is_file()}
    assert len(modes) == 1, "those of any new file"


def test_shards_of_another_source_are_refused(source, tmp_path):
    write_run(tmp_path / "other", steps=11)
    export(source, tmp_path / "out")
    with pytest.raises(UserError, match=r"holds model-00001-of-0000\d\.safetensors, made from sou"):
        export(Renamed(source), tmp_path / "out")


class Renamed:
    def __init__(self, source):
        self.__dict__ |= source.__dict__
        self.origin = "sha256 of another"
        self.read, self.tokenizer = source.read, source.tokenizer


# ---- tokenizers ----------------------------------------------------------------------------------
@pytest.mark.core
@pytest.mark.parametrize("kind", ["alone", "in a sequence"])
def test_a_template_that_adds_tokens_is_not_exported(kind, source, tmp_path, monkeypatch):
    bpe = train_bpe(["the cat sat on the mat. " * 20], 300)
    inner = HFTokenizer.from_str(bpe._inner.to_str())
    eos = inner.id_to_token(bpe.eos_id)
    inner.post_processor = TemplateProcessing(f"{eos} $A {eos}", None, [(eos, bpe.eos_id)])
    if kind != "alone":
        plain = HFTokenizer.from_str(inner.to_str())
        plain.post_processor = processors.Sequence([processors.ByteLevel(), inner.post_processor])
        inner = plain
    assert inner.encode("the cat").ids[0] == bpe.eos_id
    tokenizer = JsonTokenizer(inner, "x", eos)
    monkeypatch.setattr(source, "tokenizer", lambda: tokenizer)
    export(source, tmp_path / "out", ExportJob(ExportFormat.transformers))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("the cat", "", " a  b"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text) == bpe.encode(text)


def test_a_tokenizer_that_would_give_other_ids_is_refused():
    bpe = train_bpe(["the cat sat on the mat. " * 20], 300)

    class Other:
        eos_id, serialise = bpe.eos_id, bpe.serialise

        def encode(self, text):
            return [1, *bpe.encode(text)]

    with pytest.raises(UserError, match=r"the tokenizer cannot be written: '' has the ids \[1\]"):
        tokenizer_files(Other(), 64)
