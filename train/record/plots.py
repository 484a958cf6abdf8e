"""``loss.png``: what a user would look at rather than read, drawn from ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from train.record.metrics import Record

_PANELS = (
    ("loss (nats per token)", ("loss", "val_loss", "val_loss_average"), False),
    ("side losses", ("loss_mtp", "loss_indexer", "loss_balance"), False),
    ("gradient norm", ("grad_norm",), True),
    ("expert load", ("expert_load_cv", "expert_load_max"), False),
)


def draw_losses(records: Sequence[Record], path: Path, title: str) -> None:
    """Draw losses, gradient norm and expert load over trained tokens.

    Args:
        records: steps in order, as in ``metrics.jsonl``.
        path: PNG to write.
        title: above the panels.
    """
    figure = Figure(figsize=(11, 7))
    figure.subplots_adjust(left=0.06, right=0.98, top=0.9, bottom=0.08, hspace=0.35)
    for axes, (name, fields, log_scale) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for field in fields:
            _curve(axes, records, field)
        for tokens in rollbacks(records):
            axes.axvline(tokens, color="tab:red", linestyle=":", label="rollback to here")
        for tokens, stage in stage_edges(records):
            axes.axvline(tokens, color="0.5", linestyle="--", linewidth=0.8)
            axes.text(
                tokens, 0.02, f" {stage}", transform=axes.get_xaxis_transform(), rotation=90,
                color="0.4", fontsize=7, ha="right", va="bottom",
            )  # fmt: skip
        axes.set_title(name)
        axes.set_xlabel("tokens")
        axes.grid(alpha=0.3)
        axes.locator_params(nbins=6)
        if log_scale and axes.lines:
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(NullFormatter())
        if axes.lines:
            drawn = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
            axes.legend(drawn.values(), drawn.keys())  # one entry for all rollbacks
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def rollbacks(records: Sequence[Record]) -> list[int]:
    """Tokens at which the run was taken up again after a rollback."""
    return [
        before["tokens"]
        for before, after in pairwise(records)
        if after.get("rollbacks", 0) > before.get("rollbacks", 0)
    ]


def stage_edges(records: Sequence[Record]) -> list[tuple[int, str]]:
    """Tokens at which a stage began behind another one, with its name."""
    return [
        (before["tokens"], str(after["stage"]))
        for before, after in pairwise(records)
        if after.get("stage") != before.get("stage") and after.get("stage") is not None
    ]


def _curve(axes: Axes, records: Sequence[Record], field: str) -> None:
    points = [(r["tokens"], r[field]) for r in records if r.get(field) is not None]
    if points:
        tokens, values = zip(*points, strict=True)
        axes.plot(
            tokens, values, label=field, marker="o" if len(points) < 40 else None, markersize=3
        )
