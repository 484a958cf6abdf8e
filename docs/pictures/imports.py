"""Draw the import graph of a tree: rooms as boxes on floors, an arrow from who imports to what.

    python docs/pictures/imports.py docs/pictures/imports.png
    git archive f553f01 | tar x -C /tmp/before
    python docs/pictures/imports.py docs/pictures/imports_before.png --tree /tmp/before

A room is a folder of Python files. In a package that has rooms, the files at its top stand for
themselves; those on one floor share a box. A box lies one floor above the highest that it imports
from. Of the arrows only those are drawn that no longer way says too. Where boxes import each other
in a circle, arrows are red.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from pathlib import Path

from matplotlib.figure import Figure

PACKAGES = ("conf", "data", "model", "optim", "quant", "parallel", "train", "scripts")
Arrows = Counter[tuple[str, str]]


def files_of(tree: Path) -> dict[str, Path]:
    """Module -> file, of every package."""
    found = [path for package in PACKAGES for path in sorted((tree / package).rglob("*.py"))]
    return {".".join(path.relative_to(tree).with_suffix("").parts): path for path in found}


def imports(files: dict[str, Path]) -> set[tuple[str, str]]:
    """(importing module, imported module) for every pair of files."""
    found = set()
    for module, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            for name in names:
                if name in files or f"{name}.__init__" in files:
                    found.add((module, name if name in files else f"{name}.__init__"))
    return found


def floors(rooms: list[str], arrows: Arrows) -> dict[str, int]:
    """Room -> floor; in a circle they stop rising after as many rounds as there are rooms."""
    floor = dict.fromkeys(rooms, 0)
    for _ in rooms:
        for above, below in arrows:
            if (below, above) not in arrows:
                floor[above] = max(floor[above], floor[below] + 1)
    return floor


def implied(arrow: tuple[str, str], arrows: Arrows) -> bool:
    """Whether a longer way leads from one end of an arrow to the other."""
    start, end = arrow
    seen, todo = {start}, [below for above, below in arrows if above == start and below != end]
    while todo:
        room = todo.pop()
        if room == end:
            return True
        if room not in seen:
            seen.add(room)
            todo += [below for above, below in arrows if above == room]
    return False


def boxes(
    modules: list[str], arrows: set[tuple[str, str]]
) -> tuple[dict[str, str], dict[str, int]]:
    """Module -> its box, and box -> floor."""
    folder = {m: m.rpartition(".")[0] for m in modules}
    with_rooms = {f.partition(".")[0] for f in folder.values() if "." in f}
    room = {m: m if f in with_rooms else f for m, f in folder.items()}
    between = Counter((room[a], room[b]) for a, b in arrows if room[a] != room[b])
    floor = floors(sorted({*room.values()}), between)
    box, level = {}, {}
    for module in modules:
        top = folder[module] in with_rooms
        box[module] = f"{folder[module]}/ {floor[module]}" if top else room[module]
        level[box[module]] = floor[room[module]]
    return box, level


def label(box: str, modules: list[str], inside: int) -> str:
    """What stands in a box."""
    names = [module.rpartition(".")[2] for module in modules]
    if "/ " in box:
        title = f"{box.partition('/ ')[0]}/"
        return f"{title} {', '.join(names)}" if len(names) < 4 else f"{title} {len(names)} files"
    return f"{box}\n{len(names)} files, {inside} arrows inside"


def draw(tree: Path, out: Path) -> str:
    """Draw, and return what is counted."""
    files = files_of(tree)
    modules = [m for m in files if not m.endswith("__init__") or files[m].stat().st_size > 100]
    arrows = {(a, b) for a, b in imports(files) if a in modules and b in modules}
    box, floor = boxes(modules, arrows)
    between = Counter((box[a], box[b]) for a, b in arrows)
    inside = {name: between.pop((name, name), 0) for name in floor}
    members = {name: [m for m in modules if box[m] == name] for name in floor}
    rows = [sorted(n for n in floor if floor[n] == f) for f in range(max(floor.values()) + 1)]
    width = max(map(len, rows))
    place = {
        name: ((k + 0.5) * width / len(row) + (0.2 if y % 2 else -0.2), y)
        for y, row in enumerate(rows)
        for k, name in enumerate(row)
    }
    figure = Figure(figsize=(2.3 * width, 0.9 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots()
    for arrow in between:
        circle = arrow[::-1] in between
        if circle or not implied(arrow, between):
            style = {"arrowstyle": "->", "color": "crimson" if circle else "#89a"}
            style |= {"lw": 1.5 if circle else 0.8, "shrinkA": 14, "shrinkB": 16}
            axes.annotate("", xy=place[arrow[1]], xytext=place[arrow[0]], arrowprops=style)
    for name, (x, y) in place.items():
        edge = f"C{PACKAGES.index(name.partition('.')[0].partition('/')[0])}"
        look = {"boxstyle": "round", "facecolor": "white", "edgecolor": edge, "lw": 1.5}
        text = label(name, members[name], inside[name])
        axes.text(x, y, text, ha="center", va="center", fontsize=8, bbox=look)
    axes.set(xlim=(-0.3, width + 0.3), ylim=(-0.6, len(rows) - 0.4))
    axes.axis("off")
    figure.savefig(out, dpi=80, metadata={"Software": None})
    circles = sum(arrow[::-1] in between for arrow in between) // 2
    rooms = Counter(m.rpartition(".")[0] for m in modules)
    return (
        f"{len(modules)} files in {len(rooms)} rooms, the largest of {max(rooms.values())};"
        f" {len(arrows)} arrows between files, {circles} circles between boxes"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[2])
    options = parser.parse_args()
    sys.stdout.write(draw(options.tree, options.out) + "\n")
