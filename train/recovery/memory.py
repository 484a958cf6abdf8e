"""Out of memory: one line that names the keys that help, with their values.

The step is lost, the run is not: its newest checkpoint stays, and the same command with another
value goes on from it. Nothing is retried here: what fits by chance fails later. One of several
ranks may fail alone: it tells, and the others leave with it (``parallel/lost_rank.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from parallel.config import EngineName, OffloadTo
from parallel.launch import launched_world_size
from train.config.schema import ActivationCheckpoint, Precision, RunConfig
from train.errors import UserError, one_line
from train.stages import Stage
from train.step import StepPlan

_HOST = re.compile(r"can't allocate memory|not enough memory", re.IGNORECASE)


class OutOfMemoryError(UserError):
    """The run needs more memory than a rank's device has."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a device, or of torch on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return type(error) is RuntimeError and _HOST.search(str(error)) is not None


@contextmanager
def told_out_of_memory(
    run: RunConfig, running: Callable[[], StepPlan | None], device: torch.device
) -> Iterator[None]:
    """Turn a failed allocation into one line.

    Args:
        run: what is trained.
        running: gives the step that is at work; None: the model and its optimizer are made.
        device: where.

    Raises:
        OutOfMemoryError: names the keys that help.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said, step = one_line(error).split(". ")[0], running()
        when = f"in step {step.number}" if step else "before the first step"
        raise OutOfMemoryError(
            f"out of memory on {device} {when} ({said}): give"
            f" {', or '.join(remedies(run, step, device))}; checkpoints stay, from the newest of"
            " which the same command goes on, and v4 plan shows what a run needs"
        ) from error


def remedies(run: RunConfig, step: StepPlan | None, device: torch.device) -> list[str]:
    """Keys that help without changing what a step computes, in the order to try them."""
    found = [] if step is None else _smaller_step(run, step.stage)
    if device.type != "cpu":  # whose memory is the host's
        found += _offload(run)
    if found:
        return found
    if step is None:
        return ["more ranks (parallel.dp_shard), or a smaller model"]
    length = step.stage.seq_len
    return [f"more ranks (parallel.dp_shard), or a smaller train.seq_len than {length} or model"]


def _smaller_step(run: RunConfig, stage: Stage) -> list[str]:
    """What makes a step keep less."""
    found, rows = [], stage.micro_batch_size
    where = "train.stages[...].micro_batch_size" if run.train.stages else "train.micro_batch_size"
    if rows > 1:
        found.append(f"{where}={rows // 2} instead of {rows}")
    recompute = run.train.activation_checkpoint
    if recompute is not ActivationCheckpoint.block:
        found.append(f"train.activation_checkpoint=block instead of {recompute.value}")
    return found


def _offload(run: RunConfig) -> list[str]:
    """What may rest in the host's memory instead."""
    if run.engine.name is EngineName.deepspeed:
        if run.engine.offload_optimizer is OffloadTo.none:
            return ["engine.offload_optimizer=cpu instead of none"]
        return []
    now, alone = run.parallel.offload, launched_world_size() == 1
    if now == "none":
        return ["parallel.offload=optimizer instead of none"]
    if now == "optimizer" and alone and run.train.precision is Precision.bf16:
        return ["parallel.offload=optimizer+master instead of optimizer"]
    return []
