"""Which files a path means: links, hidden and odd names, patterns, what is left out."""

import os
from pathlib import Path

import pytest

from data.config import SourceConfig, SourceKind
from data.errors import ConfigError
from data.files import FoundFiles, find_files

pytestmark = pytest.mark.core


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def found(path: Path | str, kind: str = "text") -> FoundFiles:
    return find_files("s", SourceConfig(SourceKind(kind), str(path)))


def names(folder: Path, path: str = "", kind: str = "text") -> list[str]:
    return [os.path.relpath(p, folder) for p in found(folder / path, kind).files]


def test_a_folder_is_read_below_links_and_without_hidden_names(tmp_path):
    make(tmp_path, "elsewhere/deep/c.txt")
    folder = tmp_path / "corpus"
    make(
        folder,
        "b.md",
        "a/x.TXT.gz",
        "a-b.txt",
        "._b.md",
        ".ipynb_checkpoints/b.txt",
        "a/.git/h.txt",
    )
    (folder / "link").symlink_to("../elsewhere")
    (folder / "again.txt").symlink_to("b.md")  # the first name counts
    (folder / "a" / "round").symlink_to("..")
    (folder / "elsewhere too").symlink_to("../elsewhere/deep")
    expected = ["a-b.txt", "a/x.TXT.gz", "again.txt", "elsewhere too/c.txt"]
    assert names(folder) == expected
    moved = folder.rename(tmp_path / "moved")
    assert names(moved) == expected
    (tmp_path / "by link").symlink_to("moved")
    assert names(tmp_path / "by link") == expected


def test_what_is_left_out_is_counted_and_named(tmp_path):
    make(tmp_path, "a.jsonl", "b.tex", "c.tex", "sub/d.jsonl.gz", "e", ".f", "sub/.g/h.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    told = found(tmp_path, "jsonl").left_out()
    assert (
        told
        == f"4 of other kinds (.jsonl 1, .tex 2, none 1; {tmp_path}/b.tex) and 2 with hidden names"
    )
    make(tmp_path / "plain", "a.txt")
    assert found(tmp_path / "plain").left_out() == ""


@pytest.mark.parametrize(
    ("kind", "suffixes"),
    [
        ("text", "txt text md rst txt.gz md.bz2 rst.xz txt.zst"),
        ("jsonl", "jsonl ndjson json jsonl.gz ndjson.bz2 json.xz jsonl.zst"),
        ("parquet", "parquet"),
    ],
)
def test_suffixes_of_a_kind(tmp_path, kind, suffixes):
    wanted = [f"x.{suffix}" for suffix in suffixes.split()]
    make(tmp_path, *wanted, "x.csv", "x.gz", "x.zip")
    assert names(tmp_path, kind=kind) == sorted(wanted)


def test_literal_names_come_before_patterns(tmp_path):
    make(tmp_path, "br[1]/x.txt", "br1/y.txt", "a*b.jsonl", "axb.jsonl", "a[", "odd\nname.txt")
    assert names(tmp_path, "br[1]") == ["br[1]/x.txt"]
    assert names(tmp_path, "br[1]/*.txt") == ["br[1]/x.txt"]
    assert names(tmp_path, "a*b.jsonl", "jsonl") == ["a*b.jsonl"]
    assert names(tmp_path, "a*.jsonl", "jsonl") == ["a*b.jsonl", "axb.jsonl"]
    assert names(tmp_path, "a[") == ["a["]
    assert names(tmp_path, "odd?name*") == ["odd\nname.txt"]


def test_patterns(tmp_path):
    make(tmp_path, "a/1.txt", "a/b/2.txt", "a/b/.h/3.txt", "c/4.csv", "c/5.txt", ".d/6.txt")
    (tmp_path / "a" / "b" / "up").symlink_to("..")
    (tmp_path / "a" / "b" / "up too").symlink_to("..")
    assert names(tmp_path, "**/*.txt") == ["a/1.txt", "a/b/2.txt", "c/5.txt"]
    assert names(tmp_path, "*/*.txt") == ["a/1.txt", "c/5.txt"]
    assert names(tmp_path, "[ac]") == [
        "a/1.txt",
        "a/b/2.txt",
        "c/5.txt",
    ]  # folders are read as such
    assert names(tmp_path, "c/*") == ["c/4.csv", "c/5.txt"]  # named, whatever the suffix
    assert names(tmp_path, ".d/*") == [".d/6.txt"]
    assert names(tmp_path, "a/**/[2-9].txt") == ["a/b/2.txt"]
    assert names(tmp_path, "a/**") == ["a/1.txt", "a/b/2.txt"]
    assert names(tmp_path, "a/../c/5*") == ["c/5.txt"]


def test_a_relative_pattern_starts_where_the_command_runs(tmp_path, monkeypatch):
    make(tmp_path, "a/1.txt", "b.txt")
    monkeypatch.chdir(tmp_path)
    assert found("**").files == ["./a/1.txt", "./b.txt"]
    assert found("*.txt").files == ["b.txt"]
    assert found(".").files == ["./a/1.txt", "./b.txt"]


def test_the_pattern_that_is_told_reads_the_other_files(tmp_path):
    make(tmp_path, "code/a.pm", "code/lib/b.pm", "code/c.dict")
    with pytest.raises(ConfigError) as caught:
        found(f"{tmp_path}/code")
    behind = str(caught.value).rpartition("; with ")[2].partition(" ")[0]
    pattern = f"{tmp_path}/code{behind}"
    assert [Path(file).name for file in found(pattern).files] == ["a.pm", "b.pm"]


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("none", "none: no such file or folder"),
        ("*.none", "no file matches"),
        ("nul\0", r"nul\\x00'?: no such file or folder"),
        ("n" * 300, "no such file or folder"),
        ("a.txt/b.txt", "no such file or folder"),
        ("pipe", "pipe is not a regular file"),
        ("broken", "broken: a broken link"),
        ("dangling", r"dangling/x\.bin: a broken link"),
        ("empty", r"has no \.txt \.text \.md \.rst \(or with \.gz .*\) file, but nothing"),
        (
            "others",
            r"file, but 1 of other kinds \(\.csv 1; .*x\.csv\) and 1 with hidden names"
            r"; with /\*\*/\*\.csv behind it the path names files of any kind",
        ),
    ],
)
def test_a_path_that_means_nothing_is_refused_in_one_line(tmp_path, path, problem):
    make(tmp_path, "a.txt", "others/x.csv", "others/.h.txt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to("nothing")
    (tmp_path / "dangling" / "x.bin").symlink_to("nothing")
    with pytest.raises(ConfigError, match=problem) as caught:
        found(f"{tmp_path}/{path}")
    assert str(caught.value).startswith("data.sources.s.path=")
    assert str(caught.value).isprintable()


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    """By a planted error: nothing is forbidden to root."""
    make(tmp_path, "a.txt", "closed/b.txt")
    listdir = os.listdir

    def refuse(path: str) -> list[str]:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(ConfigError, match=r"cannot list .*closed: Permission denied"):
        found(tmp_path)
