"""The ``optim`` section of a run: which optimizer, its constants, its learning-rate schedule.

Defaults are the paper's (DeepSeek-V4 section 4.2.2, reference C.1 and C.2); what the report leaves
open follows reference H. Plain dataclasses without ``frozen`` or ``Literal``, so that Hydra can
compose them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from conf.problems import refuse
from conf.ranges import number, out_of_range
from optim.errors import ConfigError


class OptimizerName(StrEnum):
    """Who moves the matrices; everything else is AdamW's either way."""

    muon = "muon"
    adamw = "adamw"  # the ablation


class ScheduleKind(StrEnum):
    """Shape of the learning rate after the linear warm-up."""

    constant = "constant"
    cosine = "cosine"  # falls from the first token to the last
    wsd = "wsd"  # constant, then a linear tail
    cosine_tail = "cosine_tail"  # constant, then a cosine tail (the paper's)


class MatmulDtype(StrEnum):
    """Dtype of the Newton-Schulz matmuls."""

    auto = "auto"  # bf16 where the device multiplies bf16 natively, else fp32
    fp32 = "fp32"
    bf16 = "bf16"


class UpdateScale(StrEnum):
    """Factor between an orthogonal matrix and Muon's update, before the learning rate."""

    rms = "rms"  # optim.muon.rms * sqrt(max(rows, columns)): the paper's
    original = "original"  # sqrt(max(1, rows / columns)): torch.optim.Muon's adjust_lr_fn


class StateDtype(StrEnum):
    """Storage of momentum and moments; the arithmetic is fp32 either way."""

    fp32 = "fp32"
    bf16 = "bf16"


@dataclass
class NewtonSchulzIterations:
    """``steps`` iterations ``X <- a X + b (X X^T) X + c (X X^T)^2 X``."""

    steps: int = number(1, least=1, most=100)
    a: float = number(2.0, above=0)
    b: float = number(-1.5)
    c: float = number(0.5)


def _hybrid() -> list[NewtonSchulzIterations]:
    return [
        NewtonSchulzIterations(8, 3.4445, -4.7750, 2.0315),
        NewtonSchulzIterations(2, 2.0, -1.5, 0.5),
    ]


@dataclass
class ScheduleConfig:
    """Learning rate over the run (``optim/schedule.py`` holds the formulas)."""

    kind: ScheduleKind = ScheduleKind.cosine_tail
    warmup_steps: int = number(2000, least=0)  # linear, reaching optim.lr at this step; 0 = none
    # Last learning rate as a fraction of optim.lr.
    end_lr_ratio: float = number(0.1, least=0, most=1)
    # Where the tail begins, fraction of the run's tokens.
    decay_start: float = number(0.9, least=0, most=1)
    # The same in tokens; above 0 it replaces decay_start.
    decay_start_tokens: int = number(0, least=0)


@dataclass
class MuonConfig:
    """Muon (DeepSeek-V4 section 2.4, algorithm 1)."""

    momentum: float = number(0.95, least=0, below=1)
    nesterov: bool = True
    newton_schulz: list[NewtonSchulzIterations] = field(default_factory=_hybrid)
    rms: float = number(
        0.18, least=1e-4, most=10
    )  # root mean square of the update before the learning rate
    scale: UpdateScale = UpdateScale.rms
    weight_decay: float = number(0.1, least=0)
    dtype: MatmulDtype = MatmulDtype.auto
    # Parameter pattern -> split, over optim/groups.py: "whole", "experts", or the name of a count
    # (o_groups, num_attention_heads, index_n_heads) by which the rows are cut into matrices of
    # their own; "adamw" leaves the parameter to AdamW.
    splits: dict[str, str] = field(default_factory=dict)


@dataclass
class AdamWConfig:
    """AdamW with decoupled decay, for all that Muon does not own."""

    betas: list[float] = number([0.9, 0.95], least=0, below=1)
    eps: float = number(1e-20, above=0, most=1e-4)
    weight_decay: float = number(0.1, least=0)


@dataclass
class OptimConfig:
    """Everything under ``optim``."""

    name: OptimizerName = OptimizerName.muon
    lr: float = number(2.7e-4, least=1e-9, most=100)  # peak
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    muon: MuonConfig = field(default_factory=MuonConfig)
    adamw: AdamWConfig = field(default_factory=AdamWConfig)
    state_dtype: StateDtype = StateDtype.fp32
    grad_clip: float = number(1.0, least=0)  # bound of the global gradient norm; 0 = no clipping

    def validate(self, prefix: str = "optim") -> None:
        """Refuse values that cannot be.

        Raises:
            ValueError: names the keys and their values.
        """
        refuse(ConfigError, out_of_range(self, prefix))
        checks = (
            *_base_checks(self, prefix),
            *_schedule_checks(self.schedule, f"{prefix}.schedule"),
            *_muon_checks(self.muon, f"{prefix}.muon"),
            *_adamw_checks(self.adamw, f"{prefix}.adamw"),
        )
        refuse(ConfigError, (message for ok, message in checks if not ok))


Checks = Iterator[tuple[bool, str]]


_LEAST_CLIP = 1e-6  # of the gradient's norm; smaller gradients drown in the optimizers' epsilon


def _base_checks(c: OptimConfig, p: str) -> Checks:
    yield c.name in set(OptimizerName), f"{p}.name={c.name} must be one of {[*OptimizerName]}"
    yield (
        c.grad_clip == 0 or c.grad_clip >= _LEAST_CLIP,
        f"{p}.grad_clip={c.grad_clip} must be 0 (off), or {_LEAST_CLIP:g} or more",
    )
    for key, section in (("muon", c.muon), ("adamw", c.adamw)):
        decay = section.weight_decay
        yield (
            c.lr * decay < 1,
            f"{p}.{key}.weight_decay={decay} times {p}.lr={c.lr} must be below 1: a step would take"
            " more than the whole weight",
        )
    states = [*StateDtype]
    yield c.state_dtype in states, f"{p}.state_dtype={c.state_dtype} must be one of {states}"


def _schedule_checks(c: ScheduleConfig, p: str) -> Checks:
    kinds = [*ScheduleKind]
    yield c.kind in kinds, f"{p}.kind={c.kind} must be one of {kinds}"


def _muon_checks(c: MuonConfig, p: str) -> Checks:
    dtypes = [*MatmulDtype]
    yield c.dtype in dtypes, f"{p}.dtype={c.dtype} must be one of {dtypes}"
    yield (
        c.scale != UpdateScale.original or c.rms == MuonConfig().rms,
        f"{p}.scale={c.scale} takes no {p}.rms={c.rms}: leave it at {MuonConfig().rms}",
    )
    yield len(c.newton_schulz) > 0, f"{p}.newton_schulz={c.newton_schulz} needs at least one stage"
    for singular in _SINGULAR_VALUES if c.newton_schulz else ():
        after = _iterated(c.newton_schulz, singular)
        yield (
            0.5 < after < 1.5,
            f"{p}.newton_schulz does not orthogonalise: it makes {after:.3g} of a singular value of"
            f" {singular}, which must end in (0.5, 1.5)",
        )


# Of a gradient divided by its Frobenius norm; those of a random matrix of width N lie below
# 2 / sqrt(N).
_SINGULAR_VALUES = (0.02, 0.1, 0.3, 1.0)


def _iterated(stages: list[NewtonSchulzIterations], singular: float) -> float:
    """What the iterations make of a singular value; inf where they run away."""
    s = singular
    for stage in stages:
        for _ in range(stage.steps):
            s = stage.a * s + stage.b * s**3 + stage.c * s**5
            if not abs(s) < 1e6:
                return math.inf
    return s


def _adamw_checks(c: AdamWConfig, p: str) -> Checks:
    betas = list(c.betas)
    yield len(betas) == 2, f"{p}.betas={betas} must hold 2 values, has {len(betas)}"
