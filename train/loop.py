"""The trainer: steps, evaluations, checkpoints, and the folder that a run leaves behind.

Order inside a step: batch, train_step, evaluation, the line in ``metrics.jsonl``, then the
checkpoint, which counts on that line. A run that stops early (signal or time limit) does so between
steps, saves, and returns the exit code that says "the same command continues".
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any, NoReturn

from parallel.engine import Engine
from train.audit.audit import Audit
from train.checkpoint.finite import first_not_finite
from train.checkpoint.hold import Hold
from train.checkpoint.manager import Checkpoints
from train.checkpoint.own_folder import save_own
from train.checkpoint.state import RunState
from train.config.recovery import Remedy
from train.config.schema import RunConfig
from train.errors import ExitCode, TrainingFailedError
from train.phase import PhaseSwitch
from train.preflight.pace import Pace
from train.record.recorder import Recorder
from train.recovery.judge import Verdict
from train.recovery.memory import told_out_of_memory
from train.recovery.stop import StopRequest
from train.stages import StagePlan
from train.step import StepPlan, plan_step, train_step

log = logging.getLogger(__name__)


@dataclass
class Trainer:
    """Everything a run needs, put together by ``train/build.py``.

    Attributes:
        run: the config.
        plan: its stages.
        engine: runs steps.
        phase: brings the model into the state that a step needs.
        state: what changes, and is saved.
        checkpoints: of the run's folder.
        recorder: what the run tells of itself.
        audit: of the first steps.
        stop: whether to leave early.
        pace: tells how long the run will take.
    """

    run: RunConfig
    plan: StagePlan
    engine: Engine
    phase: PhaseSwitch
    state: RunState
    checkpoints: Checkpoints
    recorder: Recorder
    audit: Audit
    stop: StopRequest
    pace: Pace
    _told_next: dict[str, Any] = field(default_factory=dict)  # fields of the next line of metrics
    _running: StepPlan | None = None  # the step that is at work, or was last

    def fit(self) -> int:
        """Train to the end of the plan, or until asked to stop.

        Returns:
            An :class:`ExitCode`: finished or resumable.
        """
        memory = told_out_of_memory(self.run, self._step_at_work, self.engine.device)
        with self.stop, self.checkpoints, self.recorder, memory:
            if self.run.train.eval_only:
                self.phase.enter(self._last_step())
                self.recorder.evaluate_only(self._last_step())
                return ExitCode.finished
            self.checkpoints.saved_step = self.state.progress.step
            while self.state.progress.step < self.plan.steps:
                self._next_step()
                self.pace.step_done(self.state.progress.step, self.state.progress.tokens)
                early = self.engine.agree(bool(self.stop.reason))
                if early and self.state.progress.step < self.plan.steps:
                    return self._leave_early()
            self._save_last()
            self.phase.enter(self._last_step())
            self.recorder.close(self.audit.result(), self._last_step())
            return ExitCode.finished

    def _next_step(self) -> None:
        done = self.state.progress
        step = plan_step(done.step + 1, done.tokens, self.plan, self.run.train, self.run.optim)
        self._running = step
        self._run_step(step)

    def _step_at_work(self) -> StepPlan:
        return self._running or self._last_step()

    def _run_step(self, step: StepPlan) -> None:
        run, state, recorder = self.run, self.state, self.recorder
        self.phase.enter(step)
        with recorder.running(step):
            rows = state.loader.plan(step.num_rows, step.stage.seq_len)
            routed = state.anticipation.rows(step, rows)
            with self.audit.watching(step, rows) as observer:
                self.phase.probe.begin_step(step.monitors)
                watched = recorder.watch(step, rows, routed)
                result = train_step(self.engine, watched, step, observer, state.recovery)
        verdict = state.recovery.after(step, result)
        if verdict.remedy is Remedy.rollback:
            self._roll_back(step, verdict)
            return
        state.advance(step, result.update.applied)
        evaluate = _due(step.number, run.train.eval_every, self.plan.steps)
        recorder.write(step, rows, routed, result, self._saves(), evaluate)
        if verdict.remedy is Remedy.stop:
            self._fail(verdict.reason)
        if _due(step.number, run.train.checkpoint_every) and not state.recovery.suspects:
            self._save()

    def _saves(self) -> dict[str, Any]:
        """What the next line of metrics tells of checkpoints."""
        told, self._told_next = self._told_next, {}
        if behind := self.checkpoints.background_seconds():
            told["checkpoint_background_seconds"] = behind
        return told

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
        state = self.state
        with target:
            state.roll_back(target.folder)
        for _ in range(state.recovery.skip_steps):
            state.loader.plan(step.num_rows, step.stage.seq_len)
        self.checkpoints.set_aside(state.progress.step)
        self._told_next["abandoned_steps"] = step.number - state.progress.step
        self.recorder.roll_back()
        log.warning("back to %s, on with the data behind step %d", target.folder, step.number)

    def _checkpoint_before(self, step: int) -> Hold | None:
        """The newest good one of an earlier step, first among those that every start would have.

        One saved because the run was stopped in between would make it another run than the one
        that was never stopped.
        """
        regular = self.checkpoints.hold_newest(step - 1, self.run.train.checkpoint_every)
        return regular or self.checkpoints.hold_newest(step - 1)

    def _fail(self, reason: str) -> NoReturn:
        """Leave for good, without a checkpoint of what failed."""
        self.recorder.close(self.audit.result(), None)
        raise TrainingFailedError(reason)

    # ---- saving and leaving ------------------------------------------------------------------
    def _save(self) -> str:
        """Begin the checkpoint of this step. A full disk costs this checkpoint, not the run.

        Returns:
            The tensor that is not finite, for which nothing is saved: it is nothing to go back to.
        """
        began = time.perf_counter()
        tensors, step = self.state.tensors(), self.state.progress.step
        if spoilt := first_not_finite(tensors):
            log.error("no checkpoint of step %d: %s is not finite", step, spoilt)
            return spoilt
        tensors |= self.state.anticipation.state(step)
        values = self.state.values() | self.recorder.values()
        self.checkpoints.start(step, tensors, values, durable_first=self.recorder.files)
        save_own(self.run, self.engine, step, self.checkpoints.published())
        self._told_next["checkpoint_seconds"] = time.perf_counter() - began
        return ""

    def _save_last(self) -> None:
        """The run ends here, so the checkpoint of this step must be on disk."""
        self.checkpoints.wait()
        step = self.state.progress.step
        if self.checkpoints.saved_step != step and (spoilt := self._save()):
            self._fail(
                f"after step {step} {spoilt} is not finite: it was not saved, and the"
                f" newest checkpoint is that of step {self.checkpoints.saved_step}"
            )
        self.checkpoints.require(step)

    def _leave_early(self) -> int:
        self.stop.ask("another rank was asked to stop")
        self._save_last()
        log.info(
            "%s: stopped after step %d of %d; the same command continues",
            self.stop.reason,
            self.state.progress.step,
            self.plan.steps,
        )
        self.recorder.close(self.audit.result(), None)
        return ExitCode.resumable

    def _last_step(self) -> StepPlan:
        """The plan of the step just done; where none was, of the last one that the run would do."""
        done, run = self.state.progress, self.run
        number = done.step or self.plan.steps
        # A step belongs to the stage in which it begins: where it ends the next one may.
        begin = done.tokens - 1 if done.step else self.plan.tokens_at(number - 1)
        return plan_step(number, begin, self.plan, run.train, run.optim)


def _due(step: int, every: int, last: int | None = None) -> bool:
    return step == last or (every > 0 and step % every == 0)
