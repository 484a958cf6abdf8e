"""The composition root: a config in, a :class:`Trainer` out. Read it to see what a run is."""

from __future__ import annotations

import datetime
import logging
import os
from functools import partial
from pathlib import Path

import torch
from torch import nn

from data.content import library_versions
from data.epochs import planned_uses
from data.loader import Loader, build_loader
from data.prepare import build_tokenizer
from model.init import init_weights
from model.kernels.select import select
from model.parameter_counts import parameter_shapes
from model.precision import HEAD_PRECISIONS
from model.transformer import DeepSeekV4
from optim.build import build_optimizer
from optim.groups import build_table
from optim.offload import Offload, Transfers
from parallel.activation_offload import ActivationOffload, prepare_blocks
from parallel.compiled_blocks import CompiledBlocks
from parallel.config import EngineName
from parallel.deepspeed_engine import DeepSpeedEngine
from parallel.distributed import DistributedEngine
from parallel.engine import Engine, TorchEngine
from parallel.launch import launched_rank, launched_world_size
from parallel.lost_rank import all_ready
from parallel.mesh import Mesh, build_mesh, init_process_group
from parallel.offload import take_masters
from parallel.pipeline_engine import PipelineEngine
from parallel.pipeline_stage import ModelPart
from parallel.sharded_model import build_sharded_model
from quant.apply import reads_master
from train.audit.audit import Audit
from train.checkpoint.average import WeightAverage
from train.checkpoint.manager import Checkpoints
from train.checkpoint.retention import Retention
from train.checkpoint.state import RunState
from train.config.flat import flat_config
from train.config.load import dump
from train.config.schema import Device, Precision, RunConfig
from train.display.build import build_recorder
from train.errors import UserError
from train.loop import Trainer
from train.phase import PhaseSwitch
from train.preflight.banner import announce
from train.preflight.matmul_rate import measured_matmul_rate, times_slower_than_fp32
from train.preflight.pace import Pace, long_run
from train.preflight.precision import PrecisionChoice
from train.record.continuation import check_prompt, first_words
from train.record.params_table import table_rows, write_params_table
from train.record.receipt import code_version, plain
from train.record.report import RunReport
from train.recovery.anticipation import Anticipation
from train.recovery.judge import Recovery
from train.recovery.memory import told_out_of_memory
from train.recovery.stop import StopRequest
from train.run_folder.folder import CHECKPOINTS, holds_run, write_identity
from train.run_folder.identity import RunIdentity
from train.run_folder.origin import agree_on_ranks
from train.run_folder.restore import restore
from train.run_folder.tokenizer import inherited_tokenizer
from train.stages import StagePlan, resolve

PARAMS = "params.csv"
PROMPT_BYTES = 64  # of held-out text, where no prompt is given
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
    stop = StopRequest(run.train.time_limit_seconds)
    plan = resolve(run)
    mesh = build_layout(run)
    loader = build_data(run)
    all_ready(run.parallel.timeout_seconds)
    asked = identify(run, loader)
    agree_on_ranks(asked)
    with told_out_of_memory(run, lambda: None, compute_device(run.train.device)):
        rate = foretell(run, plan, loader)
        compiled = build_compiled(run)
        engine = build_engine(run, build_model(run, loader, mesh, compiled), mesh)
        phase = PhaseSwitch(engine, run.quant)
        state = build_state(run, plan, engine, loader)
        checkpoints = build_checkpoints(run)
        identity, trackers = restore(run, asked, state, checkpoints)
        open_folder(run, plan, identity, state, phase)
        warn_of_emulation(run.train.precision, engine)
        prompt = sample_prompt(run, loader)
        report = RunReport(run, engine, loader.tokenizer, prompt, identity, precision)
        recorder = build_recorder(run, plan, state, phase.probe, report, rate, trackers)
        audit, pace = Audit(run, plan, engine, compiled), Pace(run, plan)
        return Trainer(run, plan, engine, phase, state, checkpoints, recorder, audit, stop, pace)


def build_data(run: RunConfig) -> Loader:
    """What plans batches, its data opened."""
    tokenizer = inherited_tokenizer(run) or build_tokenizer(run.data)
    loader = build_loader(run.data, tokenizer, run.seed, 1 + run.model.num_nextn_predict_layers)
    check_prompt(tokenizer, sample_prompt(run, loader), run.sample.tokens, run.model)
    return loader


def foretell(run: RunConfig, plan: StagePlan, loader: Loader) -> float:
    """Tell what the run will do, before anything large is made.

    Returns:
        FLOPs per second that matmuls reach on this rank's device.
    """
    device = compute_device(run.train.device)
    if not run.train.eval_only:
        tokens, stated = loader.source_tokens, loader.stated_tokens
        uses = planned_uses(tokens, loader.weights, plan.end_tokens, stated)
        announce(run, plan, uses, device.type)
    rate = measured_matmul_rate(device, _DTYPES[run.train.precision])
    if launched_rank() == 0 and not run.train.eval_only:
        for line in (rate.under_load(), *long_run(run, plan, rate.usual * launched_world_size())):
            if line:
                log.warning("%s", line)
    return rate.peak


def sample_prompt(run: RunConfig, loader: Loader) -> str:
    """What the sample continues: the user's text, else how the held-out text begins."""
    if run.sample.prompt is not None:
        return run.sample.prompt
    room = run.model.max_position_embeddings - run.sample.tokens  # a token has a byte at least
    return first_words(loader.validation_beginning(max(1, min(PROMPT_BYTES, room))))


def build_state(run: RunConfig, plan: StagePlan, engine: Engine, loader: Loader) -> RunState:
    """What changes while the run trains, at its first step."""
    average, recovery = build_average(run, engine.model), Recovery(run.train.recovery)
    anticipation = Anticipation(run, plan, engine, loader, recovery.anticipates)
    return RunState(engine, loader, average, recovery, anticipation)


def identify(run: RunConfig, loader: Loader) -> RunIdentity:
    """The record of the run that is asked for, its data opened."""
    config = flat_config(run)
    kernels, device = config["model.kernels"], compute_device(run.train.device)
    precision, head = config["train.precision"], config["train.head_precision"]
    return RunIdentity(
        config=config,
        tokenizer=loader.manifest["tokenizer"],
        sources=loader.manifest["sources"],
        code=code_version(),
        libraries=library_versions(run.data),
        layout=plain(run.parallel.resolve(launched_world_size())),
        kernels={"kernels": kernels, "device": device.type},
        precision={"compute": precision, "head": head},
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
    """Join the other processes, where there are any or the engine counts on it; once is enough."""
    if launched_world_size() > 1 or run.engine.name is EngineName.deepspeed:
        init_process_group(compute_device(run.train.device))


def build_layout(run: RunConfig) -> Mesh | None:
    """The mesh of all processes; None where there is but one, and plain torch runs.

    One process runs plain torch: FSDP would copy every weight for each use, and gain nothing.
    """
    layout = run.parallel.resolve(launched_world_size())
    if layout.world_size == 1 and run.engine.name is EngineName.torch:
        return None
    device = compute_device(run.train.device)
    join_ranks(run)
    agree_on_ranks(RunIdentity(config=flat_config(run)))  # before any layout is made of it
    timeout = datetime.timedelta(seconds=run.parallel.timeout_seconds)
    return build_mesh(layout, device.type, timeout, {stage.cp for stage in resolve(run).reached()})


def build_compiled(run: RunConfig) -> CompiledBlocks | None:
    """What makes graphs of the blocks, if that is asked for and something trains."""
    return CompiledBlocks() if run.train.compile and not run.train.eval_only else None


def build_model(
    run: RunConfig, loader: Loader, mesh: Mesh | None, compiled: CompiledBlocks | None
) -> DeepSeekV4:
    """The model, or this process's part of it, with its first weights, where it will compute."""
    train, device = run.train, compute_device(run.train.device)
    seed = run.seed + run.init_seed_offset
    token_counts_V = loader.token_counts(run.model.vocab_size)
    away = ActivationOffload(Transfers(device)) if run.parallel.offload_activations else None
    if mesh is not None and run.engine.name is EngineName.torch:
        model = build_sharded_model(
            run.model, mesh, device, train.precision.value, train.activation_checkpoint.value,
            seed, token_counts_V, partial(reads_master, run.quant), resolve(run).longest_row,
            away, compiled,
        )  # fmt: skip
    else:
        model = DeepSeekV4(run.model)
        init_weights(model, seed, token_counts_V)
        prepare_blocks(model, train.activation_checkpoint.value, away, compiled)
        model = model.to(device)
    model.compute_dtype = _DTYPES[run.train.precision]
    model.head_dtype, model.head_tf32 = HEAD_PRECISIONS[run.train.head_precision.value]
    return model


def compute_device(asked: Device) -> torch.device:
    """The device of this process; ``auto`` takes CUDA where there is one."""
    if asked is Device.cpu or (asked is Device.auto and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def build_engine(run: RunConfig, model: DeepSeekV4, mesh: Mesh | None) -> Engine:
    """The engine of this world, with the optimizer."""
    device, group = compute_device(run.train.device), mesh.data.get_group() if mesh else None
    if run.engine.name is EngineName.deepspeed:
        assert mesh is not None
        table = build_table(parameter_shapes(run.model), run.optim, run.model.split_counts)
        return DeepSpeedEngine(
            model, table, run.optim, run.engine, device, mesh, run.train.micro_batch_size
        )
    offload = build_offload(run, model, device)
    optimizer = build_optimizer(
        model.named_parameters(), run.optim, split_counts=run.model.split_counts, group=group,
        shapes=parameter_shapes(run.model), offload=offload,
        product=select("symmetric_product", run.model.kernels),
    )  # fmt: skip
    if mesh is None:
        masters = offload.masters if offload is not None else None
        return TorchEngine(model, optimizer, device, run.optim.grad_clip, masters)
    if isinstance(model, ModelPart):
        return PipelineEngine(model, optimizer, device, run.optim.grad_clip, mesh)
    return DistributedEngine(model, optimizer, device, run.optim.grad_clip, mesh)


def build_offload(run: RunConfig, model: DeepSeekV4, device: torch.device) -> Offload | None:
    """What rests in host memory; None: nothing."""
    if run.parallel.offload == "none":
        return None
    transfers = Transfers(device)
    if run.parallel.offload == "optimizer":
        return Offload(transfers)
    assert run.train.precision is Precision.bf16
    return Offload(transfers, take_masters(model, transfers))


def build_average(run: RunConfig, model: nn.Module) -> WeightAverage | None:
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


def open_folder(
    run: RunConfig, plan: StagePlan, identity: RunIdentity, state: RunState, phase: PhaseSwitch
) -> None:
    """Write what is known before the first step.

    Record, resolved config, tokenizer, table of parameters.

    An evaluation leaves those of the run that it evaluates.

    Raises:
        UserError: evaluation is asked for and nothing is held out.
    """
    train, folder, engine = run.train, Path(run.run_dir), state.engine
    seq_len = plan.stages[0].seq_len
    if (train.eval_every or train.eval_only) and not state.loader.validation(seq_len, seq_len):
        key = "eval_only" if train.eval_only else "eval_every"
        raise UserError(
            f"train.{key}={getattr(train, key)} needs validation text, but"
            f" data.validation.bytes={run.data.validation.bytes} holds out none"
        )
    phase.quantise(any(stage.quantised for stage in plan.reached()))
    rows = engine.gather(table_rows(engine.optimizer.table, train, phase.records))
    if engine.rank or (train.eval_only and holds_run(folder)):
        return
    write_identity(folder, identity, dump(run), state.loader.tokenizer)
    write_params_table(folder / PARAMS, rows, parameter_shapes(run.model))
