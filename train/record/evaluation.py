"""Validation: nats per target token and bits per byte of text, on rows that never change."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import cache, partial

import torch

from data.batch import IGNORE, Batch, BatchCounts
from data.global_batch import GlobalBatch
from data.loader import Loader
from model.loss import Objective
from parallel.engine import Engine
from train.checkpoint.average import WeightAverage
from train.record.metrics import Record
from train.step import StepPlan


class Evaluator:
    """Evaluates the model that an engine holds, in the state it is in.

    Args:
        engine: runs the model.
        loader: has the validation split.
        num_tokens: of an evaluation; 0 = the whole split.
        average: evaluated beside the weights, if there is one.
    """

    def __init__(
        self, engine: Engine, loader: Loader, num_tokens: int, average: WeightAverage | None = None
    ) -> None:
        self._engine, self._loader, self._num_tokens = engine, loader, num_tokens
        self._average = average
        self._digest = cache(partial(loader.validation_digest, num_tokens=num_tokens))

    def has_text(self, seq_len: int) -> bool:
        """Whether anything is held out."""
        return bool(self._loader.validation(seq_len, seq_len))

    def evaluate(self, step: StepPlan) -> Record:
        """Loss and bits per byte on the first rows of the split; nothing where none is held out.

        With averaged weights, theirs too.

        Args:
            step: whose row length, microbatch and indexer phase are used.
        """
        began = time.perf_counter()
        batches = self._loader.validation(step.stage.seq_len, self._num_tokens)
        if not batches:
            return {}
        loss, bits = self._measure(step, batches)
        record: Record = {
            "val_loss": loss,
            "val_bits_per_byte": bits,
            "val_bytes": sum(batch.target_bytes for batch in batches),
            "val_text": self._digest(step.stage.seq_len),
        }
        if self._average is not None:
            with self._average.in_place():
                loss, bits = self._measure(step, batches)
            record |= {"val_loss_average": loss, "val_bits_per_byte_average": bits}
        return record | {"eval_seconds": time.perf_counter() - began}

    def text(self, step: StepPlan) -> bytes:
        """The bytes that :meth:`evaluate` measures; empty where none are held out."""
        if not self.has_text(step.stage.seq_len):
            return b""
        return self._loader.validation_bytes(step.stage.seq_len, self._num_tokens)

    def _measure(self, step: StepPlan, batches: list[GlobalBatch]) -> tuple[float, float]:
        counts = add_counts(batches)
        objective = Objective(
            targets_K=tuple(float(n) for n in counts.targets_K),
            tokens=float(counts.tokens),
            mtp_weight=0.0,
            indexer_weight=0.0,
            balance_weight=0.0,
            indexer_phase=step.stage.indexer_phase,
        )
        shares = self._engine.evaluate(self._microbatches(step, batches), objective)
        loss = float(shares.losses["loss"])
        num_bytes = sum(batch.target_bytes for batch in batches)
        return loss, loss * counts.targets_K[0] / math.log(2) / max(num_bytes, 1)

    def _microbatches(self, step: StepPlan, batches: list[GlobalBatch]) -> Iterator[Batch]:
        engine, size = self._engine, step.stage.micro_batch_size
        for batch in batches:
            yield from even_microbatches(batch, size, engine.data_rank, engine.data_degree)


def even_microbatches(rows: GlobalBatch, size: int, rank: int, degree: int) -> Iterator[Batch]:
    """Cut one data rank's share of any number of rows; every rank gets as many microbatches.

    Where rows run out a rank computes the first row again, without labels, so that it counts
    nowhere: ranks that share parameters must run in step.

    Args:
        rows: of a batch.
        size: rows of a microbatch.
        rank: which share.
        degree: number of shares.
    """
    total = len(rows.rows)
    share = -(-total // degree)
    begin, end = min(total, rank * share), min(total, (rank + 1) * share)
    for start in range(begin, begin + share, size):
        stop = min(start + size, end)
        if start < stop:
            yield rows.batch(start, stop)
        else:
            again = rows.batch(0, 1)
            nothing = torch.full_like(again.labels_BTK, IGNORE)
            yield Batch(again.input_ids_BT, again.document_ids_BT, nothing)


def add_counts(batches: list[GlobalBatch]) -> BatchCounts:
    """Counts of several batches together."""
    depths = range(len(batches[0].counts.targets_K))
    return BatchCounts(
        tokens=sum(b.counts.tokens for b in batches),
        targets_K=tuple(sum(b.counts.targets_K[k] for b in batches) for k in depths),
        documents=sum(b.counts.documents for b in batches),
    )
