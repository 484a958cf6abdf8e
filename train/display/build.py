"""A config in, a :class:`Recorder` out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from parallel.engine import Engine
from quant.probe import QuantProbe
from train.checkpoint.state import RunState
from train.config.schema import RunConfig, WandbMode
from train.display.console import Console
from train.display.health import Health
from train.display.page import Page
from train.display.tensorboard_tracker import TensorBoardTracker
from train.display.wandb_tracker import WandbTracker
from train.record.evaluation import Evaluator
from train.record.metrics import MetricsFile, read_metrics
from train.record.probing import Prober
from train.record.profiling import PROFILE, ProfilerWindow
from train.record.receipt import plain
from train.record.recorder import Recorder
from train.record.report import RunReport, run_title
from train.record.sample_log import SampleLog, data_hash
from train.record.tracker import Tracker
from train.run_folder.folder import METRICS
from train.stages import StagePlan

log = logging.getLogger(__name__)


def build_recorder(
    run: RunConfig,
    plan: StagePlan,
    state: RunState,
    probe: QuantProbe,
    report: RunReport,
    matmul_rate: float,
    saved: Mapping[str, Any],
) -> Recorder:
    """Open what a run tells of itself, its files cut to the step at which it stands.

    Args:
        run: the config.
        plan: its stages.
        state: where it stands.
        probe: what quantisation does.
        report: what it leaves at the end.
        matmul_rate: of this rank's device, FLOPs per second.
        saved: what the trackers gave to the checkpoint from which the run resumes.
    """
    train, folder, engine, done = run.train, Path(run.run_dir), state.engine, state.progress.step
    rate = sum(engine.gather(matmul_rate))
    metrics = MetricsFile(folder / METRICS)
    samples = SampleLog(folder, engine, data_hash(state.loader.manifest), train.log_samples)
    reads = engine.rank or train.eval_only  # maybe the folder of a run that is training
    if not reads:
        _cut_lines(state, metrics, samples)
    last = train.eval_tokens if train.final_eval_tokens is None else train.final_eval_tokens
    evaluator, final_evaluator = (
        Evaluator(engine, state.loader, tokens, state.average)
        for tokens in (train.eval_tokens, last)
    )
    trackers = [] if reads else build_trackers(run, plan, metrics, done, saved)
    profiler = build_profiler(run, plan, engine, done)
    told = (metrics, samples, trackers, profiler, report)
    screen = next((t for t in trackers if isinstance(t, Console)), None)
    evaluators = (evaluator, final_evaluator)
    prober = Prober(engine, state.loader, run.model, train.probe_every)
    return Recorder(state, run.model, probe, *told, *evaluators, rate, plan.steps, screen, prober)


def _cut_lines(state: RunState, metrics: MetricsFile, samples: SampleLog) -> None:
    """Let the run's files end with the step of its checkpoint."""
    step = state.progress.step
    ends = {metrics.path: metrics.cut(step)}
    last = samples.resume(step, state.recovery.state.rollbacks)
    if samples.enabled:
        ends[samples.lines.path] = last
    for path, found in ends.items():
        if found != step:
            log.warning(
                f"{path} ends with step {found}, the checkpoint is of step {step}: the lines"
                " between are lost"
            )


def build_profiler(run: RunConfig, plan: StagePlan, engine: Engine, done: int) -> ProfilerWindow:
    """The profiler's window; one that begins before this start, and was not written, is moved.

    Args:
        run: the config.
        plan: its stages.
        engine: of this rank.
        done: steps that earlier starts have done.
    """
    folder, start, steps = Path(run.run_dir), run.train.profile_start, run.train.profile_steps
    if steps and start <= done:
        written = any((folder / PROFILE).glob("*.txt"))
        start, steps = done + 1, 0 if written else min(steps, plan.steps - done)
        if steps and engine.rank == 0:
            log.warning(
                "train.profile_start=%d lies before this start: the profile is of steps %d to %d",
                run.train.profile_start, start, start + steps - 1,
            )  # fmt: skip
    return ProfilerWindow(folder, start, steps, engine.device, engine.rank)


def build_trackers(
    run: RunConfig, plan: StagePlan, metrics: MetricsFile, done: int, saved: Mapping[str, Any]
) -> list[Tracker]:
    """What shows metrics besides their file.

    Args:
        run: the config.
        plan: its stages.
        metrics: holds the steps that the run has done.
        done: their number.
        saved: what the trackers gave to the checkpoint from which the run resumes.
    """
    folder, wandb = Path(run.run_dir), run.wandb
    history = partial(read_metrics, metrics.path)
    console, health = Console(plan.steps, done, run.train.log_every), Health(run.model, history)
    page = Page(folder, run_title(run), plan.steps, health)
    trackers: list[Tracker] = [console, health, page]
    if wandb.mode is not WandbMode.disabled:
        trackers.append(
            WandbTracker(
                wandb.mode is WandbMode.online, wandb.project, wandb.entity,
                wandb.name or folder.name, folder, plain(run), history, done, saved.get("wandb"),
            )
        )  # fmt: skip
    if run.tensorboard:
        trackers.append(TensorBoardTracker(folder / "tensorboard", done, history))
    return trackers
