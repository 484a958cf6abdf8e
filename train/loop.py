"""The trainer: steps, evaluations, checkpoints, and the folder that a run leaves behind.

Order inside a step: batch, train_step, evaluation, the line in ``metrics.jsonl``, then the
checkpoint, which counts on that line. A run that stops early (signal or time limit) does so between
steps, saves, and returns the exit code that says "the same command continues".
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from data.global_batch import GlobalBatch
from data.loader import Loader
from data.tokenizer import Tokenizer
from model.config import LayerKind, ModelConfig
from model.flops import training_flops
from parallel.engine import Engine
from train.audit.audit import Audit
from train.checkpoint import reader as checkpoint_reader
from train.checkpoint.average import WeightAverage, require, saved_model
from train.checkpoint.files import STATE, DamagedCheckpointError, step_of
from train.checkpoint.finite import first_not_finite
from train.checkpoint.hold import Hold
from train.checkpoint.manager import Checkpoints, hold, read_held
from train.config.recovery import Remedy
from train.config.schema import RunConfig, Weights
from train.errors import USER_ERRORS, ExitCode, TrainingFailedError, UserError, one_line
from train.phase import PhaseSwitch
from train.record.evaluation import Evaluator
from train.record.metrics import (
    MetricsFile,
    Record,
    load_values,
    monitor_values,
    peak_memory_bytes,
)
from train.record.profiling import ProfilerWindow
from train.record.report import FinalEvaluation, RunReport
from train.record.sample_log import SampleLog
from train.record.trackers import Tracker
from train.recovery.anticipation import Anticipation, RoutedRows
from train.recovery.judge import Recovery, Verdict
from train.recovery.stop import StopRequest
from train.run_folder.identity import RunIdentity, Use
from train.run_folder.origin import check_origin, check_steps
from train.stages import StagePlan
from train.step import StepPlan, StepResult, plan_step, train_step

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands, between steps.

    Attributes:
        step: optimizer steps done.
        tokens: positions trained, padding included.
        skipped_steps: steps whose update was left out.
    """

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0


@dataclass
class Trainer:
    """Everything a run needs, put together by ``train/build.py``.

    Attributes:
        run: the config.
        plan: its stages.
        identity: the record of what it is.
        engine: runs steps.
        loader: plans batches.
        phase: brings the model into the state that a step needs.
        average: of the weights, if asked for.
        evaluator: validation loss.
        final_evaluator: the same after the last step.
        audit: of the first steps.
        checkpoints: of the run's folder.
        recovery: judges steps.
        anticipation: chooses experts ahead.
        metrics: its ``metrics.jsonl``.
        samples: its ``samples.jsonl``, if asked for.
        trackers: what else shows metrics; none on ranks above 0.
        profiler: its window.
        report: what the run leaves behind.
        stop: whether to leave early.
        matmul_rate: of all ranks' devices together, FLOPs per second.
        progress: where the run stands.
        weights: which weights of a checkpoint it began with.
    """

    run: RunConfig
    plan: StagePlan
    identity: RunIdentity
    engine: Engine
    loader: Loader
    phase: PhaseSwitch
    average: WeightAverage | None
    evaluator: Evaluator
    final_evaluator: Evaluator
    audit: Audit
    checkpoints: Checkpoints
    recovery: Recovery
    anticipation: Anticipation
    metrics: MetricsFile
    samples: SampleLog
    trackers: list[Tracker]
    profiler: ProfilerWindow
    report: RunReport
    stop: StopRequest
    matmul_rate: float
    progress: Progress = field(default_factory=Progress)
    weights: Weights = Weights.model
    _save_seconds: float = 0.0
    _val_loss: float | None = None  # of an evaluation after the step just done
    _abandoned_steps: int = 0

    def __post_init__(self) -> None:
        self._eval_every = self.run.train.eval_every
        self._checkpoint_every = self.run.train.checkpoint_every

    def fit(self) -> int:
        """Train to the end of the plan, or until asked to stop.

        Returns:
            An :class:`ExitCode`: finished or resumable.
        """
        with self.stop, self.checkpoints:
            if self.run.train.eval_only:
                return self._evaluate_only()
            self.checkpoints.saved_step = self.progress.step
            while self.progress.step < self.plan.steps:
                self._next_step()
                early = self.engine.agree(bool(self.stop.reason))
                if early and self.progress.step < self.plan.steps:
                    return self._leave_early()
            self._save_last()
            self._close(finished=True)
            return ExitCode.finished

    def _next_step(self) -> None:
        done = self.progress
        step = plan_step(done.step + 1, done.tokens, self.plan, self.run.train, self.run.optim)
        self.phase.enter(step)
        self.profiler.before(step.number)
        began, cpu_began = time.perf_counter(), time.process_time()
        rows = self.loader.plan(step.num_rows, step.stage.seq_len)
        routed = self.anticipation.rows(step, rows)
        with self.audit.watching(step, rows) as observer:
            self.phase.probe.begin_step(step.monitors)
            watched = self.samples.watch(rows, routed)
            result = train_step(self.engine, watched, step, observer, self.recovery)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        self.profiler.after(step.number)
        self.samples.write(step.number)
        verdict = self.recovery.after(step, result)
        if verdict.remedy is Remedy.rollback:
            self._roll_back(step, verdict)
            return
        if self.average is not None and result.update.applied:
            self.average.update()
        skipped = 0 if result.update.applied else 1
        self.progress = Progress(
            step.number, step.tokens + step.batch_tokens, done.skipped_steps + skipped
        )
        record = self._record(step, rows, result, seconds)
        if isinstance(routed, RoutedRows):
            record["anticipated"] = 1
        record["step_cpu_seconds"] = self.engine.largest(cpu_seconds)
        if step.monitors:
            record |= reach(rows, self.run.model)
        if _due(step.number, self._eval_every, self.plan.steps):
            record |= self.evaluator.evaluate(step)
        self._val_loss = record.get("val_loss")
        if self.engine.rank == 0:
            self.metrics.write(record)
        for tracker in self.trackers:
            tracker.show(record)
        if verdict.remedy is Remedy.stop:
            self._fail(verdict.reason)
        if _due(step.number, self._checkpoint_every) and not self.recovery.suspects:
            self._save()

    def _record(
        self, step: StepPlan, rows: GlobalBatch, result: StepResult, seconds: float
    ) -> Record:
        engine, shares = self.engine, result.shares
        seconds = engine.largest(seconds)
        rate = step.batch_tokens / seconds
        quantisation = engine.add_up(self.phase.probe.metrics()) if step.monitors else {}
        record: Record = {
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "stage": step.stage.name,
            **{name: float(value) for name, value in shares.losses.items()},
            "grad_norm": result.update.grad_norm,
            "lr": step.lr,
            "skipped_steps": self.progress.skipped_steps,
            "loss_spikes": self.recovery.state.loss_spikes,
            "rollbacks": self.recovery.state.rollbacks,
            "documents": rows.counts.documents,
            "padding": 1 - rows.counts.tokens / step.batch_tokens,
            **{f"share.{name}": share for name, share in rows.source_shares().items()},
            **load_values(shares.expert_load),
            **monitor_values({**shares.monitors, **quantisation}),
            "tokens_per_second": rate,
            "step_seconds": seconds,
            "peak_memory_bytes": int(engine.largest(peak_memory_bytes(engine.device))),
            "mfu": rate * flops_per_token(self.run.model, step) / self.matmul_rate,
        }
        if self._save_seconds:
            record["checkpoint_seconds"], self._save_seconds = self._save_seconds, 0.0
        if behind := self.checkpoints.background_seconds():
            record["checkpoint_background_seconds"] = behind
        if self._abandoned_steps:
            record["abandoned_steps"], self._abandoned_steps = self._abandoned_steps, 0
        return record

    def _roll_back(self, step: StepPlan, verdict: Verdict) -> None:
        """Back to the checkpoint from before the failing steps; the data goes on behind them.

        Nothing is saved here: killed now, the run does the same again from that checkpoint.
        """
        target = self._checkpoint_before(verdict.first_failed)
        if target is None:
            where = self.checkpoints.folder
            self._fail(
                f"{verdict.reason}, and {where} holds no whole checkpoint from before step"
                f" {verdict.first_failed} to roll back to"
            )
        with target:
            state = checkpoint_reader.read(
                target.folder, checkpoint_tensors(self.engine, self.average), partial=True
            )
        self.progress = Progress(**state["progress"])
        self.recovery.roll_back(self.progress.step, state.get("recovery", {}))
        self.anticipation.forget()
        self.loader.forget_ahead()
        for _ in range(self.recovery.skip_steps):
            self.loader.plan(step.num_rows, step.stage.seq_len)
        self.checkpoints.set_aside(self.progress.step)
        self._abandoned_steps = step.number - self.progress.step
        if self.engine.rank == 0:
            self.metrics.cut(self.progress.step)
            self.samples.roll_back(self.progress.step, self.recovery.state.rollbacks)
        for tracker in self.trackers:
            tracker.rewind(self.progress.step)
        log.warning("back to %s, on with the data behind step %d", target.folder, step.number)

    def _checkpoint_before(self, step: int) -> Hold | None:
        """The newest good one of an earlier step, first among those that every start would have.

        One saved because the run was stopped in between would make it another run than the one
        that was never stopped.
        """
        regular = self.checkpoints.hold_newest(step - 1, self._checkpoint_every)
        return regular or self.checkpoints.hold_newest(step - 1)

    def _fail(self, reason: str) -> NoReturn:
        """Leave for good, without a checkpoint of what failed."""
        self._close(finished=False)
        raise TrainingFailedError(reason)

    # ---- saving and leaving ------------------------------------------------------------------
    def _save(self) -> str:
        """Begin the checkpoint of this step. A full disk costs this checkpoint, not the run.

        Returns:
            The tensor that is not finite, for which nothing is saved: it is nothing to go back to.
        """
        began = time.perf_counter()
        tensors, step = checkpoint_tensors(self.engine, self.average), self.progress.step
        if spoilt := first_not_finite(tensors):
            log.error("no checkpoint of step %d: %s is not finite", step, spoilt)
            return spoilt
        tensors |= self.anticipation.state(step)
        files = [self.metrics.path] + [self.samples.lines.path] * self.samples.enabled
        self.checkpoints.start(step, tensors, self._state(), durable_first=files)
        self._save_seconds = time.perf_counter() - began
        return ""

    def _save_last(self) -> None:
        """The run ends here, so the checkpoint of this step must be on disk."""
        self.checkpoints.wait()
        if self.checkpoints.saved_step != self.progress.step and (spoilt := self._save()):
            self._fail(
                f"after step {self.progress.step} {spoilt} is not finite: it was not saved, and the"
                f" newest checkpoint is that of step {self.checkpoints.saved_step}"
            )
        self.checkpoints.require(self.progress.step)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds beside tensors; rank 0's is written, which alone has trackers."""
        loss = self._val_loss
        return {
            "identity": self.identity.as_json(),
            "progress": asdict(self.progress),
            "loader": self.loader.state_dict(),
            "recovery": self.recovery.state_dict(),
            "trackers": {k: v for t in self.trackers for k, v in t.before_save().items()},
            "val_loss": loss if loss is not None and math.isfinite(loss) else None,
        }

    def _leave_early(self) -> int:
        self.stop.ask("another rank was asked to stop")
        self._save_last()
        log.info(
            "%s: stopped after step %d of %d; the same command continues",
            self.stop.reason,
            self.progress.step,
            self.plan.steps,
        )
        self._close(finished=False)
        return ExitCode.resumable

    def _last_step(self) -> StepPlan:
        """The plan of the step just done; where none was, of the last one that the run would do."""
        done, run = self.progress, self.run
        number = done.step or self.plan.steps
        # A step belongs to the stage in which it begins: where it ends the next one may.
        begin = done.tokens - 1 if done.step else self.plan.tokens_at(number - 1)
        return plan_step(number, begin, self.plan, run.train, run.optim)

    def _close(self, finished: bool) -> None:
        if finished:
            self.phase.enter(self._last_step())
        validation = self._final_evaluation() if finished else None
        self.report.write(asdict(self.progress), self.audit.result(), validation)
        for tracker in self.trackers:
            tracker.close()
        if validation is not None and not validation.is_finite:
            raise TrainingFailedError(
                f"the evaluation after the last step is not finite: {_told(validation.values)}"
            )

    def _final_evaluation(self) -> FinalEvaluation:
        step = self._last_step()
        log.info("evaluating on the final rows")
        values = self.final_evaluator.evaluate(step)
        return FinalEvaluation(values, self.final_evaluator.text(step))

    def _evaluate_only(self) -> int:
        """On the rows of the final evaluation, so that the two can be compared."""
        done, step = self.progress, self._last_step()
        self.phase.enter(step)
        values = {"step": done.step, "tokens": done.tokens, **self.final_evaluator.evaluate(step)}
        if not FinalEvaluation(values, b"").is_finite:
            raise TrainingFailedError(f"the evaluation is not finite: {_told(values)}")
        if self.engine.rank == 0:
            self.report.write_evaluation(values, self.weights)
        return ExitCode.finished


@dataclass(frozen=True)
class Restored:
    """Where a run stands when it starts.

    Attributes:
        identity: its record.
        progress: steps and tokens done.
        trackers: what its trackers gave to the checkpoint.
        weights: which weights of a checkpoint the model holds.
    """

    identity: RunIdentity
    progress: Progress = field(default_factory=Progress)
    trackers: dict[str, Any] = field(default_factory=dict)
    weights: Weights = Weights.model


def restore(
    run: RunConfig,
    plan: StagePlan,
    identity: RunIdentity,
    engine: Engine,
    loader: Loader,
    average: WeightAverage | None,
    checkpoints: Checkpoints,
    metrics: MetricsFile,
    samples: SampleLog,
    recovery: Recovery,
    anticipation: Anticipation,
) -> Restored:
    """Bring everything to where the run's newest complete checkpoint left it, or to the start.

    Args:
        run: the config.
        plan: its stages.
        identity: what is asked for now.
        engine: gets weights and optimizer.
        loader: gets its position.
        average: gets the averaged weights.
        checkpoints: of the folder.
        metrics: cut back to the checkpoint.
        samples: the same.
        recovery: gets its state.
        anticipation: gets its choices.

    Raises:
        UserError: every checkpoint is damaged, or it is another run's or model's.
    """
    # Of a new run: one that resumes has weights of its own.
    source, weights = run.init_from, run.train.weights
    only_reads = run.train.eval_only  # maybe the folder of a run that is training
    use = Use.evaluate if only_reads else Use.resume

    def load(folder: Path) -> Restored:
        recorded = check_origin(
            use, folder, identity, f"run_dir={run.run_dir}", run, loader.tokenizer
        )
        saved = checkpoint_reader.together(lambda: checkpoint_reader.saved_tensors(folder))
        ahead = anticipation.allocate(saved, step_of(folder) or 0)
        tensors, held = checkpoint_tensors(engine, average), Weights.model
        if only_reads:
            held = weights
            require(weights, folder, saved, "train.weights")
            tensors = saved_model(engine.state(), engine.model, weights)
        state = checkpoint_reader.read(folder, tensors | ahead, partial=only_reads)
        _refuse_not_finite(folder, tensors)
        try:
            progress = Progress(**state["progress"])
            if not only_reads:
                check_steps(plan.steps, progress.step, run.run_dir)
            recovery.load_state_dict(state.get("recovery", {}))
            if not only_reads:  # an evaluation may be of other data
                loader.load_state_dict(state["loader"])
            known = identity.continuing(recorded)
            return Restored(known, progress, state.get("trackers", {}), held)
        except USER_ERRORS:
            raise
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise DamagedCheckpointError(
                f"checkpoint {folder}: file {STATE} is not as this code writes it:"
                f" {type(error).__name__}: {one_line(error)}"
            ) from error

    if not only_reads:
        checkpoints.clean()
    restored = read_held(checkpoints.hold_newest, load)
    if restored is not None:
        log.info("resuming after step %d", restored.progress.step)
    else:
        if found := checkpoints.published():
            raise UserError(
                f"run_dir={run.run_dir}: none of its {len(found)} checkpoints is whole (see the"
                " log); move them away to start again"
            )
        restored = Restored(identity)
        if source:
            _start_from(run, identity, loader.tokenizer, engine, average)
            restored = replace(restored, weights=weights)
    if engine.rank == 0 and not only_reads:
        _cut_lines(restored.progress.step, metrics, samples, recovery.state.rollbacks)
    return restored


def _cut_lines(step: int, metrics: MetricsFile, samples: SampleLog, rollbacks: int) -> None:
    """Let the run's files end with the step of its checkpoint."""
    ends = {metrics.path: metrics.cut(step)}
    last = samples.resume(step, rollbacks)
    if samples.enabled:
        ends[samples.lines.path] = last
    for path, found in ends.items():
        if found != step:
            log.warning(
                "%s ends with step %d, the checkpoint is of step %d: the lines between are lost",
                path, found, step,
            )  # fmt: skip


def _start_from(
    run: RunConfig,
    identity: RunIdentity,
    tokenizer: Tokenizer,
    engine: Engine,
    average: WeightAverage | None,
) -> None:
    """Take weights, expert biases and hash tables from elsewhere; the optimizer starts fresh."""
    weights = run.train.weights
    model = saved_model(engine.state(), engine.model, weights)

    def load(folder: Path) -> None:
        where = f"init_from={run.init_from}"
        recorded = check_origin(Use.init_from, folder, identity, where, run, tokenizer)
        if recorded.tokenizer is None and engine.rank == 0:
            log.warning("%s does not say with which tokenizer it was trained", where)
        saved = checkpoint_reader.together(lambda: checkpoint_reader.saved_tensors(folder))
        require(weights, folder, saved, "train.weights")
        checkpoint_reader.read(folder, model, partial=True)
        _refuse_not_finite(folder, model)
        log.info("starting from the %s weights of %s", weights.value, folder)

    read_held(lambda: hold(run.init_from), load)
    if average is not None:
        average.restart()


def _refuse_not_finite(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Nothing can be trained on from it. Collective."""
    if spoilt := first_not_finite(tensors):
        raise UserError(f"checkpoint {folder}: its {spoilt} is not finite")


def checkpoint_tensors(engine: Engine, average: WeightAverage | None) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by layout-free name."""
    return engine.state() | (average.state() if average is not None else {})


def flops_per_token(config: ModelConfig, step: StepPlan) -> float:
    """Useful FLOPs of forward and backward per position."""
    stage = step.stage
    flops = training_flops(
        config, stage.seq_len, stage.indexer_phase.value, indexer_loss=step.weights.indexer > 0
    )
    return flops.total


def reach(rows: GlobalBatch, config: ModelConfig) -> Record:
    """How many tokens the compressed branches can matter for: what the window does not hold."""
    found = {"past_window": rows.share_past(config.sliding_window)}
    blocks = [
        config.ratio(layer)
        for layer in range(config.num_hidden_layers)
        if config.kind(layer) is LayerKind.hca
    ]
    if blocks:
        found["past_hca_block"] = rows.share_past(max(blocks))
    return found


def _told(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value:.5g}" for name, value in values.items())


def _due(step: int, every: int, last: int | None = None) -> bool:
    return step == last or (every > 0 and step % every == 0)
