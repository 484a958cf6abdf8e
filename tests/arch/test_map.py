"""ARCHITECTURE.md names every file of the packages once, with a clause that says what it is."""

import re

import pytest

from tests.arch.code_map import DOCUMENT, files, told
from train.errors import ROOT

pytestmark = pytest.mark.core


def test_map_names_every_file_once():
    named = [path for path, _ in told()]
    there = [str(path) for path in files()]
    advice = "run: python -m tests.arch.code_map"
    assert sorted(set(there) - set(named)) == [], f"not in ARCHITECTURE.md; {advice}"
    assert sorted(set(named) - set(there)) == [], f"gone, but in ARCHITECTURE.md; {advice}"
    assert len(named) == len(set(named))


def test_map_says_something_of_every_file():
    short = [path for path, clause in told() if len(clause) < 15]
    assert short == []


PATH = re.compile(r"`((?:train|model|optim|quant|data|parallel|conf|scripts|tests|docs)/[\w/.]+)`")


def test_paths_in_the_text_exist():
    """But for placeholders such as ``conf/model/x.yaml``."""
    paths = {p for p in PATH.findall(DOCUMENT.read_text("utf-8"))}
    paths = {p for p in paths if not re.search(r"/x[._]|NAME", p)}
    assert len(paths) > 50
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
