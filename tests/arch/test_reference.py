"""What comments cite exists: sections of docs/reference, and the tests that it names."""

import re
from pathlib import Path

import pytest

from train.errors import ROOT

REFERENCE = ROOT / "docs" / "reference"
SOURCES = ("model", "optim", "parallel", "quant", "data", "train", "scripts", "tests", "conf")
CITED = re.compile(r"reference ([A-HP](?:\.\d+)?)\b(?:(?: and |, | to )([A-HP](?:\.\d+)?)\b)?")
# Names that stood for documents outside the repository.
OUTSIDE = re.compile(r"V4_SPEC|LESSONS|FAULTS\.md|KERNELS\.md|DESIGN section|CHAT_SPEC")


def files() -> list[Path]:
    suffixes = {".py", ".cpp", ".h", ".yaml"}
    found = [p for name in SOURCES for p in (ROOT / name).rglob("*") if p.suffix in suffixes]
    return [path for path in found if path != Path(__file__)]


def sections() -> set[str]:
    heading = re.compile(r"^#+ ([A-HP](?:\.\d+)?)\b", re.M)
    return {s for path in REFERENCE.glob("*.md") for s in heading.findall(path.read_text())}


@pytest.mark.core
def test_cited_sections_exist():
    known, cited = sections() | set("ABCDEFGHP"), set()
    for path in files():
        for found in CITED.finditer(path.read_text(encoding="utf-8")):
            for section in filter(None, found.groups()):
                cited.add(section)
                assert section in known, f"{path.relative_to(ROOT)} cites {section}"
    assert len(cited) > 20  # the pattern still finds them


@pytest.mark.core
def test_nothing_cites_documents_that_are_not_here():
    citing = [p for p in files() if OUTSIDE.search(p.read_text(encoding="utf-8"))]
    assert citing == []


@pytest.mark.core
def test_tests_that_the_reference_names_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (REFERENCE / "failures.md").read_text())
    assert len(named) > 30
    for file, function in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not function or f"def {function}(" in source, f"{file}::{function}"
