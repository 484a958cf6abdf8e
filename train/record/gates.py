"""The audit's verdict over the run on the gates: did one stay collapsed, did experts stay idle?

The first steps alone cannot tell: under Muon gates collapse in them and come back. What is judged
is the end of ``metrics.jsonl``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from model.config import ModelConfig
from train.record.metrics import metric_of

COLLAPSED = 0.9  # of the largest load that a gate can give
PATIENCE = 10  # records in a row that make a sign of it
_COPIES = 20  # tokens for each expert of a step; below, an expert without any is chance
_TWICE = 2.0


def largest_load(model: ModelConfig) -> float:
    """Over the mean: every token goes to the same experts."""
    return model.n_routed_experts / model.num_experts_per_tok


def is_collapsed(record: Mapping[str, Any], model: ModelConfig) -> bool | None:
    """Whether a gate gave nearly all that it can to one expert; None: there is no gate to judge."""
    load, most = record.get("expert_load_max"), largest_load(model)
    return None if load is None or most <= 1 else load >= COLLAPSED * most


def has_idle(record: Mapping[str, Any], before: int | None, model: ModelConfig) -> bool | None:
    """Whether an expert got no token, of so many that it is no chance; None: nothing to judge.

    Args:
        record: of a step.
        before: tokens trained before it; None: not known.
        model: the sizes.
    """
    dead = record.get("dead_experts")
    if dead is None or before is None:
        return None
    copies = (record["tokens"] - before) * model.num_experts_per_tok
    return None if copies < _COPIES * model.n_routed_experts else dead > 0


def gates_over_the_run(
    records: Sequence[Mapping[str, Any]], model: ModelConfig
) -> tuple[dict[str, Any], list[str]]:
    """The verdict, for the receipt, and a warning with its remedy for each thing that is wrong.

    Args:
        records: of ``metrics.jsonl``, in order.
        model: bounds what a gate can do.
    """
    before = [0, *(int(record["tokens"]) for record in records)]
    signs = {
        "expert_load_max": [is_collapsed(record, model) for record in records],
        "dead_experts": [has_idle(r, b, model) for r, b in zip(records, before, strict=False)],
    }
    stays = [
        metric
        for metric, held in signs.items()
        if len(held) >= PATIENCE and all(held[-PATIENCE:])  # None, not judged, is not held
    ]
    uneven = [r["step"] for r in records if (r.get("expert_load_max") or 0) > _TWICE]
    verdict = {
        "steps": len(records),
        "collapsed_steps": signs["expert_load_max"].count(True),
        "steps_with_idle_experts": signs["dead_experts"].count(True),
        "last_step_above_twice_the_mean": uneven[-1] if uneven else 0,
        "stays": stays,
    }
    return verdict, [_warning(metric, records[-1], model) for metric in stays]


def _warning(metric: str, last: Mapping[str, Any], model: ModelConfig) -> str:
    what = {
        "expert_load_max": f"a gate has stayed collapsed to the end: its busiest expert gets"
        f" {last[metric] or 0:.3g} times the mean of {largest_load(model):.3g} that are possible",
        "dead_experts": f"experts have stayed idle to the end: {last[metric] or 0:.0f} of them",
    }
    return f"{what[metric]} ({metric}); {metric_of(metric).advice}"
