"""Degrees of the parallel layout: the ``parallel`` section of a run's config.

The mesh axes are ``pp dp_replicate dp_shard cp ep``; ``ep`` is folded out of the data axes, so it
does not multiply the world size. One degree may be -1, "the rest of the world".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from enum import StrEnum

from conf.problems import refuse
from conf.ranges import number, out_of_range
from parallel.errors import ConfigError

# As in torch.distributed.pipelining, lower case. Not an enum: "1f1b" cannot be a member's name.
SCHEDULES = (
    "gpipe",
    "1f1b",
    "interleaved1f1b",
    "interleavedzerobubble",
    "zbvzerobubble",
    "dualpipev",
)
# Not an enum: "optimizer+master" cannot be a member's name.
OFFLOADS = ("none", "optimizer", "optimizer+master")
_DEGREES = ("dp_replicate", "dp_shard", "ep", "pp", "cp")
_AXES = ("pp", "dp_replicate", "dp_shard", "cp")  # their product is the world size


class EngineName(StrEnum):
    """What runs a step."""

    torch = "torch"
    deepspeed = "deepspeed"


class OffloadTo(StrEnum):
    """Where DeepSpeed keeps what it takes off the device."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class CpScoring(StrEnum):
    """Which rank scores a query's entries for the indexer, under context parallelism."""

    own = "own"
    balanced = "balanced"


@dataclass
class EngineConfig:
    """What runs a step; everything but ``name`` is for ``deepspeed``.

    Attributes:
        name: torch, or deepspeed (ZeRO; the update stays ours: docs/guide/deepspeed.md).
        zero_stage: what is cut over the ranks: 1 optimizer state and masters, 2 gradients too,
            3 weights too.
        offload_optimizer: where masters and optimizer state live: none (the device), cpu or nvme.
        offload_parameters: the same of the weights; only with ``zero_stage=3``.
        nvme_path: folder of what is kept on NVMe.
        config: a DeepSpeed JSON of the user's own; what it says must agree with the run.
        own_checkpoints: with every checkpoint also write DeepSpeed's own, for its other tools, into
            ``deepspeed/`` of the run's folder; a run goes on from ours.
    """

    name: EngineName = EngineName.torch
    zero_stage: int = number(2, least=1, most=3)
    offload_optimizer: OffloadTo = OffloadTo.none
    offload_parameters: OffloadTo = OffloadTo.none
    nvme_path: str = ""
    config: str = ""
    own_checkpoints: bool = False

    def validate(self, prefix: str = "engine") -> None:
        """Refuse what cannot be together, and what would have no effect.

        Raises:
            ConfigError: names the keys and their values.
        """
        refuse(ConfigError, self._problems(prefix))

    def _problems(self, prefix: str) -> Iterator[str]:
        if self.name is EngineName.torch:
            for key, default in ((f.name, f.default) for f in fields(EngineConfig)[1:]):
                if getattr(self, key) != default:
                    yield (
                        f"{prefix}.{key}={getattr(self, key)} needs {prefix}=deepspeed, not"
                        f" {prefix}.name={self.name.value}"
                    )
        if self.offload_parameters is not OffloadTo.none and self.zero_stage != 3:
            yield (
                f"{prefix}.offload_parameters={self.offload_parameters.value} needs"
                f" {prefix}.zero_stage=3, not {self.zero_stage}"
            )
        if self.offload_optimizer is OffloadTo.nvme and self.zero_stage != 3:
            yield (
                f"{prefix}.offload_optimizer=nvme needs {prefix}.zero_stage=3, not"
                f" {self.zero_stage}"
            )
        if self.own_checkpoints and self.offload_optimizer is OffloadTo.nvme:
            yield (
                f"{prefix}.own_checkpoints=true writes the swap files of"
                f" {prefix}.offload_optimizer=nvme, which DeepSpeed's tools cannot read: say"
                f" {prefix}.own_checkpoints=false"
            )
        on_nvme = OffloadTo.nvme in (self.offload_optimizer, self.offload_parameters)
        if on_nvme != bool(self.nvme_path):
            yield (
                f"{prefix}.nvme_path={self.nvme_path!r}, but"
                f" {prefix}.offload_optimizer={self.offload_optimizer.value} and"
                f" {prefix}.offload_parameters={self.offload_parameters.value}: nvme needs a"
                " folder, and a folder nvme"
            )


@dataclass
class ParallelConfig:
    """How ranks share the work; every value 1 is one process.

    Attributes:
        dp_replicate: replicas whose parameters are whole copies of each other (HSDP's outer axis).
        dp_shard: ranks that share one copy of the parameters (FSDP2); -1 = the rest of the world.
        ep: ranks that share the routed experts; divides ``dp_replicate * dp_shard * cp``.
        pp: pipeline stages.
        cp: contiguous shards in which ranks hold every row, unless a stage of training has its own
            number: ``dp_shard * cp`` ranks share parameters either way.
        cp_scoring: who scores the indexer's queries: ``own``, the rank that holds them, or
            ``balanced``, ranks for each other so that all have about as much to do.
        schedule: order of microbatches in the pipeline; only with ``pp`` above 1.
        offload: what rests in host memory between uses: ``none``; ``optimizer``, momentum and
            moments; ``optimizer+master`` the fp32 masters too of weights that compute in bf16,
            which are bf16 on the device then (one process).
        offload_activations: what blocks keep for the backward pass rests in host memory too.
        timeout_seconds: a rank that keeps the others waiting for so long in training is given up;
            longer than any save, evaluation or compilation may hold one rank up.
    """

    dp_replicate: int = number(1, least=-1)
    dp_shard: int = number(-1, least=-1)
    ep: int = number(1, least=-1)
    pp: int = number(1, least=-1)
    cp: int = number(1, least=1)
    cp_scoring: CpScoring = CpScoring.own
    schedule: str = "1f1b"
    offload: str = "none"
    offload_activations: bool = False
    timeout_seconds: float = number(600.0, above=0, most=1e9)

    def validate(self, prefix: str = "parallel") -> None:
        """Refuse degrees that no world could have.

        Raises:
            ValueError: names the keys and their values.
        """
        refuse(ConfigError, out_of_range(self, prefix) or self._problems(prefix))

    def _problems(self, prefix: str) -> Iterator[str]:
        for key in _DEGREES:
            value = getattr(self, key)
            if value == 0:
                yield f"{prefix}.{key}={value} must be 1 or more, or -1 for the rest of the world"
        if self.schedule not in SCHEDULES:
            yield f"{prefix}.schedule={self.schedule} is none of {', '.join(SCHEDULES)}"
        if self.offload not in OFFLOADS:
            yield f"{prefix}.offload={self.offload} is none of {', '.join(OFFLOADS)}"
        if self.offload_activations and self.pp != 1:
            yield (
                f"{prefix}.offload_activations=true does not go with {prefix}.pp={self.pp}, whose"
                f" blocks run in another order: say {prefix}.pp=1, or"
                " train.activation_checkpoint=block"
            )
        rest = [key for key in _AXES if getattr(self, key) == -1]
        if len(rest) > 1:
            yield (
                f"{prefix}.{rest[0]}=-1 and {prefix}.{rest[1]}=-1: only one of them can be the rest"
            )
        if self.ep == -1:
            yield (
                f"{prefix}.ep=-1: give a number, since ep is part of the data axes"
                f" ({prefix}.dp_shard={self.dp_shard})"
            )
        if self.pp == 1 and self.schedule in SCHEDULES and self.schedule != "1f1b":
            yield f"{prefix}.schedule={self.schedule} needs {prefix}.pp above 1 (now {self.pp})"

    @property
    def is_resolved(self) -> bool:
        """Whether every degree is a number, and none is the rest of a world."""
        return all(getattr(self, key) > 0 for key in _DEGREES)

    def resolve(self, world_size: int, prefix: str = "parallel") -> ParallelConfig:
        """Replace -1 by a number and check the product against the world.

        Args:
            world_size: number of ranks.
            prefix: config path for messages.

        Raises:
            ValueError: the degrees do not multiply to ``world_size``, or ep does not divide the
                data axes.
        """
        known = 1
        for key in _AXES:
            known *= max(1, getattr(self, key))
        out = self
        for key in _AXES:
            if getattr(self, key) == -1:
                if world_size % known:
                    given = " * ".join(
                        f"{prefix}.{axis}={getattr(self, axis)}"
                        for axis in _AXES
                        if getattr(self, axis) > 1
                    )
                    raise ConfigError(
                        f"{prefix}.{key}=-1 cannot be the rest: {given} does not divide the world"
                        f" size {world_size}"
                    )
                out = replace(self, **{key: world_size // known})
                known = world_size
        problems = []
        if known != world_size:
            shown = " * ".join(f"{key}={getattr(self, key)}" for key in _AXES)
            problems.append(
                f"{prefix}: {shown} = {known} ranks, but the world size is {world_size}"
            )
        if out.data_degree % out.ep:
            problems.append(
                f"{prefix}.ep={out.ep} must divide the {out.data_degree} data ranks"
                f" (dp_replicate * dp_shard * cp)"
            )
        refuse(ConfigError, problems)
        return out

    @property
    def shard_degree(self) -> int:
        """Ranks that share one copy of the parameters (after :meth:`resolve`)."""
        return self.dp_shard * self.cp

    @property
    def data_degree(self) -> int:
        """Ranks that hold different tokens (after :meth:`resolve`)."""
        return self.dp_replicate * self.shard_degree

    @property
    def world_size(self) -> int:
        """Number of ranks (after :meth:`resolve`)."""
        return self.pp * self.data_degree

    def __str__(self) -> str:
        """Degrees above 1, e.g. ``pp=2 dp_shard=4 ep=4``."""
        named = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.name in _DEGREES]
        return " ".join(n for n in named if not n.endswith("=1")) or "one process"
