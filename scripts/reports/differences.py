"""Why two runs differ: config, code, data, layout and machine side by side, and where they part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.record.metrics import MEASURED
from train.record.ranking import RunSummary, has_effect

_ASPECTS = ("code", "data", "layout", "environment")


@dataclass(frozen=True)
class RunDifference:
    """One thing in which runs differ.

    Attributes:
        aspect: config, code, data, layout or environment.
        key: dotted.
        values: of each run, as text.
    """

    aspect: str
    key: str
    values: tuple[str, ...]


def differences(runs: Sequence[RunSummary]) -> list[RunDifference]:
    """Everything in which some run differs from another, the config first.

    What a run has not recorded, since it has not ended, differs from nothing.
    """
    found = _differing("config", [run.config for run in runs])
    found = [d for d in found if has_effect(d.key)]
    for aspect in _ASPECTS:
        found += _differing(aspect, [run.aspect(aspect) for run in runs])
    return found


def parting_step(one: RunSummary, other: RunSummary) -> int | None:
    """First step whose unmeasured fields differ; None where the common steps are equal bit for bit.

    Only fields that both wrote count: an archive holds fewer.
    """
    for a, b in zip(one.records, other.records, strict=False):
        shared = (a.keys() & b.keys()) - MEASURED
        if any(a[key] != b[key] for key in shared):
            return int(a["step"])
    return None


def explain(runs: Sequence[RunSummary]) -> str:
    """One line: in which aspects the runs differ, and where they part."""
    found = differences(runs)
    aspects = [name for name in ("config", *_ASPECTS) if any(d.aspect == name for d in found)]
    steps = [parting_step(runs[0], other) for other in runs[1:]]
    if any(not run.records for run in runs):
        where = ""
    elif all(step is None for step in steps):
        where = "; losses are equal bit for bit"
    else:
        first = min(step for step in steps if step is not None)
        where = f"; they part at step {first}"
    counts = [f"{name} ({sum(d.aspect == name for d in found)})" for name in aspects]
    said = f"they differ in {', '.join(counts)}" if counts else "config, code and data are equal"
    return said + where


def _differing(aspect: str, trees: Sequence[Any]) -> list[RunDifference]:
    flat = [dict(flatten(tree)) for tree in trees]
    keys = {key: None for tree in flat for key in tree}  # in order, each once
    found = []
    for key in keys:
        values = [tree.get(key, "absent") if tree else "not recorded" for tree in flat]
        known = [value for value, tree in zip(values, flat, strict=True) if tree]
        if any(value != known[0] for value in known):
            found.append(RunDifference(aspect, key, tuple(str(value) for value in values)))
    return found


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and leaves of nested dicts and lists."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}{key}.")
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        for index, item in enumerate(tree):
            yield from flatten(item, f"{prefix}{index}.")
    else:
        yield prefix.rstrip("."), tree
