"""What DeepSpeed is told: the JSON of its engine, made from ours or checked against it.

A file of the user's own may tune how ZeRO moves bytes. What would change the arithmetic, or says
something that another section of the run says, must say the same; every other key is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from parallel.config import EngineConfig, OffloadTo
from parallel.errors import ConfigError

# Of zero_optimization: how bytes travel, never what is computed.
TUNING = frozenset((
    "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "overlap_comm",
    "reduce_bucket_size", "reduce_scatter", "round_robin_gradients", "sub_group_size",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size", "use_multi_rank_bucket_allreduce",
))  # fmt: skip
OFFLOAD_TUNING = frozenset((
    "buffer_count", "buffer_size", "max_in_cpu", "pin_memory", "pipeline_read", "pipeline_write",
))  # fmt: skip
TOLD = frozenset((
    "aio", "comms_logger", "memory_breakdown", "steps_per_print", "wall_clock_breakdown",
))  # fmt: skip


def deepspeed_config(
    engine: EngineConfig, rows: int, grad_clip: float, pin_memory: bool
) -> dict[str, Any]:
    """The JSON for ``deepspeed.initialize``.

    Args:
        engine: the ``engine`` section.
        rows: of a microbatch.
        grad_clip: ``optim.grad_clip``.
        pin_memory: of what is kept on the host.

    Raises:
        ConfigError: the user's file cannot be, or says something else than the run.
    """
    # Theirs would replace F.linear in the whole process by another one.
    zero: dict[str, Any] = {"stage": engine.zero_stage, "memory_efficient_linear": False}
    zero["reduce_bucket_size"] = 50_000_000  # elements; theirs is ten times that, allocated
    for key, where in _offloads(engine):
        zero[key] = {"device": where.value, "pin_memory": pin_memory}
        if where is OffloadTo.nvme:
            zero[key]["nvme_path"] = engine.nvme_path
    own: dict[str, Any] = {}
    if engine.config:
        own = _read(engine.config)
        _check(own, engine, rows, grad_clip)
        mine = own.pop("zero_optimization", {})
        for key, value in mine.items():
            zero[key] = {**zero.get(key, {}), **value} if isinstance(value, Mapping) else value
    return {
        "steps_per_print": 2**31,
        **{key: value for key, value in own.items() if key in TOLD},
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,  # the engine says itself which microbatch is the last
        "gradient_clipping": 0.0,  # ours: on the global norm, in float64
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _offloads(engine: EngineConfig) -> Iterator[tuple[str, OffloadTo]]:
    pairs = (
        ("offload_optimizer", engine.offload_optimizer),
        ("offload_param", engine.offload_parameters),
    )
    return ((key, where) for key, where in pairs if where is not OffloadTo.none)


def _read(path: str) -> dict[str, Any]:
    try:
        own = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"engine.config={path} cannot be read as JSON: {text}") from error
    if not isinstance(own, dict):
        raise ConfigError(f"engine.config={path} holds a {type(own).__name__}, not an object")
    return own


def _check(own: Mapping[str, Any], engine: EngineConfig, rows: int, grad_clip: float) -> None:
    """Refuse what differs from the run, and what has no effect."""
    path = engine.config
    same = {
        "train_micro_batch_size_per_gpu": (rows, "train.micro_batch_size"),
        "gradient_clipping": (grad_clip, "optim.grad_clip"),
    }
    for key, value in own.items():
        if key in same:
            asked, ours = same[key]
            if value not in ("auto", asked):
                raise ConfigError(f"engine.config={path} says {key}={value}, but {ours}={asked}")
        elif key in ("bf16", "fp16"):
            if isinstance(value, Mapping) and value.get("enabled") not in (False, None):
                raise ConfigError(
                    f"engine.config={path} says {key}.enabled={value['enabled']}, which would round"
                    " what has to stay fp32 (mHC, norms, gates): take it out and say"
                    " train.precision=bf16"
                )
        elif key in ("optimizer", "scheduler"):
            raise ConfigError(
                f"engine.config={path} says {key}, but the run's optimizer is the section optim:"
                " take it out"
            )
        elif key in ("train_batch_size", "gradient_accumulation_steps"):
            if value != "auto":
                raise ConfigError(
                    f"engine.config={path} says {key}={value}, but a run's batches may grow"
                    " (train.global_batch_tokens): take it out or say auto"
                )
        elif key == "zero_optimization":
            _check_zero(value, engine)
        elif key == "aio" and isinstance(value, Mapping) and value.get("use_gds"):
            raise ConfigError(
                f"engine.config={path} says aio.use_gds={value['use_gds']}, which would read past"
                " the check of what was written: take it out"
            )
        elif key not in TOLD:
            raise ConfigError(f"engine.config={path} says {key}, which this engine does not use")


def _check_zero(zero: Any, engine: EngineConfig) -> None:
    path = engine.config
    if not isinstance(zero, Mapping):
        raise ConfigError(f"engine.config={path}: zero_optimization={zero} is no object")
    if zero.get("stage", engine.zero_stage) != engine.zero_stage:
        raise ConfigError(
            f"engine.config={path} says zero_optimization.stage={zero['stage']}, but"
            f" engine.zero_stage={engine.zero_stage}"
        )
    asked = {
        "offload_optimizer": ("offload_optimizer", engine.offload_optimizer),
        "offload_param": ("offload_parameters", engine.offload_parameters),
    }
    for key, value in zero.items():
        if key in asked:
            ours, where = asked[key]
            device = value.get("device", "none") if isinstance(value, Mapping) else value
            if device != where.value:
                raise ConfigError(
                    f"engine.config={path} says zero_optimization.{key}.device={device}, but"
                    f" engine.{ours}={where.value}"
                )
            known = {"device"} | OFFLOAD_TUNING | ({"nvme_path"} if device == "nvme" else set())
            for part in value if isinstance(value, Mapping) else ():
                if part not in known:
                    raise ConfigError(
                        f"engine.config={path} says zero_optimization.{key}.{part}, which this"
                        " engine does not use"
                    )
            if value.get("nvme_path", engine.nvme_path) != engine.nvme_path:
                raise ConfigError(
                    f"engine.config={path} says {key}.nvme_path={value['nvme_path']}, but"
                    f" engine.nvme_path={engine.nvme_path}"
                )
        elif key != "stage" and key not in TUNING:
            raise ConfigError(
                f"engine.config={path} says zero_optimization.{key}, which this engine does not use"
            )
