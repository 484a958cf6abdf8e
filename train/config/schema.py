"""The whole configuration of a run: typed sections, which ``train/config/load.py`` fills.

``RunConfig`` is seen only by ``train/``; every other package gets its own section. Nothing is
changed after loading; derived values are functions (the plan of stages: ``train/stages.py``).
Progress is counted in tokens of the global batch, lengths in tokens, times in seconds, "every" in
optimizer steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from hydra.core.config_store import ConfigStore

from conf.problems import refuse
from conf.ranges import number
from data.config import DataConfig
from model.config import IndexerPhase, ModelConfig
from optim.config import OptimConfig
from parallel.config import EngineConfig, ParallelConfig
from quant.config import QuantConfig
from train.config.recovery import RecoveryConfig
from train.errors import UserError, check_all


class Precision(StrEnum):
    """Compute dtype of the matmuls; parameters are fp32 masters either way (model/precision.py).

    ``auto`` is replaced before anything is built (train/preflight/precision.py).
    """

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class HeadPrecision(StrEnum):
    """Of the prediction head's three matmuls; auto: as ``train.precision``."""

    auto = "auto"
    fp32 = "fp32"
    tf32 = "tf32"
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
        head_precision: operands of the head's matmuls; fp32 as released, or for speed tf32 (CUDA
            from compute capability 8.0 on) or bf16 (CUDA keeps fp32 logits, a CPU rounds them to
            bf16 once); auto: as ``precision``.
        device: auto, cpu or cuda.
        stages: the plan, in order; empty: one stage made from this section.
        indexer_phase: phase of the one stage.
        mtp_loss_weight: weight of the MTP loss until the learning rate decays.
        mtp_loss_weight_decay: its weight from the first decaying step on.
        indexer_loss_weight: weight of the indexer's KL loss; 0 = off.
        balance_loss_weight: weight of the per-document balance loss; 0 = off.
        bias_update_speed: change of the expert bias a step; 0 = off; null: by the run's length
            (:func:`train.stages.bias_speed`).
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
        compile: every block is one graph of torch.compile (parallel/compiled_blocks.py).
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
    head_precision: HeadPrecision = HeadPrecision.fp32
    device: Device = Device.auto
    stages: list[StageConfig] = field(default_factory=list)
    indexer_phase: IndexerPhase = IndexerPhase.sparse
    mtp_loss_weight: float = number(0.3, least=0, most=100)
    mtp_loss_weight_decay: float = number(0.1, least=0, most=100)
    indexer_loss_weight: float = number(1e-2, least=0, most=100)
    balance_loss_weight: float = number(1e-4, least=0, most=100)
    bias_update_speed: float | None = number(None, least=0, most=1)
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
    compile: bool = False
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
            self.head_precision != HeadPrecision.bf16 or self.precision == Precision.bf16,
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


def _meet(a: int, b: int) -> bool:
    return a > 0 and b > 0 and max(a, b) % min(a, b) == 0
