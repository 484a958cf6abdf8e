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
        unit: of the value.
        reduction: over microbatches and ranks.
        measured: whether equal runs may differ in it.
    """

    name: str
    unit: str
    reduction: Reduction
    measured: bool = False


METRICS = (
    Metric("step", "optimizer steps done", Reduction.same),
    Metric("tokens", "tokens trained, padding included", Reduction.same),
    Metric("stage", "name of the stage", Reduction.same),
    Metric("loss", "nats per target token", Reduction.sum),
    Metric("loss_mtp", "nats per target token, mean over depths", Reduction.sum),
    Metric("loss_indexer", "nats per query, mean over csa layers", Reduction.sum),
    Metric("loss_balance", "1 at perfect balance, mean over learned layers", Reduction.sum),
    Metric("grad_norm", "global norm before clipping", Reduction.same),
    Metric("lr", "learning rate", Reduction.same),
    Metric("skipped_steps", "steps whose update was left out, since the start", Reduction.same),
    Metric("loss_spikes", "loss spikes since the start, abandoned steps included", Reduction.same),
    Metric("rollbacks", "rollbacks since the start", Reduction.same),
    Metric("abandoned_steps", "steps that a rollback took away before this one", Reduction.same),
    Metric("anticipated", "1 where earlier weights chose the experts", Reduction.same),
    Metric("documents", "document pieces of the step", Reduction.same),
    Metric("padding", "fraction of the step's positions", Reduction.same),
    Metric("long_documents", "documents longer than their rows, since the start", Reduction.same),
    Metric("left_out_tokens", "tokens of them that are not trained on", Reduction.same),
    Metric("epochs", "passes over the source passed over most often", Reduction.same),
    Metric("share.*", "fraction of the tokens read so far, per source", Reduction.same),
    Metric(
        "expert_load_cv", "deviation / mean of tokens per expert, mean over layers", Reduction.same
    ),
    Metric("expert_load_max", "largest / mean tokens per expert, worst layer", Reduction.same),
    Metric("dead_experts", "experts that got no token, all layers", Reduction.same),
    Metric("clamped", "fraction of expert activations", Reduction.mean),
    Metric("indexer_captured_mass", "fraction of the teacher's mass in the top-k", Reduction.mean),
    Metric("indexer_recall", "fraction of the teacher's top-k in the indexer's", Reduction.mean),
    Metric(
        "indexer_leaves_out", "fraction of queries that see more than top-k entries", Reduction.mean
    ),
    Metric(
        "past_window", "fraction of tokens whose document began before the window", Reduction.same
    ),
    Metric(
        "past_hca_block",
        "fraction of tokens behind their document's first HCA block",
        Reduction.same,
    ),
    Metric("stream_gain", "norm after / norm before a block", Reduction.mean),
    Metric("quant_error_*", "squared error / squared norm, per part of quant", Reduction.mean),
    Metric("quant_zeroed_*", "fraction of non-zero values rounded to zero", Reduction.mean),
    Metric("quant_saturated_*", "fraction of values at the largest element", Reduction.mean),
    Metric(
        "quant_scale_log2_*", "log2 of largest / smallest group scale in a block", Reduction.mean
    ),
    Metric("quant_lossy_*", "fraction of blocks that FP8 cannot hold", Reduction.mean),
    Metric("val_loss", "nats per target token", Reduction.sum),
    Metric("val_bits_per_byte", "bits per byte of validation text", Reduction.sum),
    Metric("val_loss_average", "val_loss of the averaged weights", Reduction.sum),
    Metric("val_bits_per_byte_average", "bits per byte of the averaged weights", Reduction.sum),
    Metric("tokens_per_second", "tokens per second, padding included", Reduction.same, True),
    Metric("step_seconds", "seconds", Reduction.max, True),
    Metric("step_cpu_seconds", "CPU seconds of the process, all threads", Reduction.max, True),
    Metric("eval_seconds", "seconds of the evaluation after the step", Reduction.max, True),
    Metric(
        "checkpoint_seconds",
        "seconds the run stood still to save before the step",
        Reduction.same,
        True,
    ),
    Metric(
        "checkpoint_background_seconds",
        "seconds of a save that ended behind the steps",
        Reduction.same,
        True,
    ),
    Metric("peak_memory_bytes", "bytes, largest of any rank", Reduction.max, True),
    Metric(
        "mfu", "fraction of the measured matmul rate of all ranks' devices", Reduction.same, True
    ),
)
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


def unmeasured(record: Mapping[str, Any]) -> Record:
    """The fields that equal runs share."""
    return {name: value for name, value in record.items() if name not in MEASURED}


def monitor_values(monitors: Mapping[str, Tensor]) -> Record:
    """Divide the summed ``<name>.sum`` by ``<name>.count``; names with a count of 0 are left out.

    Raises:
        KeyError: a monitor that has no line in :data:`METRICS`.
    """
    values: Record = {}
    for key, total in monitors.items():
        name, _, part = key.rpartition(".")
        if part != "sum":
            continue
        assert metric_of(name).reduction is Reduction.mean, name
        count = float(monitors[f"{name}.count"])
        if count:
            values[name] = float(total) / count
    return values


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
            record = _record_of(line, key)
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


def _record_of(line: bytes, key: str) -> Record | None:
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


def describe(records: Iterable[Metric] = METRICS) -> str:
    """The table as Markdown, for the documents."""
    rows = [f"| `{m.name}` | {m.unit} | {m.reduction} | {m.measured} |" for m in records]
    return "\n".join(["| field | unit | reduction | measured |", "|---|---|---|---|", *rows])
