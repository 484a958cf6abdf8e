"""Files, lines and public names of each package, of two trees side by side, as a Markdown table.

    git archive f553f01 | tar x -C /tmp/before
    python docs/pictures/counts.py /tmp/before .

Lines are all lines of Python and C++ files; a public name is a class or function at a module's top
without a leading underscore.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

PACKAGES = ("conf", "model", "optim", "quant", "data", "parallel", "train", "scripts", "tests")


def counts(tree: Path, package: str) -> tuple[int, int, int]:
    """(files, lines, public names) of one package."""
    files = [p for p in (tree / package).rglob("*") if p.suffix in (".py", ".cpp", ".h")]
    names = [
        node.name
        for path in files
        if path.suffix == ".py"
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    ]
    return len(files), sum(len(p.read_text("utf-8").splitlines()) for p in files), len(names)


def table(before: Path, now: Path) -> str:
    """The table."""
    rows = [(package, counts(before, package), counts(now, package)) for package in PACKAGES]
    sums = [[sum(part) for part in zip(*(row[k] for row in rows), strict=True)] for k in (1, 2)]
    lines = [
        "| package | files before | now | lines before | now | public names before | now |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, old, new in [*rows, ("all", *sums)]:
        pairs = " | ".join(f"{a:,} | {b:,}" for a, b in zip(old, new, strict=True))
        lines.append(f"| {name} | {pairs} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table(Path(sys.argv[1]), Path(sys.argv[2])) + "\n")
