"""Commands look and end alike: ``scripts/cli/command.py``, one bootstrap, one list of them."""

import ast
import re
import subprocess
import sys

import pytest

import scripts.__main__ as MAIN
from scripts import bench
from tests.forked import run_forked
from train.errors import ROOT

pytestmark = pytest.mark.core


COMMANDS = sorted(
    path for path in (ROOT / "scripts").glob("*.py") if not path.stem.startswith("__")
)
LISTS = ("bench.py",)  # hand their words to another command
BOOTSTRAP = """if not __package__:  # run as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])
"""


def mains():
    """(file, its ``main``) of every command and benchmark."""
    for path in sorted((ROOT / "scripts").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                yield path, node


def file_of(module):
    return ROOT / f"{module.partition(':')[0].replace('.', '/')}.py"


def test_every_main_ends_by_the_one_rule():
    found = [(path, main) for path, main in mains() if path.name not in (*LISTS, "__main__.py")]
    assert len(found) > 15
    for path, main in found:
        assert [ast.unparse(d).split("(")[0] for d in main.decorator_list] == ["command"], path
        words = main.args.args[0]
        assert ast.unparse(words.annotation or words) == "Sequence[str] | None", path


def test_every_command_starts_alike():
    for path in COMMANDS:
        text = path.read_text(encoding="utf-8")
        assert BOOTSTRAP in text, path.name
        assert text.endswith('if __name__ == "__main__":\n    sys.exit(main())\n'), path.name
    inner = [p for p in (ROOT / "scripts").rglob("*.py") if p not in COMMANDS]
    for path in inner:
        assert path.name == "__main__.py" or "sys.path" not in path.read_text("utf-8"), path


def test_one_list_names_every_command():
    assert sorted(MAIN.COMMANDS) == sorted(["pretrain", *(path.stem for path in COMMANDS)])
    with_main = {path for path, _ in mains()}
    modules = {**MAIN.COMMANDS, **bench.BENCHMARKS}
    listed = {file_of(module) for module in modules.values()}
    assert with_main - {ROOT / "scripts/__main__.py"} <= listed


def test_docstrings_begin_with_one_sentence_for_the_list():
    for module in {**MAIN.COMMANDS, **bench.BENCHMARKS}.values():
        path = file_of(module)
        doc = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        assert re.fullmatch(r"\S.{10,}", doc.splitlines()[0]), path


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ([], 0, "prepare"),
        (["scores"], 2, "did you mean score?"),
        (["bench_step"], 2, "bench step"),
        (["bench", "setp"], 2, "did you mean step?"),
        (["bench", "step", "--help"], 0, "usage: bench step"),
        (["import-hf", "--help"], 0, "usage: v4 import_hf"),
        (["pretrain", "model=v4_nope"], 2, "v4_nope"),
    ],
)
def test_v4_runs_commands_by_name(words, code, told):
    assert_told(run_forked(words), code, told)


def test_v4_runs_as_a_folder_of_python():
    line = [sys.executable, str(ROOT / "scripts"), "scores"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert_told(done, 2, "did you mean score?")


def assert_told(done, code, told):
    assert done.returncode == code, done.stderr
    assert told in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_no_script_judges_errors_itself():
    """Except those that come from one run of several, which are data there."""
    for path in sorted((ROOT / "scripts").rglob("*.py")):
        if path.name != "command.py":
            assert "USER_ERRORS" not in path.read_text(encoding="utf-8"), path.name
