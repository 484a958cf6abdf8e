"""The map of every file at the end of ARCHITECTURE.md: one line a file, by its docstring.

    python -m tests.arch.code_map

writes a line for each file that has none and drops those whose file is gone; lines that stand there
stay as they are.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from train.errors import ROOT

DOCUMENT = ROOT / "ARCHITECTURE.md"
PACKAGES = ("conf", "model", "optim", "quant", "data", "parallel", "train", "scripts")
SUFFIXES = (".py", ".cpp", ".h", ".slurm")
BEGIN = "<!-- map: python -m tests.arch.code_map -->\n"
LINE = re.compile(r"^- `([^`]+)`: (.+)$", re.MULTILINE)


def files() -> Iterator[Path]:
    """Every source of the packages; an ``__init__`` only where it holds code."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            if path.suffix in SUFFIXES and (path.name != "__init__.py" or _holds_code(path)):
                yield path.relative_to(ROOT)


def _holds_code(path: Path) -> bool:
    return len(ast.parse(path.read_text("utf-8")).body) > 1


def clause(path: Path) -> str:
    """What a file's first sentence says of it."""
    text = (ROOT / path).read_text("utf-8")
    if path.suffix == ".py":
        text = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    else:
        lines = [line for line in text.splitlines() if not line.startswith("#!")]
        text = " ".join(line.lstrip("/# ") for line in lines[:2])
    text = _plain(text)
    return re.split(r"[.;:] ", f"{text} ")[0] if len(text) > 110 else text.rstrip(".: ")


def _plain(text: str) -> str:
    """One line, without the markup of docstrings."""
    return " ".join(re.sub(r":\w+:(?=`)", "", text.replace("``", "`")).split())


def section() -> str:
    """The map, as the document holds it."""
    return DOCUMENT.read_text("utf-8").partition(BEGIN)[2]


def told() -> list[tuple[str, str]]:
    """(path, clause) of every line, in order."""
    found, folder = [], ""
    for line in section().splitlines():
        if line.startswith("**"):
            folder = line.split("**")[1]
        elif (match := LINE.match(line)) is not None:
            found.append((f"{folder}{match[1]}", match[2]))
    return found


def written() -> str:
    """The map as it should be."""
    known, parts, folder = dict(told()), [], None
    for path in sorted(files(), key=lambda p: (PACKAGES.index(p.parts[0]), str(p.parent), p.name)):
        if path.parent != folder:
            folder = path.parent
            parts.append(f"\n**{folder}/** {_room(folder)}".rstrip() + "\n")
        parts.append(f"- `{path.name}`: {known.get(str(path)) or clause(path)}")
    return "\n".join(parts) + "\n"


def _room(folder: Path) -> str:
    """What a package says of itself, where it does."""
    init = ROOT / folder / "__init__.py"
    text = init.read_text("utf-8") if init.is_file() and not _holds_code(init) else ""
    said = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    return "" if "ARCHITECTURE.md" in said else _plain(said)


if __name__ == "__main__":
    before = DOCUMENT.read_text("utf-8").partition(BEGIN)[0]
    DOCUMENT.write_text(before + BEGIN + written(), "utf-8")
