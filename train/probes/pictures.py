"""Probes as pictures: needles by depth and length, loss by position, attention by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def draw_needles(cells: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Heat maps, depth x length, one a kind; hatched where no window alone can reach.

    Args:
        cells: as in ``probe.json``.
        path: PNG to write.
        title: above the maps.
    """
    kinds = list(dict.fromkeys(cell["task"] for cell in cells))
    figure = Figure(figsize=(4.2 * len(kinds), 4), layout="constrained")
    maps = figure.subplots(1, len(kinds), squeeze=False)[0]
    for axes, kind in zip(maps, kinds, strict=True):
        draw_map(axes, [cell for cell in cells if cell["task"] == kind])
        axes.set(xlabel="tokens of the document", ylabel="depth of the needle", title=kind)
    figure.suptitle(f"{title}: answers that are right\n(hatched: beyond the stacked windows)")
    figure.savefig(path, dpi=100)


def draw_map(axes: Axes, cells: Sequence[dict[str, Any]]) -> None:
    """One heat map of right answers, depth x length; hatched where no window alone can reach.

    Args:
        axes: to draw on.
        cells: of one task, as in ``probe.json``.
    """
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    correct = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        at = depths.index(cell["depth"]), lengths.index(cell["length"])
        correct[at] = cell["correct"]
        axes.text(at[1], at[0], f"{cell['correct']:.2f}", ha="center", va="center", fontsize=7)
        if cell["beyond"]:
            box = [at[1] - 0.5, at[1] + 0.5], at[0] - 0.5, at[0] + 0.5
            axes.fill_between(*box, facecolor="none", edgecolor="k", hatch="//", alpha=0.25)
    axes.imshow(correct, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{d:.2f}" for d in depths])


def draw_positions(found: dict[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """Loss over the position in a document, a line a model."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, buckets in found.items():
        axes.plot([max(b["from"], 1) for b in buckets], [b["loss"] for b in buckets],
                  marker="o", label=name)  # fmt: skip
    axes.set_xscale("log")
    axes.set(xlabel="tokens before, from", ylabel="nats per token", title="loss by position")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def draw_attention(layers: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Bars of each layer: sink, window, entries by distance; and the indexer's recall."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    mass, recall = figure.subplots(1, 2)
    names = [f"{row['layer'].split('.')[1]} {row['kind']}" for row in layers]
    bottom = np.zeros(len(layers))
    buckets = list(dict.fromkeys(b for row in layers for b in row["entries"]))
    for label in ("sink", "window", *buckets):
        part = [row[label] if label in row else row["entries"].get(label, 0.0) for row in layers]
        name = label if label in ("sink", "window") else f"entries from {label}"
        mass.bar(names, part, bottom=bottom, label=name)
        bottom += part
    mass.set(ylabel="fraction of the attention", title=title)
    mass.tick_params(axis="x", rotation=90)
    mass.legend(fontsize=7)
    for row in layers:
        if row.get("recall"):
            recall.plot([max(int(b), 1) for b in row["recall"]], list(row["recall"].values()),
                        marker="o", label=row["layer"])  # fmt: skip
    recall.set(xlabel="tokens between query and entry, from", ylabel="fraction",
               title="best entries that the indexer chose", ylim=(0, 1.05))  # fmt: skip
    if recall.lines:
        recall.set_xscale("log")
        recall.legend(fontsize=7)
    figure.savefig(path, dpi=100)
