"""scripts/prepare.py as a user runs it: several processes, killed and run again, verified."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.config import DataConfig, SourceConfig, SourceKind
from data.loader import build_loader
from data.prepare import build_tokenizer
from data.summary import control_strings
from data.token_store import TokenStore
from scripts.prepare import main
from tests.forked import run_forked

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare.py"


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_forked(["prepare", *map(str, arguments)])


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Two and a half shards of JSON lines."""
    folder = tmp_path_factory.mktemp("work")
    with (folder / "web.jsonl").open("w") as file:
        for i in range(400):
            text = " ".join(f"word{i % 97} {i * j % 1009}" for j in range(400))
            file.write(json.dumps({"body": text}) + "\n")
    return folder


def options(work: Path, out: str) -> list[str | Path]:
    return [
        "--out", work / out, "--cache-dir", work / "cache", "--kind", "jsonl", "--path",
        work / "web.jsonl", "--text-key", "body", "--tokenizer", "byte", "--validation-bytes",
        "20000", "--shard-bytes", "150000",
    ]  # fmt: skip


def test_a_killed_store_goes_on_and_equals_one_made_at_once(work):
    done = run(*options(work, "whole/web"), "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "training" in done.stdout
    whole = TokenStore(work / "whole" / "web", "whole")
    assert len(whole.manifest["train"]) > 6

    process = subprocess.Popen(
        command(*options(work, "killed/web")),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    first = work / "killed" / "web.partial" / "train-00000.json"
    while not first.exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (work / "killed" / "web").exists()
    written = first.stat().st_mtime_ns

    again = run(*options(work, "killed/web"))
    assert again.returncode == 0, again.stderr
    store = TokenStore(work / "killed" / "web", "killed")
    assert store.hash == whole.hash
    assert (store.folder / "train-00000.json").stat().st_mtime_ns == written
    assert run(*options(work, "killed/web")).stdout == again.stdout

    source = SourceConfig(kind=SourceKind.store, path=str(store.folder))
    cfg = DataConfig(cache_dir=str(work / "cache"), sources={"web": source})
    loader = build_loader(cfg, build_tokenizer(cfg), 0, 1)
    assert loader.plan(4, 1000).counts.tokens == 4000
    assert sum(b.target_bytes for b in loader.validation(1000)) >= 20_000 - 10

    assert run("--verify", store.folder).returncode == 0
    shard = store.folder / "train-00001.tokens.npy"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    verified = run("--verify", store.folder)
    assert verified.returncode == 2
    assert "train-00001.tokens.npy has sha256" in verified.stderr


def test_a_full_disk_is_named_in_one_line_and_the_store_goes_on(work, capsys):
    """Each file in turn lies on a full disk: ``/dev/full`` refuses what is written to it."""
    asked = [str(option) for option in options(work, "full/web")]
    folder = work / "full" / "web.partial"
    folder.mkdir(parents=True)
    for name in ("train-00001.tokens.npy", "token_counts.npy", "validation.text.bin"):
        (folder / name).symlink_to("/dev/full")
        assert main(asked) == 1
        told = capsys.readouterr().err
        assert f"error: --out {work}/full/web: No space left on device: the disk of" in told
        assert "Traceback" not in told
        (folder / name).unlink()
    assert main(asked) == 0
    assert main([str(option) for option in options(work, "one/web")]) == 0
    stores = [TokenStore(work / name / "web", name) for name in ("full", "one")]
    assert stores[0].hash == stores[1].hash


def test_help_and_bad_input(work):
    help_text = run("--help")
    assert help_text.returncode == 0
    assert "--workers" in help_text.stdout
    missing = run("--out", work / "x", "--kind", "text", "--path", work / "none")
    assert missing.returncode == 2
    assert missing.stderr == f"error: {work / 'none'}: no such file or folder\n"
    assert missing.stderr.count("\n") == 1
    foreign = run("--out", work, "--kind", "embedded")
    assert foreign.returncode == 2
    assert "is not a token store" in foreign.stderr


TEXTS = ["plain words " * 30, "plain words " * 30, "русский текст", "", "中文", "a <|endoftext|> b"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_one_command_makes_a_store_and_says_what_it_holds(kind, tmp_path, capsys, monkeypatch):
    """From what lies there; the figures beside a count by hand. A byte is a token, plus one end."""
    monkeypatch.chdir(tmp_path)
    place = Path("set") if kind == "folder" else Path(f"mine.{kind}")
    if kind == "jsonl":
        place.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    elif kind == "parquet":
        pq.write_table(pa.table({"text": TEXTS}), place)
    else:
        place.mkdir()
        for number, text in enumerate(TEXTS):
            (place / f"{number}.md").write_text(text)
    words = [str(place), "--tokenizer", "byte", "--validation-bytes", "0"]
    words += ["--cache-dir", str(tmp_path / "cache")]  # a relative one lies in the repository
    assert main(words) == 0
    out = capsys.readouterr().out
    held = [text for text in TEXTS if text]
    size = sum(len(text.encode()) for text in held)
    store = TokenStore(Path("stores") / place.stem, "made")
    assert store.train.num_tokens == size + len(held)
    assert f"{len(held)} with text" in out
    assert f"{size:,} bytes, {size + len(held):,} tokens" in out
    assert f"{size / (size + len(held)):.2f} bytes a token" in out
    assert "1 documents whose whole text came before" in out
    assert "document 0, 360 bytes: 'plain words plain" in out
    lengths = sorted(len(text.encode()) + 1 for text in held)
    assert f"0% {lengths[0]}, 10% {lengths[0]}, 50% {lengths[2]}, 90% 361, 99% 361, 100% 361" in out
    letters = sum(c.isalpha() for text in held for c in text)
    assert f"cyrillic {12 / letters:.1%}, " in out
    assert f"cjk {2 / letters:.1%}" in out


def test_strings_of_control_tokens_in_the_text_are_told(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS) + " one more word" * 200)
    words = [str(tmp_path / "a.txt"), "--out", str(tmp_path / "store"), "--vocab-size", "512",
             "--validation-bytes", "0", "--cache-dir", str(tmp_path / "cache")]  # fmt: skip
    assert main(words) == 0
    out = capsys.readouterr().out
    tokenizer = TokenStore(tmp_path / "store", "made").tokenizer
    (found,) = [string for string in control_strings(tokenizer) if string in "".join(TEXTS)]
    assert f"control     {found!r} in 1\n" in out
    assert tokenizer.encode(found) != [tokenizer.eos_id]  # it is read as plain text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "name a source"),
        (["a", "--path", "b"], "name one source"),
        (["--out", "x", "--kind", "text", "nothing.txt"], "nothing.txt"),
        (["nowhere"], "nowhere: there is no such file, folder or pattern, and a dataset"),
    ],
)
def test_a_source_that_cannot_be_is_one_line(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mine.jsonl", "--text-key", "body"],
         "error: mine.jsonl: mine.jsonl line 1: --text-key body is not among the keys text"
         " (--on-bad-line skip leaves such a line out)"),
        (["mine.jsonl", "--unit", "line"], "error: --unit line has no effect: --kind jsonl"),
        (["mine.jsonl", "--vocab-size", "9"], "error: --vocab-size 9 must be 512 or more for"),
        (["mine.jsonl", "--validation-fraction", "1"],
         "all are held out (--validation-fraction 1.0)"),
        (["mine.jsonl", "--tokenizer", "nothing.json"],
         "error: --tokenizer nothing.json: no such file or folder"),
        (["mine.jsonl", "--cache-dir", "{here}/mine.jsonl"],
         "error: --cache-dir: cannot write to "),
        (["--kind", "embedded", "--packages", "no_such"],
         "error: --packages: package no_such is not installed here"),
        (["mine.jsonl", "--vocab-size", "9000", "--validation-bytes", "0"],
         "data: --vocab-size 9000, but the text has pairs for "),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_said_is_said_in_this_commands_options(words, says, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    lines = [json.dumps({"text": f"one {n} two"}) for n in range(9)]
    Path("mine.jsonl").write_text("\n".join(lines))
    told = io.StringIO()
    handler = logging.StreamHandler(told)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    monkeypatch.setattr(sys, "stderr", told)
    own = [] if "--cache-dir" in words else ["--cache-dir", str(tmp_path / "cache")]
    main([word.format(here=tmp_path) for word in (*words, *own, "--no-summary", "--out", "here")])
    assert says in told.getvalue()
    assert "data." not in told.getvalue().replace("data: ", "")
    kept = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if ".partial" in p.name]
    assert kept == []
