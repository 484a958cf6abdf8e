"""Names and bytes of files: nothing shadows another module, all is ASCII, git ignores no source."""

import ast
import re
import sys
import tomllib
from collections import Counter, defaultdict
from enum import StrEnum
from importlib import import_module
from pathlib import Path

import pytest

pytestmark = pytest.mark.core

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("train", "model", "optim", "parallel", "quant", "data", "conf")
SOURCES = sorted(
    path
    for folder in (*PACKAGES, "scripts", "conf")
    for suffix in ("*.py", "*.yaml")
    for path in (ROOT / folder).rglob(suffix)
)


def test_sources_are_ascii_without_tabs_or_trailing_blanks():
    assert len(SOURCES) > 50
    for path in SOURCES:
        text = path.read_bytes()
        assert text.isascii(), path
        assert b"\t" not in text, path
        assert not re.search(rb"[ \t]+\n", text), path
        assert text == b"" or text.endswith(b"\n"), path


def test_yaml_lines_are_short():
    for path in SOURCES:
        if path.suffix == ".yaml":
            assert max(map(len, path.read_text().splitlines())) <= 110, path


def test_files_have_snake_case_names_and_no_utils():
    for path in SOURCES:
        assert re.fullmatch(r"(__init__|__main__|[a-z][a-z0-9_]*)", path.stem), path
        assert path.stem not in ("utils", "util", "helpers", "misc", "common"), path


def test_nothing_that_runs_as_a_file_shadows_a_module():
    """``python train/x.py`` puts train/ first on sys.path for a moment."""
    taken = set(sys.stdlib_module_names) | set(PACKAGES) | {"torch", "numpy", "hydra", "yaml"}
    for folder in ("train", "scripts"):
        for path in (ROOT / folder).iterdir():
            assert path.stem.startswith("__") or path.stem not in taken, path


def test_packages_are_listed_for_the_installer():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = [
        str(path.parent.relative_to(ROOT)).replace("/", ".")
        for package in (*PACKAGES, "scripts")
        for path in (ROOT / package).rglob("__init__.py")
    ]
    assert sorted(listed) == sorted(found)


def test_init_files_hold_at_most_a_table():
    for package in PACKAGES:
        for path in (ROOT / package).rglob("__init__.py"):
            text = path.read_text()
            assert not re.search(r"^\s*(def|class|if|for|while) ", text, re.M), path


def test_test_files_have_unique_names():
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_gitignore_is_anchored():
    """An unanchored ``data/`` or ``build/`` would drop sources."""
    for line in (ROOT / ".gitignore").read_text().split():
        anchored = line.startswith("/") or "." in line or line == "__pycache__/"
        assert anchored, line


def test_no_file_names_the_machine_it_was_written_on():
    here = re.compile("/" + r"(work|home|root)/\w+|localhost:\d{4}")
    for path in [*SOURCES, *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]:
        hit = here.search(path.read_text())
        assert hit is None, f"{path}: {hit and hit.group()}"


@pytest.mark.parametrize("package", PACKAGES[:])
def test_enum_names_equal_their_values(package):
    """Hydra takes the name, files hold the value."""
    if package == "data" or (ROOT / package / "config.py").is_file():
        module = import_module(f"{package}.config")
        for item in vars(module).values():
            if isinstance(item, type) and issubclass(item, StrEnum) and item is not StrEnum:
                assert all(member.name == member.value for member in item), item


def public_classes():
    """(name, file) of every public class, and of every public alias of a type."""
    for path in SOURCES:
        if path.suffix == ".py":
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef):
                    yield node.name, path
                elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    name = node.targets[0].id
                    if name[0].isupper() and not name.isupper():
                        yield name, path


def test_no_two_public_classes_share_a_name():
    """One word, one thing (the glossary of ARCHITECTURE.md); but each package has its error."""
    homes = defaultdict(set)
    for name, path in public_classes():
        homes[name].add(path)
    assert len(homes) > 250
    shared = {name for name, paths in homes.items() if len(paths) > 1 and name[0] != "_"}
    assert shared == {"ConfigError"}
