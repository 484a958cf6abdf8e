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

# Of zero_optimization: how bytes travel, never what is computed; with the stages that read it.
TUNING = dict.fromkeys((
    "contiguous_gradients", "overlap_comm", "reduce_bucket_size", "reduce_scatter",
), (1, 2, 3)) | dict.fromkeys((
    "allgather_bucket_size", "round_robin_gradients", "use_multi_rank_bucket_allreduce",
), (1, 2)) | dict.fromkeys((
    "sub_group_size", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size",
), (3,))  # fmt: skip
# Of what is offloaded, and where to.
OFFLOAD_TUNING = {
    ("offload_optimizer", "cpu"): {"pin_memory"},
    ("offload_optimizer", "nvme"): {
        "nvme_path", "pin_memory", "buffer_count", "pipeline_read", "pipeline_write",
    },
    ("offload_param", "cpu"): {"pin_memory"},
    ("offload_param", "nvme"): {
        "nvme_path", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu",
    },
}  # fmt: skip
AIO = frozenset((
    "block_size", "intra_op_parallelism", "overlap_events", "queue_depth", "single_submit",
))  # fmt: skip
# What it prints whatever the level of its log; of the rest it shows nothing here.
TOLD = frozenset(("memory_breakdown", "wall_clock_breakdown"))


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
        **{key: value for key, value in own.items() if key in TOLD or key == "aio"},
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
        text = Path(path).read_text(encoding="utf-8")
        own = json.loads(text, object_pairs_hook=_once_each)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"engine.config={path} cannot be read as JSON: {text}") from error
    if not isinstance(own, dict):
        raise ConfigError(f"engine.config={path} holds a {type(own).__name__}, not an object")
    return own


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for number, (key, _) in enumerate(pairs):
        if key in dict(pairs[:number]):
            raise ConfigError(f"it says {key} twice")
    return dict(pairs)


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
            if not isinstance(value, Mapping) or value.get("enabled") not in (False, None):
                asked = value.get("enabled") if isinstance(value, Mapping) else value
                raise ConfigError(
                    f"engine.config={path} says {key}.enabled={asked}, which would round what has"
                    " to stay fp32 (mHC, norms, gates): take it out and say train.precision=bf16"
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
        elif key == "aio":
            _check_aio(value, engine)
        elif key not in TOLD:
            raise ConfigError(f"engine.config={path} says {key}, which this engine does not use")


def _check_aio(aio: Any, engine: EngineConfig) -> None:
    path = engine.config
    if not isinstance(aio, Mapping):
        raise ConfigError(f"engine.config={path}: aio={aio} is no object")
    if aio.get("use_gds"):
        raise ConfigError(
            f"engine.config={path} says aio.use_gds={aio['use_gds']}, which would read past the"
            " check of what was written: take it out"
        )
    for key in sorted(aio.keys() - AIO - {"use_gds"}):
        raise ConfigError(f"engine.config={path} says aio.{key}, which this engine does not use")
    if OffloadTo.nvme not in (engine.offload_optimizer, engine.offload_parameters):
        raise ConfigError(
            f"engine.config={path} says aio, but engine.offload_optimizer="
            f"{engine.offload_optimizer.value} and engine.offload_parameters="
            f"{engine.offload_parameters.value}: nothing is read by it"
        )


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
            _check_offload(key, value, *asked[key], engine)
        elif key != "stage" and key not in TUNING:
            raise ConfigError(
                f"engine.config={path} says zero_optimization.{key}, which this engine does not use"
            )
        elif key != "stage" and engine.zero_stage not in TUNING[key]:
            stages = ", ".join(map(str, TUNING[key]))
            raise ConfigError(
                f"engine.config={path} says zero_optimization.{key}, which DeepSpeed reads at stage"
                f" {stages}, but engine.zero_stage={engine.zero_stage}"
            )


def _check_offload(key: str, value: Any, ours: str, where: OffloadTo, engine: EngineConfig) -> None:
    path = engine.config
    if not isinstance(value, Mapping):
        raise ConfigError(f"engine.config={path}: zero_optimization.{key}={value} is no object")
    device = value.get("device", "none")
    if device != where.value:
        raise ConfigError(
            f"engine.config={path} says zero_optimization.{key}.device={device}, but"
            f" engine.{ours}={where.value}"
        )
    for part in sorted(value.keys() - OFFLOAD_TUNING.get((key, device), set()) - {"device"}):
        raise ConfigError(
            f"engine.config={path} says zero_optimization.{key}.{part}, which this engine does not"
            f" use with engine.{ours}={device}"
        )
    if value.get("nvme_path", engine.nvme_path) != engine.nvme_path:
        raise ConfigError(
            f"engine.config={path} says {key}.nvme_path={value['nvme_path']}, but"
            f" engine.nvme_path={engine.nvme_path}"
        )
