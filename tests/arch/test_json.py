"""JSON that we write is strict: NaN and infinities, which no other reader takes, cannot get in."""

import ast

import pytest

from train.errors import ROOT

PACKAGES = ("model", "optim", "parallel", "quant", "data", "train", "scripts")


def is_json_dump(node):
    function = node.func if isinstance(node, ast.Call) else None
    return (
        isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Name)
        and (function.value.id, function.attr) in {("json", "dump"), ("json", "dumps")}
    )


def is_strict(call):
    told = {k.arg: k.value for k in call.keywords}
    return isinstance(told.get("allow_nan"), ast.Constant) and told["allow_nan"].value is False


@pytest.mark.core
def test_every_json_that_is_written_is_strict():
    calls = [
        (f"{path.relative_to(ROOT)}:{node.lineno}", node)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if is_json_dump(node)
    ]
    assert len(calls) > 20
    assert [where for where, call in calls if not is_strict(call)] == []


@pytest.mark.core
def test_json_is_imported_under_its_own_name():
    """So that the walk above sees every call."""
    others = [
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and node.module == "json")
        or (isinstance(node, ast.Import) and any(n.name == "json" and n.asname for n in node.names))
    ]
    assert others == []
