"""What a run reports: one table of metrics, and the file ``metrics.jsonl`` (reference P.1).

The file holds one JSON object a step, in order. Fields marked *measured* depend on the machine and
the moment; every other field is a function of config, data and code, equal between equal runs. A
value that is not a finite number is written as null. After a resume the file is cut back to the
checkpoint's step and goes on from there, so that it reads as if the run had never stopped. A
rollback cuts it in the same way: the abandoned steps are gone, step numbers go on from the
checkpoint's, ``rollbacks`` grows by one, and the first line says how many were abandoned.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.checkpoint.files import replace_durably
from train.errors import UserError


class Reduction(StrEnum):
    """How the values of microbatches and ranks become the value of a step."""

    sum = "sum"  # shares, normalised beforehand: they add up
    mean = "mean"  # <name>.sum over <name>.count, each added up
    same = "same"  # every rank knows the same value
    max = "max"  # the largest of any rank


@dataclass(frozen=True)
class Metric:
    """One field of ``metrics.jsonl``.

    Attributes:
        name: of the field; stable.
        unit: what it is, and its unit.
        reduction: over microbatches and ranks.
        measured: whether equal runs may differ in it.
        healthy: range in which a run that learns stays; empty: it is no sign of health.
        advice: what to do where it is not.
    """

    name: str
    unit: str
    reduction: Reduction
    measured: bool = False
    healthy: str = ""
    advice: str = ""


_BALANCE = (
    "raise train.bias_update_speed or train.balance_loss_weight, or take more tokens a step"
    " (train.global_batch_tokens)"
)
_OVERFIT = (
    "the text is learnt by heart: take more text or fewer steps, and keep the best weights with"
    " train.keep_best_checkpoints"
)
_SLOWER = (
    "lower optim.lr or lengthen optim.schedule.warmup_steps; train.recovery takes a run back behind"
    " steps that failed"
)
_FORMAT = "keep that part in a wider format (quant.experts, quant.kv, quant.indexer)"

METRICS = (
    Metric("step", "optimizer steps done", Reduction.same),
    Metric("tokens", "tokens trained, padding included", Reduction.same),
    Metric("stage", "name of the stage", Reduction.same),
    Metric(
        "loss", "nats per target token", Reduction.sum,
        healthy="falls from log(vocabulary); spikes pass in a few steps", advice=_SLOWER,
    ),
    Metric(
        "loss_mtp", "nats per target token, mean over depths", Reduction.sum,
        healthy="falls with loss, some tenths above it; 0 where its weight is 0",
        advice="lower train.mtp_loss_weight",
    ),
    Metric(
        "loss_indexer", "nats per query, mean over csa layers", Reduction.sum,
        healthy="falls, and stays below 1; 0 where its weight is 0",
        advice="raise train.indexer_loss_weight, or give the indexer a stage of phase warmup",
    ),
    Metric(
        "loss_balance", "1 at perfect balance, mean over learned layers", Reduction.sum,
        healthy="1 to 1.2; 0 where its weight is 0", advice=_BALANCE,
    ),
    Metric(
        "grad_norm", "global norm before clipping", Reduction.same,
        healthy="within 10 times its usual value", advice=_SLOWER,
    ),
    Metric("lr", "learning rate", Reduction.same),
    Metric(
        "skipped_steps", "steps whose update was left out, since the start", Reduction.same,
        healthy="0", advice=_SLOWER,
    ),
    Metric(
        "loss_spikes", "loss spikes since the start, abandoned steps included", Reduction.same,
        healthy="0, or a few in a long run", advice=_SLOWER,
    ),
    Metric(
        "rollbacks", "rollbacks since the start", Reduction.same, healthy="0", advice=_SLOWER
    ),
    Metric("abandoned_steps", "steps that a rollback took away before this one", Reduction.same),
    Metric("anticipated", "1 where earlier weights chose the experts", Reduction.same),
    Metric("documents", "document pieces of the step", Reduction.same),
    Metric(
        "padding", "fraction of the step's positions", Reduction.same, healthy="below 0.1",
        advice="shorten train.seq_len, or fill more of a row: data.packing",
    ),
    Metric("long_documents", "documents longer than their rows, since the start", Reduction.same),
    Metric(
        "left_out_tokens", "tokens of them that are not trained on", Reduction.same, healthy="0",
        advice="lengthen train.seq_len, or data.packing.long_documents=split",
    ),
    Metric(
        "epochs", "passes over the source passed over most often", Reduction.same,
        healthy="up to 4", advice=_OVERFIT,
    ),
    Metric("share.*", "fraction of the tokens read so far, per source", Reduction.same),
    Metric(
        "expert_load_cv", "deviation / mean of tokens per expert, mean over layers",
        Reduction.same, healthy="below 0.5 after the first steps", advice=_BALANCE,
    ),
    Metric(
        "expert_load_max", "largest / mean tokens per expert, worst layer", Reduction.same,
        healthy="below 0.9 of its bound n_routed_experts / num_experts_per_tok", advice=_BALANCE,
    ),
    Metric(
        "dead_experts", "experts that got no token, all layers", Reduction.same,
        healthy="0 where a step has 20 copies of tokens for each expert", advice=_BALANCE,
    ),
    Metric(
        "clamped", "fraction of expert activations", Reduction.mean, healthy="below 0.01",
        advice="lower optim.lr, or raise model.swiglu_limit",
    ),
    Metric(
        "indexer_captured_mass", "fraction of the teacher's mass in the top-k", Reduction.mean,
        healthy="above 0.9 late in a run",
        advice="raise model.index_topk or train.indexer_loss_weight",
    ),
    Metric(
        "indexer_recall", "fraction of the teacher's top-k in the indexer's", Reduction.mean,
        healthy="rises, above 0.7 late in a run",
        advice="raise train.indexer_loss_weight, or give the indexer a stage of phase warmup",
    ),
    Metric(
        "indexer_leaves_out", "fraction of queries that see more than top-k entries",
        Reduction.mean, healthy="above 0, or the indexer chooses nothing",
        advice="lower model.index_topk, or train on longer rows and documents",
    ),
    Metric(
        "past_window", "fraction of tokens whose document began before the window",
        Reduction.same, healthy="above 0, or compressed attention sees nothing",
        advice="lower model.sliding_window, or train on longer rows and documents",
    ),
    Metric(
        "past_hca_block", "fraction of tokens behind their document's first HCA block",
        Reduction.same, healthy="above 0, or HCA layers see no entry",
        advice="lower the ratios of HCA layers, or train on longer rows and documents",
    ),
    Metric(
        "stream_gain", "norm after / norm before a block", Reduction.mean, healthy="0.5 to 4",
        advice=_SLOWER,
    ),
    Metric(
        "quant_error_*", "squared error / squared norm, per part of quant", Reduction.mean,
        healthy="below 0.02 in FP4, 0.001 in FP8", advice=_FORMAT,
    ),
    Metric(
        "quant_zeroed_*", "fraction of non-zero values rounded to zero", Reduction.mean,
        healthy="below 0.2", advice=_FORMAT,
    ),
    Metric("quant_saturated_*", "fraction of values at the largest element", Reduction.mean),
    Metric(
        "quant_scale_log2_*", "log2 of largest / smallest group scale in a block", Reduction.mean,
        healthy="below 7, or FP8 cannot hold the block", advice=_FORMAT,
    ),
    Metric(
        "quant_lossy_*", "fraction of blocks that FP8 cannot hold", Reduction.mean,
        healthy="0", advice=_FORMAT,
    ),
    Metric("probe_*", "nats per scored token, by long-context probe", Reduction.sum),
    Metric(
        "val_loss", "nats per target token", Reduction.sum,
        healthy="at most 1 % above its lowest value", advice=_OVERFIT,
    ),
    Metric(
        "val_bits_per_byte", "bits per byte of validation text", Reduction.sum,
        healthy="below that of xz -9e at the end", advice="train longer, or a larger model",
    ),
    Metric("val_bytes", "bytes of validation text that were scored", Reduction.sum),
    Metric(
        "val_text", "hash of the validation text that was read: equal ones compare",
        Reduction.same,
    ),
    Metric(
        "val_loss_average", "val_loss of the averaged weights", Reduction.sum,
        healthy="below val_loss until the learning rate decays",
        advice="lower train.ema_decay: the average reaches back too far",
    ),
    Metric("val_bits_per_byte_average", "bits per byte of the averaged weights", Reduction.sum),
    Metric("tokens_per_second", "tokens per second, padding included", Reduction.same, True),
    Metric("step_seconds", "seconds", Reduction.max, True),
    Metric("step_cpu_seconds", "CPU seconds of the process, all threads", Reduction.max, True),
    Metric(
        "eval_seconds", "seconds of the evaluation after the step", Reduction.max, True,
        healthy="a few percent of the steps between evaluations",
        advice="raise train.eval_every or lower train.eval_tokens",
    ),
    Metric(
        "checkpoint_seconds", "seconds the run stood still to save before the step",
        Reduction.same, True, healthy="a few percent of the steps between checkpoints",
        advice="train.async_checkpoint=true, or raise train.checkpoint_every",
    ),
    Metric(
        "checkpoint_background_seconds", "seconds of a save that ended behind the steps",
        Reduction.same, True, healthy="below the time between checkpoints",
        advice="raise train.checkpoint_every",
    ),
    Metric(
        "peak_memory_bytes", "bytes, largest of any rank", Reduction.max, True,
        healthy="below what the device has",
        advice="lower train.micro_batch_size, or train.activation_checkpoint=block",
    ),
    Metric(
        "mfu", "fraction of the measured matmul rate of all ranks' devices", Reduction.same, True,
        healthy="steady; low for small models", advice="raise train.micro_batch_size",
    ),
)  # fmt: skip
_BY_NAME = {metric.name: metric for metric in METRICS}
MEASURED = frozenset(metric.name for metric in METRICS if metric.measured)

Record = dict[str, Any]


def metric_of(name: str) -> Metric:
    """The line of the table that describes a field; ``quant_error_experts`` is of a family.

    Raises:
        KeyError: there is none.
    """
    families = (m for m in METRICS if m.name.endswith("*") and name.startswith(m.name[:-1]))
    found = _BY_NAME.get(name) or next(families, None)
    if found is None:
        raise KeyError(f"metric {name} has no line in the table of train/record/metrics.py")
    return found


def all_finite(values: Mapping[str, Any]) -> bool:
    """Whether every number among some metrics is."""
    return all(math.isfinite(v) for v in values.values() if isinstance(v, int | float))


def told_value(value: Any) -> str:
    """A metric's value for a line of text."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def unmeasured(record: Mapping[str, Any]) -> Record:
    """The fields that equal runs share."""
    return {name: value for name, value in record.items() if name not in MEASURED}


def monitor_values(monitors: Mapping[str, Tensor]) -> Record:
    """Divide the summed ``<name>.sum`` by ``<name>.count``; names with a count of 0 are left out.

    Raises:
        KeyError: a monitor that has no line in :data:`METRICS`.
    """
    values = shares_of(monitors)
    for name in values:
        assert metric_of(name).reduction is Reduction.mean, name
    return dict(values)


def shares_of(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Each ``<name>.sum`` over its ``<name>.count``; names with a count of 0 are left out."""
    totals = {key.removesuffix(".sum"): sums[key] for key in sums if key.endswith(".sum")}
    counts = {name: float(sums[f"{name}.count"]) for name in totals}
    return {name: float(totals[name]) / count for name, count in counts.items() if count}


def load_values(expert_load: Mapping[str, Tensor]) -> Record:
    """How evenly tokens were spread over experts, from gate name -> tokens per expert [E]."""
    loads = [load_E.double() for load_E in expert_load.values() if float(load_E.sum()) > 0]
    if not loads:
        return {}
    return {
        "expert_load_cv": float(
            sum(load_E.std(correction=0) / load_E.mean() for load_E in loads) / len(loads)
        ),
        "expert_load_max": max(float(load_E.max() / load_E.mean()) for load_E in loads),
        "dead_experts": sum(int((load_E == 0).sum()) for load_E in loads),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: of the GPU where it computes there, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ---- the file ------------------------------------------------------------------------------------
class StepLines:
    """A file of one JSON object a step, in order; every write reaches the system at once.

    Args:
        path: the file; made when the first line is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line; its ``step`` is above those of the lines before."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def read(self) -> list[Record]:
        """All complete lines, in order; none where there is no file."""
        return [record for _, record in self._complete()] if self.path.exists() else []

    def cut(self, last: int, key: str = "step") -> int:
        """Remove the lines behind step ``last``, half ones included; 0 empties the file.

        What stays is durable before it takes the file's place: a checkpoint counts on it.

        Args:
            last: that stays.
            key: what counts the lines.

        Returns:
            The ``key`` of the line with which it ends now; 0: it holds none.
        """
        if not self.path.exists():
            return 0
        kept = [(line, r[key]) for line, r in self._complete(key) if r[key] <= last]
        replace_durably(self.path, "".join(line for line, _ in kept))
        return kept[-1][1] if kept else 0

    def _complete(self, key: str = "step") -> Iterator[tuple[str, Record]]:
        """Lines with their records. What a kill or a crash left half written can only be the end.

        Raises:
            UserError: a line in the middle holds no number under ``key``.
        """
        broken = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            record = record_of(line, key)
            if record is None:
                broken = broken or number
            elif broken:
                raise UserError(f"{self.path}: line {broken} is damaged, and whole lines follow it")
            else:
                yield line.decode("utf-8"), record


class MetricsFile(StepLines):
    """``metrics.jsonl`` of a run."""

    def write(self, record: Record) -> None:
        """Append one step.

        Raises:
            KeyError: a field that has no line in :data:`METRICS`.
        """
        for name in record:
            metric_of(name)
        self.append({name: _json_value(value) for name, value in record.items()})


def read_metrics(path: Path) -> list[Record]:
    """All complete lines of a metrics file, in order."""
    return StepLines(path).read()


def record_of(line: bytes, key: str) -> Record | None:
    """The record in a line; None where it holds none, or not all of it."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, or no UTF-8
        return None
    return record if isinstance(record, dict) and type(record.get(key)) is int else None


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def describe(metrics: Iterable[Metric] = METRICS) -> str:
    """The table as Markdown, for the documents (``docs/metrics.md``)."""
    head = ("metric", "what it is, unit", "healthy", "where it is not")
    rows = [(f"`{m.name}`", m.unit + " *" * m.measured, m.healthy, m.advice) for m in metrics]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)
