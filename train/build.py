"""The composition root: a config in, a :class:`Trainer` out. Read it to see what a run is."""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.content import library_versions
from data.loader import Loader, build_loader
from data.prepare import build_tokenizer
from data.tokenizer import Tokenizer
from model.flops import parameter_shapes
from model.init import init_weights
from model.transformer import DeepSeekV4
from optim.build import build_optimizer
from parallel.activation_checkpoint import checkpoint_blocks
from parallel.distributed import DistributedEngine
from parallel.engine import Engine, TorchEngine
from parallel.launch import launched_world_size
from parallel.lost_rank import all_ready
from parallel.mesh import Mesh, build_mesh, init_process_group
from parallel.pipeline_engine import PipelineEngine
from parallel.pipeline_stage import ModelPart
from parallel.sharded_model import build_sharded_model
from quant.apply import reads_master
from train.audit.audit import Audit
from train.audit.config_reads import ConfigReads
from train.checkpoint.average import WeightAverage
from train.checkpoint.manager import Checkpoints
from train.checkpoint.retention import Retention
from train.config.flat import flat_config
from train.config.schema import Device, Precision, RunConfig, WandbMode, dump
from train.errors import UserError
from train.loop import Trainer, restore
from train.phase import PhaseSwitch
from train.preflight.matmul_rate import measured_matmul_rate, times_slower_than_fp32
from train.preflight.precision import PrecisionChoice
from train.record.continuation import check_prompt
from train.record.evaluation import Evaluator
from train.record.metrics import MetricsFile, read_metrics
from train.record.params_table import table_rows, write_params_table
from train.record.profiling import PROFILE, ProfilerWindow
from train.record.receipt import code_version, plain
from train.record.report import RunReport
from train.record.sample_log import SampleLog, data_hash
from train.record.trackers import Console, TensorBoardTracker, Tracker
from train.record.wandb_tracker import WandbTracker
from train.recovery.anticipation import Anticipation
from train.recovery.judge import Recovery
from train.recovery.stop import StopRequest
from train.run_folder.folder import CHECKPOINTS, METRICS, holds_run, write_identity
from train.run_folder.identity import RunIdentity
from train.run_folder.origin import agree_on_ranks
from train.stages import StagePlan, resolve

PARAMS = "params.csv"
log = logging.getLogger(__name__)
_DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}
_SLOW = 1.5  # times longer than fp32: worth saying


def build(run: RunConfig, precision: PrecisionChoice | None = None) -> Trainer:
    """Put a run together and bring it to where its folder left off.

    Args:
        run: its precision settled.
        precision: how that was chosen, if it was; stands in the receipt.

    Raises:
        ValueError: the input cannot be; names the key, the file and the values.
    """
    config_yaml, config = dump(run), flat_config(run)
    reads = ConfigReads(run)
    plan = resolve(run)
    folder = Path(run.run_dir)
    stop = StopRequest(run.train.time_limit_seconds)
    mesh = build_layout(run)
    tokenizer = build_tokenizer(run.data)
    loader = build_loader(run.data, tokenizer, run.seed, 1 + run.model.num_nextn_predict_layers)
    check_prompt(tokenizer, run.sample.prompt, run.sample.tokens, run.model)
    all_ready(run.parallel.timeout_seconds)
    identity = identify(run, config, loader)
    agree_on_ranks(identity)
    model = build_model(run, loader, mesh)
    engine = build_engine(run, model, mesh)
    phase = PhaseSwitch(engine, run.quant)
    average = build_average(run, model)
    evaluator = Evaluator(engine, loader, run.train.eval_tokens, average)
    last_tokens = run.train.final_eval_tokens
    if last_tokens is None:
        last_tokens = run.train.eval_tokens
    final_evaluator = Evaluator(engine, loader, last_tokens, average)
    checkpoints = build_checkpoints(run)
    metrics = MetricsFile(folder / METRICS)
    recovery = Recovery(run.train.recovery)
    anticipation = Anticipation(run, plan, engine, loader, recovery.anticipates)
    data = data_hash(loader.manifest)
    samples = SampleLog(folder, engine, data, run.train.log_samples)
    restored = restore(
        run, plan, identity, engine, loader, average, checkpoints, metrics, samples, recovery,
        anticipation,
    )  # fmt: skip
    identity, progress = restored.identity, restored.progress
    open_folder(folder, config_yaml, identity, tokenizer, run, plan, engine, phase, evaluator)
    matmul_rate = measured_matmul_rate(engine.device, _DTYPES[run.train.precision])
    warn_of_emulation(run.train.precision, engine)
    return Trainer(
        run=run,
        plan=plan,
        identity=identity,
        engine=engine,
        loader=loader,
        phase=phase,
        average=average,
        evaluator=evaluator,
        final_evaluator=final_evaluator,
        audit=Audit(run, plan, engine, reads),
        checkpoints=checkpoints,
        recovery=recovery,
        anticipation=anticipation,
        metrics=metrics,
        samples=samples,
        trackers=build_trackers(run, plan, engine, metrics, progress.step, restored.trackers),
        profiler=build_profiler(run, plan, engine, progress.step),
        report=RunReport(run, engine, tokenizer, metrics, identity, precision),
        stop=stop,
        matmul_rate=sum(engine.gather(matmul_rate)),
        progress=progress,
        weights=restored.weights,
    )


def identify(run: RunConfig, config: dict[str, Any], loader: Loader) -> RunIdentity:
    """The record of the run that is asked for, its data opened.

    Args:
        run: the config.
        config: the same, flat.
        loader: knows its data.
    """
    return RunIdentity(
        config=config,
        tokenizer=loader.manifest["tokenizer"],
        sources=loader.manifest["sources"],
        code=code_version(),
        libraries=library_versions(run.data),
        layout=plain(run.parallel.resolve(launched_world_size())),
        kernels={
            "kernels": config["model.kernels"],
            "device": compute_device(run.train.device).type,
        },
        precision={
            "compute": config["train.precision"],
            "head": config["train.head_precision"],
        },
    )


def warn_of_emulation(precision: Precision, engine: Engine) -> None:
    """Say so where the asked precision is emulated: a run of minutes becomes one of hours."""
    if engine.device.type != "cpu" or precision is Precision.fp32:
        return
    slower = times_slower_than_fp32(engine.device, _DTYPES[precision])
    if slower > _SLOW and engine.rank == 0:
        log.warning(
            "train.precision=%s: this CPU multiplies such matrices %.0f times slower than fp32"
            " ones; train.precision=fp32 train.head_precision=fp32 is faster here",
            precision.value, slower,
        )  # fmt: skip


def join_ranks(run: RunConfig) -> None:
    """Join the other processes, where there are any; once is enough."""
    if launched_world_size() > 1:
        init_process_group(compute_device(run.train.device))


def build_layout(run: RunConfig) -> Mesh | None:
    """The mesh of all processes; None where there is but one.

    One process runs plain torch: FSDP would copy every weight for each use, and gain nothing.
    """
    layout = run.parallel.resolve(launched_world_size())
    if layout.world_size == 1:
        return None
    device = compute_device(run.train.device)
    join_ranks(run)
    agree_on_ranks(RunIdentity(config=flat_config(run)))  # before any layout is made of it
    return build_mesh(layout, device.type, datetime.timedelta(seconds=run.parallel.timeout_seconds))


def build_model(run: RunConfig, loader: Loader, mesh: Mesh | None) -> DeepSeekV4:
    """The model, or this process's part of it, with its first weights, where it will compute."""
    train, device = run.train, compute_device(run.train.device)
    seed = run.seed + run.init_seed_offset
    token_counts_V = loader.token_counts(run.model.vocab_size)
    if mesh is not None:
        model = build_sharded_model(
            run.model, mesh, device, train.precision.value, train.activation_checkpoint.value,
            seed, token_counts_V, partial(reads_master, run.quant), resolve(run).longest_row,
        )  # fmt: skip
    else:
        model = DeepSeekV4(run.model)
        init_weights(model, seed, token_counts_V)
        checkpoint_blocks(model, train.activation_checkpoint.value)
        model = model.to(device)
    model.compute_dtype = _DTYPES[run.train.precision]
    model.head_dtype = _DTYPES[run.train.head_precision]
    return model


def compute_device(asked: Device) -> torch.device:
    """The device of this process; ``auto`` takes CUDA where there is one."""
    if asked is Device.cpu or (asked is Device.auto and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def build_engine(run: RunConfig, model: DeepSeekV4, mesh: Mesh | None) -> Engine:
    """The engine of this world, with the optimizer."""
    device, group = compute_device(run.train.device), mesh.data.get_group() if mesh else None
    optimizer = build_optimizer(
        model.named_parameters(), run.optim, split_counts=run.model.split_counts, group=group,
        shapes=parameter_shapes(run.model),
    )  # fmt: skip
    if mesh is None:
        return TorchEngine(model, optimizer, device, run.optim.grad_clip)
    if isinstance(model, ModelPart):
        return PipelineEngine(model, optimizer, device, run.optim.grad_clip, mesh)
    return DistributedEngine(model, optimizer, device, run.optim.grad_clip, mesh)


def build_average(run: RunConfig, model: DeepSeekV4) -> WeightAverage | None:
    """The average of the weights, if one is asked for and something trains."""
    decay = run.train.ema_decay
    if not decay or run.train.eval_only:
        return None
    return WeightAverage(model.named_parameters(), decay)


def build_checkpoints(run: RunConfig) -> Checkpoints:
    """The run's checkpoints, and which of them stay."""
    train = run.train
    retention = Retention(
        train.keep_checkpoints, train.keep_checkpoints_every, train.keep_best_checkpoints
    )
    return Checkpoints(Path(run.run_dir) / CHECKPOINTS, retention, train.async_checkpoint)


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
    run: RunConfig,
    plan: StagePlan,
    engine: Engine,
    metrics: MetricsFile,
    done: int,
    saved: Mapping[str, Any],
) -> list[Tracker]:
    """What shows metrics besides their file; on rank 0 only.

    Args:
        run: the config.
        plan: its stages.
        engine: of this rank.
        metrics: holds the steps that the run has done.
        done: their number.
        saved: what the trackers gave to the checkpoint from which the run resumes.
    """
    if engine.rank or run.train.eval_only:
        return []
    folder, wandb = Path(run.run_dir), run.wandb
    history = partial(read_metrics, metrics.path)
    trackers: list[Tracker] = [Console(plan.steps, done, run.train.log_every)]
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


def open_folder(
    folder: Path,
    config_yaml: str,
    identity: RunIdentity,
    tokenizer: Tokenizer,
    run: RunConfig,
    plan: StagePlan,
    engine: Engine,
    phase: PhaseSwitch,
    evaluator: Evaluator,
) -> None:
    """Write what is known before the first step.

    Record, resolved config, tokenizer, table of parameters.

    An evaluation leaves those of the run that it evaluates.

    Raises:
        UserError: evaluation is asked for and nothing is held out.
    """
    train, seq_len = run.train, plan.stages[0].seq_len
    if (train.eval_every or train.eval_only) and not evaluator.has_text(seq_len):
        key = "eval_only" if train.eval_only else "eval_every"
        raise UserError(
            f"train.{key}={getattr(train, key)} needs validation text, but"
            f" data.validation.bytes={run.data.validation.bytes} holds out none"
        )
    phase.quantise(any(stage.quantised for stage in plan.reached()))
    rows = engine.gather(table_rows(engine.optimizer.table, train, phase.records))
    if engine.rank or (train.eval_only and holds_run(folder)):
        return
    write_identity(folder, identity, config_yaml, tokenizer)
    write_params_table(folder / PARAMS, rows, parameter_shapes(run.model))
