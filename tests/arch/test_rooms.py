"""The rooms of train/ and scripts/: arrows between them go one way, and none is crowded.

A room is a folder of a package; a file at the package's top is a room of its own. The picture of it
stands in ARCHITECTURE.md ("Rooms").
"""

import ast
import graphlib

import pytest

from scripts.__main__ import COMMANDS
from train.errors import ROOT

pytestmark = pytest.mark.core

MOST = 15  # files beside each other


def room_of(module: str) -> str:
    """``train.config.schema`` -> ``train.config``; ``train.loop`` stays."""
    parts = module.split(".")
    return ".".join(parts[:2])


def imported(path):
    """Modules that a file imports, by their full names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows(package):
    """Room -> rooms of the same package that it imports."""
    graph = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name == "__init__.py":
            continue
        here = graph.setdefault(room_of(module), set())
        for name in imported(path):
            if name.startswith(f"{package}.") and room_of(name) != room_of(module):
                here.add(room_of(name))
    return graph


@pytest.mark.parametrize("package", ["train", "scripts"])
def test_no_arrow_goes_up(package):
    graph = arrows(package)
    assert len(graph) > 5
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("package", ["train", "scripts"])
def test_no_room_is_crowded(package):
    for folder in [ROOT / package, *(p for p in (ROOT / package).rglob("*") if p.is_dir())]:
        files = [p for p in folder.iterdir() if p.is_file()]
        # At the top of scripts/ stands one file a command, with their list and the Slurm script.
        most = max(MOST, len(COMMANDS) + 2) if folder == ROOT / "scripts" else MOST
        assert len(files) <= most, f"{folder}: {len(files)} files"


def test_no_run_imports_what_exchanges_models():
    graph = arrows("train")
    for room, others in graph.items():
        assert "train.exchange" not in others, room


def test_no_package_of_scripts_hides_a_command():
    names = [p.stem for p in (ROOT / "scripts").iterdir() if p.name != "__pycache__"]
    assert len(set(names)) == len(names)
