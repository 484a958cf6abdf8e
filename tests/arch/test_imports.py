"""Imports go one way: model <- quant <- parallel <- train; optim, data leaves; conf below all."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.core

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {
    "conf": {"conf"},
    "model": {"model", "conf"},
    "optim": {"optim", "conf"},
    "data": {"data", "conf"},
    "quant": {"model", "quant", "conf"},
    "parallel": {"model", "quant", "parallel", "optim", "data", "conf"},
    "train": {"model", "quant", "parallel", "optim", "data", "train", "conf"},
}
ONLY_IN_TRAIN = {"hydra", "omegaconf", "wandb"}
FILES = [path for package in ALLOWED for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(top-level module, level) of every import statement, nested ones too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0], node.level


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    for module, level in imports(path):
        assert level == 0, f"{path}: relative import"
        if module in ALLOWED or module in ("scripts", "tests"):
            assert module in ALLOWED[package], f"{path}: {package} must not import {module}"
        if module in ONLY_IN_TRAIN:
            assert package == "train", f"{path}: {module} is for train/ only"


def test_rule_sees_a_nested_import(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from train.config import RunConfig\n    import hydra.core\n")
    assert list(imports(file)) == [("train", 0), ("hydra", 0)]
