"""What a run tells of itself while it trains: one line a step, trackers, samples, the report."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.batch import Batch, BatchCounts
from data.global_batch import GlobalBatch
from model.config import LayerKind, ModelConfig
from model.flops import training_flops
from quant.probe import QuantProbe
from train.checkpoint.state import RunState
from train.errors import TrainingFailedError
from train.record.evaluation import Evaluator
from train.record.metrics import (
    MetricsFile,
    Record,
    all_finite,
    load_values,
    monitor_values,
    peak_memory_bytes,
    shares_of,
    told_value,
)
from train.record.probing import Prober
from train.record.profiling import ProfilerWindow
from train.record.report import FinalEvaluation, RunReport
from train.record.sample_log import SampleLog
from train.record.tracker import Screen, Tracker
from train.recovery.anticipation import RoutedRows
from train.step import StepPlan, StepResult, StepRows

log = logging.getLogger(__name__)


@dataclass
class Recorder:
    """Writes what a run leaves behind besides checkpoints.

    Attributes:
        state: of the run.
        model: its config.
        probe: what quantisation did.
        metrics: its ``metrics.jsonl``.
        samples: its ``samples.jsonl``, if asked for.
        trackers: what else shows metrics; none on ranks above 0.
        profiler: its window.
        report: what stays at the end.
        evaluator: validation loss.
        final_evaluator: the same after the last step.
        matmul_rate: of all ranks' devices together, FLOPs per second.
        steps: of the whole run.
        screen: shows how far a slow step is; one of the trackers.
    """

    state: RunState
    model: ModelConfig
    probe: QuantProbe
    metrics: MetricsFile
    samples: SampleLog
    trackers: list[Tracker]
    profiler: ProfilerWindow
    report: RunReport
    evaluator: Evaluator
    final_evaluator: Evaluator
    matmul_rate: float
    steps: int
    screen: Screen | None
    prober: Prober
    _seconds: tuple[float, float] = (0.0, 0.0)  # of the step just done: wall clock, CPU
    _val_loss: float | None = None  # of an evaluation after the step just done
    _began: float = 0.0  # of the step that is being computed

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        """However the run ends, its screen is free for what is said of that."""
        if self.screen is not None:
            self.screen.close()

    @property
    def files(self) -> list[Path]:
        """Those that a checkpoint counts on."""
        return [self.metrics.path] + [self.samples.lines.path] * self.samples.enabled

    @contextmanager
    def running(self, step: StepPlan) -> Iterator[None]:
        """Time a step, profile it if asked for, and log the samples that it read."""
        self.profiler.before(step.number)
        self._began, cpu_began = time.perf_counter(), time.process_time()
        yield
        self._seconds = time.perf_counter() - self._began, time.process_time() - cpu_began
        self.profiler.after(step.number)
        self.samples.write(step.number)

    def watch(self, step: StepPlan, planned: GlobalBatch, rows: StepRows) -> StepRows:
        """Rows that tell, as they are read, which samples they hold and how far the step is.

        Args:
            step: that is being computed.
            planned: its batch.
            rows: the same, with experts where they were chosen ahead.
        """
        rows = self.samples.watch(planned, rows)
        if self.screen is None:
            return rows
        share = step.num_rows // self.state.engine.data_degree
        count = -(-share // step.stage.micro_batch_size)
        return CountedRows(rows, step.number, count, self._began, self.screen)

    def write(
        self,
        step: StepPlan,
        rows: GlobalBatch,
        routed: StepRows,
        result: StepResult,
        saves: Mapping[str, Any],
        evaluate: bool,
    ) -> None:
        """The line of a step that is done. Collective.

        Args:
            step: it.
            rows: that it read.
            routed: the same, with experts where they were chosen ahead.
            result: what came of it.
            saves: fields that tell of checkpoints.
            evaluate: whether an evaluation follows the step.
        """
        seconds, cpu_seconds = self._seconds
        record = self._record(step, rows, result, seconds) | dict(saves)
        if isinstance(routed, RoutedRows):
            record["anticipated"] = 1
        record["step_cpu_seconds"] = self.state.engine.largest(cpu_seconds)
        if step.monitors:
            record |= reach(rows, self.model)
        record |= self.prober.measure(step)
        if evaluate:
            record |= self.evaluator.evaluate(step)
            if step.number < self.steps:  # else the end writes it
                self.report.write_text()
        self._val_loss = record.get("val_loss")
        if self.state.engine.rank == 0:
            self.metrics.write(record)
        for tracker in self.trackers:
            tracker.show(record)

    def _record(
        self, step: StepPlan, rows: GlobalBatch, result: StepResult, seconds: float
    ) -> Record:
        engine, shares, progress = self.state.engine, result.shares, self.state.progress
        recovery = self.state.recovery.state
        seconds = engine.largest(seconds)
        rate, epochs = step.batch_tokens / seconds, self.state.loader.epochs(rows.read_tokens)
        quantisation = engine.add_up(self.probe.metrics()) if step.monitors else {}
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "stage": step.stage.name,
            **{name: float(value) for name, value in shares.losses.items()},
            "grad_norm": result.update.grad_norm,
            "lr": step.lr,
            "skipped_steps": progress.skipped_steps,
            "loss_spikes": recovery.loss_spikes,
            "rollbacks": recovery.rollbacks,
            "documents": rows.counts.documents,
            "padding": 1 - rows.counts.tokens / step.batch_tokens,
            "long_documents": rows.cut.documents,
            "left_out_tokens": rows.cut.tokens,
            **({} if epochs is None else {"epochs": epochs}),
            **{f"share.{name}": share for name, share in rows.source_shares().items()},
            **load_values(shares.expert_load),
            **monitor_values({**shares.monitors, **quantisation}),
            "tokens_per_second": rate,
            "step_seconds": seconds,
            "peak_memory_bytes": int(engine.largest(peak_memory_bytes(engine.device))),
            "mfu": rate * flops_per_token(self.model, step) / self.matmul_rate,
        }

    def values(self) -> dict[str, Any]:
        """JSON values of a checkpoint; rank 0's are written, which alone has trackers."""
        loss = self._val_loss
        return {
            "trackers": {k: v for t in self.trackers for k, v in t.before_save().items()},
            "val_loss": loss if loss is not None and math.isfinite(loss) else None,
        }

    def roll_back(self) -> None:
        """Take back what was told of steps that the state no longer knows."""
        step = self.state.progress.step
        if self.state.engine.rank == 0:
            self.metrics.cut(step)
            self.samples.roll_back(step, self.state.recovery.state.rollbacks)
        for tracker in self.trackers:
            tracker.rewind(step)

    def close(self, audit: Mapping[str, Any], last: StepPlan | None) -> None:
        """The run ends here. Collective.

        Args:
            audit: what was audited.
            last: the last step of a run that is finished, None of one that is not.

        Raises:
            TrainingFailedError: the evaluation after the last step is not finite.
        """
        validation = None
        if last is not None:
            log.info("evaluating on the final rows")
            values = self.final_evaluator.evaluate(last)
            validation = FinalEvaluation(values, self.final_evaluator.text(last))
        self.report.write(asdict(self.state.progress), audit, validation)
        for tracker in self.trackers:
            tracker.close()
        if validation is not None:
            _refuse_not_finite("the evaluation after the last step", validation.values)

    def evaluate_only(self, step: StepPlan) -> None:
        """Evaluate on the rows of the final evaluation, so that the two can be compared.

        Where weights are quantised, what each loses stands beside it.

        Raises:
            TrainingFailedError: it is not finite.
        """
        self.probe.begin_step(monitors=True)
        done, values = self.state.progress, self.final_evaluator.evaluate(step)
        values = {"step": done.step, "tokens": done.tokens, **values}
        _refuse_not_finite("the evaluation", values)
        lost = self.state.engine.add_up(self.probe.weight_errors())
        if self.state.engine.rank == 0:
            self.report.write_evaluation(values, shares_of(lost))


@dataclass
class CountedRows:
    """Rows that tell a screen which microbatch is read.

    Attributes:
        rows: of the global batch.
        step: number of the step.
        of: microbatches that this rank reads.
        began: when the step did, as ``time.perf_counter``.
        screen: is told.
    """

    rows: StepRows
    step: int
    of: int
    began: float
    screen: Screen
    _read: int = 0

    @property
    def counts(self) -> BatchCounts:
        """Normalisers of the whole batch."""
        return self.rows.counts

    def batch(self, start: int, stop: int) -> Batch:
        """Tensors of some of the rows."""
        self._read += 1
        self.screen.microbatch(self.step, self._read, self.of, time.perf_counter() - self.began)
        return self.rows.batch(start, stop)


def flops_per_token(config: ModelConfig, step: StepPlan) -> float:
    """Useful FLOPs of forward and backward per position."""
    stage = step.stage
    flops = training_flops(
        config, stage.seq_len, stage.indexer_phase.value,
        indexer_loss=step.weights.indexer > 0, mtp=step.weights.mtp > 0,
    )  # fmt: skip
    return flops.total


def reach(rows: GlobalBatch, config: ModelConfig) -> Record:
    """How many tokens the compressed branches can matter for: what the window does not hold."""
    found = {"past_window": rows.share_past(config.sliding_window)}
    layers = range(config.num_hidden_layers)
    blocks = [config.ratio(layer) for layer in layers if config.kind(layer) is LayerKind.hca]
    if blocks:
        found["past_hca_block"] = rows.share_past(max(blocks))
    return found


def _refuse_not_finite(what: str, values: Mapping[str, Any]) -> None:
    if not all_finite(values):
        told = " ".join(f"{name}={told_value(value)}" for name, value in values.items())
        raise TrainingFailedError(f"{what} is not finite: {told}")
