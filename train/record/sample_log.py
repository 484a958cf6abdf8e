"""``samples.jsonl``: which documents every row of every step held (``train.log_samples``).

One line a step, cut back on a resume or a rollback as ``metrics.jsonl`` is::

    {"step": 7, "data": "5f0c...", "rows": [[["embedded", 81, 0, 0, 512]], ...]}

A row lists its pieces in order: source, document, pass through the source, first token, end; "data"
is the hash of what the numbers are of. The lines are made of what the ranks read, not of what was
planned: a row that nobody read, or two shares of the batch, is an error. Within a pass every token
of a document stands in one row.

Steps that a rollback took away move to ``samples_abandoned.jsonl``, with the number of the
rollback: what a spike was made of. ``scripts/samples.py`` shows the texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.batch import Batch, BatchCounts
from data.global_batch import GlobalBatch, Sample
from parallel.engine import Engine
from train.record.metrics import StepLines
from train.run_folder.folder import ABANDONED, SAMPLES
from train.step import StepRows


def data_hash(manifest: Mapping[str, Any]) -> str:
    """Stands for a loader's manifest."""
    return hashlib.sha256(
        json.dumps(manifest, sort_keys=True, allow_nan=False).encode()
    ).hexdigest()[:16]


class SampleLogError(RuntimeError):
    """The ranks did not read each row of a step once."""


@dataclass(frozen=True)
class WatchedRows:
    """Rows that note which of them are read.

    Attributes:
        rows: of the global batch.
        read: numbers of the rows that were read, in order.
    """

    rows: StepRows
    read: list[int]

    @property
    def counts(self) -> BatchCounts:
        """Normalisers of the whole batch."""
        return self.rows.counts

    def batch(self, start: int, stop: int) -> Batch:
        """Tensors of some of the rows."""
        self.read.extend(range(start, stop))
        return self.rows.batch(start, stop)


class SampleLog:
    """The file, and what this rank read for its next line.

    Args:
        folder: of the run; the file is made when the first line is written.
        engine: knows which share of a batch each rank computes.
        data: hash of the loader's manifest.
        enabled: ``train.log_samples``; without it nothing is written, only cut.
    """

    def __init__(self, folder: Path, engine: Engine, data: str, enabled: bool) -> None:
        self.lines, self.enabled = StepLines(folder / SAMPLES), enabled
        self._abandoned = StepLines(folder / ABANDONED)
        self._engine, self._data = engine, data

    def watch(self, planned: GlobalBatch, rows: StepRows) -> StepRows:
        """``rows`` that note what is read of them."""
        if not self.enabled:
            return rows
        self._planned, self._watched = planned, WatchedRows(rows, [])
        return self._watched

    def write(self, step: int) -> None:
        """The line of a step that was computed. Collective.

        Raises:
            SampleLogError: a row was read by no share of the batch or by several; on all ranks.
        """
        if not self.enabled:
            return
        read = self._watched.read
        mine = (self._engine.data_rank, read, [self._planned.samples(row) for row in read])
        samples = _merged(step, len(self._planned.rows), self._engine.gather(mine))
        if self._engine.rank == 0:
            self.lines.append({"step": step, "data": self._data, "rows": samples})

    def resume(self, step: int, rollbacks: int) -> int:
        """Remove what lies behind the checkpoint; the step with which the file ends, 0 for none."""
        self._abandoned.cut(rollbacks, key="rollback")
        return self.lines.cut(step)

    def roll_back(self, step: int, rollbacks: int) -> None:
        """Put aside what lies behind ``step``: the steps that the n-th rollback took away."""
        for line in self.lines.read():
            if line["step"] > step:
                self._abandoned.append({"rollback": rollbacks, **line})
        self.lines.cut(step)


def _merged(
    step: int, num_rows: int, shares: Sequence[tuple[int, list[int], list[list[Sample]]]]
) -> list[list[Sample]]:
    """All rows in order. Pipeline stages and shards of a share read the same rows."""
    by_share: dict[int, tuple[list[int], list[list[Sample]]]] = {}
    for share, read, samples in shares:
        if by_share.setdefault(share, (read, samples)) != (read, samples):
            raise SampleLogError(
                f"step {step}: ranks of share {share} read rows {by_share[share][0]} and {read}"
            )
    rows = [row for read, _ in by_share.values() for row in read]
    if sorted(rows) != list(range(num_rows)):
        raise SampleLogError(f"step {step} of {num_rows} rows: read were {sorted(rows)}")
    found = {
        row: one
        for read, samples in by_share.values()
        for row, one in zip(read, samples, strict=True)
    }
    return [found[row] for row in range(num_rows)]
