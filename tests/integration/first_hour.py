"""The first hour of a new user, run: README's commands on text of their own, and what they print.

    python -m tests.integration.first_hour

writes docs/first_hour.md anew. The commands are those of the README, run in a folder of their own;
the transcript shows how each begins and how it ends.
"""

from __future__ import annotations

import io
import re
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

from scripts.__main__ import COMMANDS
from tests.forked import run_forked
from tests.helpers import ROOT

DOCUMENT = ROOT / "docs" / "first_hour.md"
HEAD = """# The first hour

What the README's commands print, with this repository's own reference as text: a model of 1 M
parameters is trained, scored, exported, scored again (the export is in bf16), trained with another
optimizer, and both runs are compared. Made by `python -m tests.integration.first_hour`; a test runs
the same commands and looks for these lines, numbers aside.
"""
SHOWN = 8  # lines at either end of a command's output


def readme_commands() -> list[str]:
    """Those of the README's block that ends in a report of both runs."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    block = next(b for b in blocks if "v4 report runs/first runs/second" in b)
    return block.splitlines()


def run_in(folder: Path, more: Sequence[str] = ()) -> Iterator[tuple[str, list[str]]]:
    """Run the commands with ``runs/`` moved to a folder; gives each with the lines it printed.

    Args:
        folder: stands for ``runs``.
        more: overrides of both runs, which make them shorter.
    """
    for command in readme_commands():
        _, name, *words = shlex.split(command)
        words = [word.replace("runs/", f"{folder}/") for word in words]
        if name == "report":
            words += ["--out", f"{folder}/comparison"]
        if name == "pretrain":
            printed = _pretrain([*words, *more, f"data.cache_dir={folder}/data"])
        else:
            printed = _call(name, words)
        yield command, [line.replace(f"{folder}/", "runs/") for line in printed.splitlines()]


def _pretrain(words: list[str]) -> str:
    """A process of its own: what a run prints goes past Python's streams."""
    done = run_forked(["pretrain", *words], OMP_NUM_THREADS="1")
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return done.stdout + done.stderr


def _call(name: str, words: list[str]) -> str:
    """In this process: imports cost more than such a command."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        code = import_module(COMMANDS[name]).main(words)
    if code:
        raise RuntimeError(printed.getvalue())
    return printed.getvalue()


def shown(lines: list[str]) -> list[str]:
    """What the document shows of an output: its ends, without what a model of 1 M wrote."""
    lines = [line for line in lines if line.strip()]
    for i, line in enumerate(lines):
        if line.startswith("sample ("):
            end = next(k for k in range(i, len(lines)) if lines[k].startswith("validation text"))
            lines[i + 1 : end] = ["..."]
            break
    return lines if len(lines) <= 2 * SHOWN + 1 else [*lines[:SHOWN], "...", *lines[-SHOWN:]]


def transcript(outputs: list[tuple[str, list[str]]]) -> str:
    """The document."""
    blocks = [
        "```console\n" + "\n".join([f"$ {command}", *shown(lines)]) + "\n```\n"
        for command, lines in outputs
    ]
    return "\n".join([HEAD, *blocks])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        DOCUMENT.write_text(transcript([*run_in(Path(name))]), encoding="utf-8")
