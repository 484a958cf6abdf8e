"""Every script ends by the one rule of ``scripts/command.py``."""

import ast

import pytest

from train.errors import ROOT

pytestmark = pytest.mark.core


def mains():
    """(file, its ``main``, the source of what runs it as a file)."""
    for path in sorted((ROOT / "scripts").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                last = tree.body[-1]
                yield path.name, node, ast.unparse(last)


def test_every_main_is_a_command():
    found = list(mains())
    assert len(found) > 15
    for name, main, last in found:
        decorators = [ast.unparse(d).split("(")[0] for d in main.decorator_list]
        assert decorators == ["command"], name
        assert "sys.exit(main())" in last, name


def test_no_script_judges_errors_itself():
    """Except those that come from one run of several, which are data there."""
    for path in sorted((ROOT / "scripts").glob("*.py")):
        if path.name != "command.py":
            assert "USER_ERRORS" not in path.read_text(encoding="utf-8"), path.name
