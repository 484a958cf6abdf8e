"""The whole configuration of a run: typed sections, and :func:`load`, which makes a RunConfig.

``RunConfig`` is seen only by ``train/``; every other package gets its own section. Nothing is
changed after :func:`load`; derived values are functions (the plan of stages: ``train/stages.py``).
Progress is counted in tokens of the global batch, lengths in tokens, times in seconds, "every" in
optimizer steps.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import train.config.scaled  # noqa: F401  the resolver of conf/model/v4_scaled.yaml
from conf.problems import refuse
from conf.ranges import number, out_of_range
from data.config import DataConfig
from model.config import IndexerPhase, Kernels, LayerKind, ModelConfig
from model.errors import ConfigError
from optim.config import OptimConfig, ScheduleKind, StateDtype
from parallel.config import EngineConfig, EngineName, ParallelConfig
from quant.config import ExpertFormat, QuantConfig
from train.config.recovery import RecoveryConfig
from train.errors import UserError, check_all


class Precision(StrEnum):
    """Compute dtype of the matmuls; parameters are fp32 masters either way (model/precision.py).

    ``auto`` is replaced before anything is built (train/preflight/precision.py).
    """

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Device(StrEnum):
    """Where the run computes; auto takes CUDA where there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ActivationCheckpoint(StrEnum):
    """What the backward pass recomputes."""

    none = "none"
    block = "block"
    selective = "selective"


class Weights(StrEnum):
    """Which weights of a checkpoint are meant."""

    model = "model"  # those that were trained
    average = "average"  # their moving average (train.ema_decay)


class WandbMode(StrEnum):
    """Weights & Biases, never on without being asked for."""

    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass
class StageConfig:
    """One stretch of a run. What is None is taken from the ``train`` section.

    Attributes:
        name: for messages and the plan.
        until_tokens: the stage ends when this many tokens of the whole run are trained.
        seq_len: tokens of a row.
        global_batch_tokens: tokens of a step.
        ramp_from_tokens: tokens of the stage's first step; the batch grows linearly from here to
            ``global_batch_tokens`` in steps of their greatest common divisor. 0 = no ramp.
        ramp_tokens: trained tokens over which the batch grows.
        micro_batch_size: rows of a forward pass on each rank.
        cp: shards in which ranks hold every row of this stage; divides ``parallel.dp_shard *
            parallel.cp``. None: ``parallel.cp``.
        indexer_phase: full, warmup or sparse.
        lr: constant learning rate of the stage instead of the schedule's (indexer warm-up).
        mtp_loss_weight: weight of the MTP loss, instead of the ``train`` section's two values.
        bias_update_speed: speed of the expert bias.
        quantised: whether the ``quant`` section acts in this stage.
    """

    name: str = ""
    until_tokens: int = number(0, least=0)
    seq_len: int | None = number(None, least=2)
    global_batch_tokens: int | None = number(None, least=1)
    ramp_from_tokens: int = number(0, least=0)
    ramp_tokens: int = number(0, least=0)
    micro_batch_size: int | None = number(None, least=1)
    cp: int | None = number(None, least=1)
    indexer_phase: IndexerPhase | None = None
    lr: float | None = number(None, least=0, most=100)
    mtp_loss_weight: float | None = number(None, least=0, most=100)
    bias_update_speed: float | None = number(None, least=0, most=1)
    quantised: bool = True


@dataclass
class TrainConfig:
    """The loop.

    Attributes:
        steps: optimizer steps of the run. With ``stages``, which fix the schedules' horizon, it
            only ends the run earlier (0: it does not).
        seq_len: tokens of a row.
        global_batch_tokens: tokens of an optimizer step over all ranks.
        micro_batch_size: rows of a forward pass on each rank.
        precision: fp32 or bf16 matmuls; auto: the faster one of the machine on which the run first
            starts (train/preflight/precision.py).
        head_precision: operands of the head's matmuls; fp32 as released, or bf16 for speed (CUDA
            keeps fp32 logits, a CPU rounds them to bf16 once); auto: as ``precision``.
        device: auto, cpu or cuda.
        stages: the plan, in order; empty: one stage made from this section.
        indexer_phase: phase of the one stage.
        mtp_loss_weight: weight of the MTP loss until the learning rate decays.
        mtp_loss_weight_decay: its weight from the first decaying step on.
        indexer_loss_weight: weight of the indexer's KL loss; 0 = off.
        balance_loss_weight: weight of the per-document balance loss; 0 = off.
        bias_update_speed: change of the expert bias a step; 0 = off.
        bias_stops_at_decay: freeze the expert bias from the first decaying step on.
        eval_every: steps between evaluations; 0 = only at the end.
        eval_only: evaluate once, on the rows of the final evaluation, and leave.
        eval_tokens: tokens of an evaluation, always the same rows; 0 = the whole validation split.
        final_eval_tokens: the same for the one after the last step, which is compared with xz;
            null: as ``eval_tokens``.
        probe_every: steps between long-context probes (train/record/probing.py); 0 = never.
        checkpoint_every: steps between checkpoints; 0 = only at the end or when stopped.
        async_checkpoint: train on while a checkpoint is written; costs a copy of weights and
            optimizer state in host memory.
        keep_checkpoints: how many of the newest are kept; 0 = all.
        keep_checkpoints_every: besides, those whose step is a multiple of this; 0 = none.
        keep_best_checkpoints: besides, how many with the lowest validation loss; 0 = none.
        time_limit_seconds: save and leave with exit code 75 after this long; 0 = no limit.
        log_every: steps between console lines.
        log_samples: write the documents of every row of every step to ``samples.jsonl``.
        monitor_every: steps between the costly monitors (indexer recall, stream norms); 0 = never.
        activation_checkpoint: what the backward pass recomputes.
        ema_decay: decay of the averaged weights, per step; 0 = none are kept.
        weights: which weights of a checkpoint ``eval_only`` evaluates and ``init_from`` starts
            from: model, or average.
        profile_start: first step that is profiled.
        profile_steps: number of profiled steps; 0 = no profile.
        recovery: what is done about steps that fail.
    """

    steps: int = number(1000, least=0)
    seq_len: int = number(512, least=2)
    global_batch_tokens: int = number(8192, least=1)
    micro_batch_size: int = number(8, least=1)
    precision: Precision = Precision.auto
    head_precision: Precision = Precision.fp32
    device: Device = Device.auto
    stages: list[StageConfig] = field(default_factory=list)
    indexer_phase: IndexerPhase = IndexerPhase.sparse
    mtp_loss_weight: float = number(0.3, least=0, most=100)
    mtp_loss_weight_decay: float = number(0.1, least=0, most=100)
    indexer_loss_weight: float = number(1e-2, least=0, most=100)
    balance_loss_weight: float = number(1e-4, least=0, most=100)
    bias_update_speed: float = number(1e-3, least=0, most=1)
    bias_stops_at_decay: bool = False
    eval_every: int = number(0, least=0)
    eval_only: bool = False
    eval_tokens: int = number(65536, least=0)
    final_eval_tokens: int | None = number(None, least=0)
    probe_every: int = number(0, least=0)
    checkpoint_every: int = number(0, least=0)
    async_checkpoint: bool = True
    keep_checkpoints: int = number(2, least=0)
    keep_checkpoints_every: int = number(0, least=0)
    keep_best_checkpoints: int = number(0, least=0)
    time_limit_seconds: float = number(0.0, least=0)
    log_every: int = number(10, least=1)
    log_samples: bool = False
    monitor_every: int = number(50, least=0)
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint.none
    ema_decay: float = number(0.0, least=0, below=1)
    weights: Weights = Weights.model
    profile_start: int = number(10, least=1)
    profile_steps: int = number(0, least=0)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)

    def validate(self, prefix: str = "train") -> None:
        """Refuse values that cannot be.

        Raises:
            ValueError: names the keys and their values.
        """
        own = [message for ok, message in self._checks(prefix) if not ok]
        check_all(
            lambda: refuse(UserError, own),
            lambda: self.recovery.validate(self.checkpoint_every, self.keep_checkpoints),
        )

    def _checks(self, prefix: str) -> Iterator[tuple[bool, str]]:
        yield (
            self.head_precision != Precision.bf16 or self.precision == Precision.bf16,
            f"{prefix}.head_precision={self.head_precision.value} needs {prefix}.precision=bf16,"
            f" not {self.precision.value} ({prefix}.head_precision=auto follows it)",
        )
        yield (
            not self.keep_best_checkpoints or _meet(self.eval_every, self.checkpoint_every),
            f"{prefix}.keep_best_checkpoints={self.keep_best_checkpoints} needs checkpoints of"
            f" evaluated steps, but {prefix}.eval_every={self.eval_every} and"
            f" {prefix}.checkpoint_every={self.checkpoint_every}: one must divide the other",
        )
        yield (
            self.checkpoint_every > 0 or not self.keep_checkpoints_every,
            f"{prefix}.keep_checkpoints_every={self.keep_checkpoints_every} needs checkpoints to"
            f" choose from, but {prefix}.checkpoint_every={self.checkpoint_every}",
        )
        yield (
            bool(self.stages) or self.steps > 0 or self.eval_only,
            f"{prefix}.steps={self.steps} must be above 0, since {prefix}.stages is empty",
        )


@dataclass
class SampleConfig:
    """Text that the model writes at each evaluation and at the end of a run.

    Attributes:
        prompt: what the model continues; null: the first words of the held-out text, and where none
            is held out an end-of-document token.
        tokens: length of the continuation; 0 = no text.
        temperature: 0 = the likeliest token each time.
    """

    prompt: str | None = None
    tokens: int = number(120, least=0, most=1_000_000)
    temperature: float = number(0.7, least=0)


@dataclass
class WandbConfig:
    """Weights & Biases.

    Attributes:
        mode: disabled, offline or online.
        project: project that the run is shown under.
        entity: team or user; empty: the account's own.
        name: name of the run; empty: the run folder's name.
    """

    mode: WandbMode = WandbMode.disabled
    project: str = "v4-pretrain"
    entity: str = ""
    name: str = ""


@dataclass
class RunConfig:
    """Everything that fixes a run.

    Attributes:
        run_dir: the run's own folder; the same folder resumes.
        seed: of initialisation and data order.
        init_seed_offset: added to ``seed`` for the initialisation alone: another start, same data.
        engine: what runs a step: torch, or deepspeed.
        init_from: run folder or checkpoint whose weights a new run starts from; empty: fresh.
        tensorboard: also write TensorBoard event files.
        dry_run: check everything, tell what the run would do, and leave before its first step.
    """

    run_dir: str = "runs/default"
    seed: int = number(0, least=0)
    init_seed_offset: int = number(0, least=0)
    engine: EngineConfig = field(default_factory=EngineConfig)
    init_from: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False
    dry_run: bool = False


ConfigStore.instance().store("run_schema", RunConfig)


# Resolving the annotations of a section costs more than everything else in a check.
_types = functools.cache(get_type_hints)


def _meet(a: int, b: int) -> bool:
    return a > 0 and b > 0 and max(a, b) % min(a, b) == 0


def load(cfg: DictConfig) -> RunConfig:
    """Turn a composed config into a validated RunConfig.

    Raises:
        UserError: an unknown key, a wrong type, or values that cannot be together.
    """
    try:
        raw = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True, enum_to_str=True)
    except OmegaConfBaseException as error:
        _, refused, why = str(error).splitlines()[0].partition(f"{ConfigError.__name__} raised ")
        if refused:  # a rule of conf/ refused its own key (train/config/scaled.py)
            raise UserError(why.partition(": ")[2]) from error
        raise UserError(describe(error)) from error
    if isinstance(raw, dict) and isinstance(raw.get("engine"), str):
        raw["engine"] = {"name": raw["engine"]}  # as it was saved before it was a section
    refuse(UserError, _shape_problems(raw, RunConfig, ""))
    _refuse_bytes(raw, "")
    try:
        run = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), raw))
    except OmegaConfBaseException as error:
        raise UserError(describe(error)) from error
    assert isinstance(run, RunConfig)
    validate(run)
    return run


def is_text(text: str) -> bool:
    """Whether it has a UTF-8 form: a lone surrogate, from bytes of another encoding, has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_bytes(value: Any, key: str) -> None:
    """Refuse a string that no file could hold, such as a path in another encoding."""
    if isinstance(value, dict):
        for name, part in value.items():
            _refuse_bytes(part, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            _refuse_bytes(part, f"{key}[{number}]")
    elif isinstance(value, str) and not is_text(value):
        raise UserError(f"{key}={value!a} is not UTF-8")


def validate(run: RunConfig) -> None:
    """Check every section, then what must hold between them.

    Raises:
        ValueError: names the keys and both values.
    """
    refuse(UserError, out_of_range(run, ""))
    across = [message for ok, message in _checks_across(run) if not ok]
    check_all(
        run.model.validate,
        run.data.validate,
        run.optim.validate,
        run.quant.validate,
        run.parallel.validate,
        run.engine.validate,
        run.train.validate,
        lambda: refuse(UserError, across),
    )


def _checks_across(run: RunConfig) -> Iterator[tuple[bool, str]]:
    """What must hold between sections."""
    recovery = run.train.recovery
    yield (
        run.parallel.pp == 1 or not recovery.may_anticipate,
        f"train.recovery.anticipatory={recovery.anticipatory.value} is not built for pipeline"
        f" stages (parallel.pp={run.parallel.pp}): say never",
    )
    yield (
        run.optim.schedule.kind is not ScheduleKind.constant or not run.train.bias_stops_at_decay,
        "train.bias_stops_at_decay=true needs a learning rate that decays, but"
        f" optim.schedule.kind={run.optim.schedule.kind.value}",
    )
    yield from _width_checks(run)
    kinds = [run.model.kind(layer) for layer in range(run.model.num_hidden_layers)]
    yield (
        LayerKind.mha not in kinds or not run.sample.tokens,
        f"sample.tokens={run.sample.tokens} asks for text, but a layer is of"
        f" model.layer_kinds={LayerKind.mha.value}, which has no cache: say sample.tokens=0",
    )
    yield bool(run.run_dir.strip()), f"run_dir={run.run_dir!r} must name a folder"
    yield (
        run.train.weights == Weights.model or run.train.eval_only or bool(run.init_from),
        f"train.weights={run.train.weights.value} says what train.eval_only evaluates or init_from"
        f" starts from, but train.eval_only=false and init_from={run.init_from!r}",
    )
    if run.engine.name is EngineName.deepspeed:
        yield from _deepspeed_checks(run)
    if run.parallel.offload == "optimizer+master":
        yield from _offload_checks(run)


def _offload_checks(run: RunConfig) -> Iterator[tuple[bool, str]]:
    """What reads fp32 weights that are not on the device, or has none to keep elsewhere."""
    asked, instead = "parallel.offload=optimizer+master", "say parallel.offload=optimizer"
    yield (
        run.train.precision is not Precision.fp32,
        f"{asked} keeps masters of weights that compute in bf16, but train.precision=fp32 has none:"
        f" {instead}",
    )
    yield (
        not run.quant.active,
        f"{asked} does not go with quant.recipe={run.quant.recipe.value}, which reads masters on"
        f" the device: {instead}",
    )
    yield (
        not run.train.ema_decay,
        f"{asked} does not go with train.ema_decay={run.train.ema_decay}, which averages the"
        f" weights on the device: {instead}",
    )


def _deepspeed_checks(run: RunConfig) -> Iterator[tuple[bool, str]]:
    """What ZeRO's flat shards, or this engine, cannot do exactly."""
    asked = "engine.name=deepspeed"
    for key in ("pp", "ep", "cp", "dp_replicate"):
        degree = getattr(run.parallel, key)
        yield (
            degree == 1,
            f"parallel.{key}={degree} does not go with {asked}, which knows data ranks only: say"
            f" engine=torch, or parallel.{key}=1",
        )
    for index, stage in enumerate(run.train.stages):
        yield (
            stage.cp in (None, 1),
            f"train.stages[{index}].cp={stage.cp} does not go with {asked}, which holds rows whole:"
            " say engine=torch, or cp: 1",
        )
    yield (
        run.parallel.offload == "none",
        f"parallel.offload={run.parallel.offload} is the torch engine's, {asked} was asked for: say"
        " engine=torch, or engine=deepspeed_zero2_offload",
    )
    yield (
        run.optim.state_dtype is StateDtype.fp32,
        f"optim.state_dtype={run.optim.state_dtype.value} does not go with {asked}, which keeps"
        " moments as fp32 shards: say engine=torch, or optim.state_dtype=fp32",
    )
    yield (
        not run.train.ema_decay or run.engine.zero_stage < 3,
        f"train.ema_decay={run.train.ema_decay} needs whole weights on every rank, which {asked}"
        f" with engine.zero_stage={run.engine.zero_stage} does not keep: say engine.zero_stage=2",
    )
    yield (
        not run.train.recovery.may_anticipate,
        f"train.recovery.anticipatory={run.train.recovery.anticipatory.value} is not built for"
        f" {asked}: say never",
    )


def _width_checks(run: RunConfig) -> Iterator[tuple[bool, str]]:
    """The grouped matmul of the experts takes rows of whole 16 bytes."""
    model, quantised = run.model, run.quant.parts().experts is not ExpertFormat.none
    if model.kernels is Kernels.reference and not quantised:
        return
    unit = 4 if run.train.precision is Precision.fp32 else 8
    by = (
        "quant.experts"
        if quantised
        else f"model.kernels={model.kernels.value} (reference takes any)"
    )
    for key in ("hidden_size", "moe_intermediate_size"):
        width = getattr(model, key)
        yield (
            width % unit == 0,
            f"model.{key}={width} must be a multiple of {unit} for {by} in"
            f" train.precision={run.train.precision.value}",
        )


def describe(error: OmegaConfBaseException) -> str:
    """One line for an error of the config library: the full key, what was given and wanted."""
    parts = (getattr(error, "full_key", None) or "config", str(error).splitlines()[0])
    return ": ".join(shown(part, 3 * _SHOWN) for part in parts)


def dump(run: RunConfig) -> str:
    """The resolved config as YAML, as written to a run folder's ``config.yaml``."""
    return OmegaConf.to_yaml(OmegaConf.structured(run))


def unknown_key(path: Sequence[str], schema: Any, also: Sequence[str] = ()) -> str | None:
    """What to say of a dotted key that the schema does not have; None where it is known.

    Args:
        path: the parts of the key.
        schema: the dataclass it is looked up in; a part inside a list or dict is free.
        also: further names that would have been right at the top.
    """
    for depth, key in enumerate(path):
        if get_origin(schema) in (list, dict):
            schema = get_args(schema)[-1]
            continue
        if not is_dataclass(schema):
            return None
        own = [f.name for f in fields(schema)]
        known = [*own, *(name for name in also if depth == 0 and name not in own)]
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            prefix = "".join(f"{part}." for part in path[:depth])
            if near:
                return f"did you mean {prefix}{near[0]}?"
            return f"{prefix.rstrip('.') or 'the config'} has {', '.join(known)}"
        if key not in own:
            return None
        schema = _types(schema)[key]
    return None


def _shape_problems(raw: Any, schema: Any, path: str) -> Iterator[str]:
    """Unknown keys, and sections, lists or values where another of them belongs.

    Args:
        raw: plain dicts, lists and values.
        schema: a dataclass, or the annotation of a field.
        path: config path of ``raw``.
    """
    origin = get_origin(schema)
    if origin is list:
        if not isinstance(raw, list):
            yield f"{path}={shown(raw)} must be a list"
            return
        for index, item in enumerate(raw):
            yield from _shape_problems(item, get_args(schema)[0], f"{path}[{index}]")
    elif origin is dict:
        if not isinstance(raw, dict):
            yield f"{path}={shown(raw)} must be NAME: VALUE pairs"
            return
        for name, item in raw.items():
            if not isinstance(name, str):
                yield f"{path}: {shown(name)} must be a name"
            yield from _shape_problems(item, get_args(schema)[1], f"{path}.{name}")
    elif is_dataclass(schema):
        if not isinstance(raw, dict):
            yield f"{path}={shown(raw)} must be KEY: VALUE pairs"
            return
        yield from _key_problems(raw, schema, path)
    elif isinstance(raw, list | dict):
        yield f"{path}={shown(raw)} must be one value"


def _key_problems(raw: dict[str, Any], schema: Any, path: str) -> Iterator[str]:
    """Of the keys of a section; arguments as of :func:`_shape_problems`."""
    types = _types(schema)
    for key, value in raw.items():
        full = f"{path}.{key}" if path else str(key)
        problem = unknown_key([str(key)], schema)
        if problem is not None:
            problem = problem.replace(
                "did you mean ", f"did you mean {full.removesuffix(str(key))}"
            )
            yield f"unknown config key {shown(full)}={shown(value)}: {problem}"
            continue
        yield from _shape_problems(value, types[key], full)


_SHOWN = 100  # characters


def shown(value: Any, most: int = _SHOWN) -> str:
    """A value in a message: on one line, and not too long."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else f"{text[:_SHOWN]}..."
