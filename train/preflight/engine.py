"""Whether the engine that is asked for can run this plan here, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from conf.problems import refuse
from model.parameter_counts import parameter_shapes
from optim.config import ScheduleKind
from parallel.config import EngineName, OffloadTo
from parallel.deepspeed_load import load_deepspeed, need_nvme
from parallel.launch import launched_world_size
from parallel.zero_config import deepspeed_config
from train.config.schema import RunConfig
from train.errors import UserError
from train.stages import StagePlan, loss_weights, trains


def check_engine(run: RunConfig, plan: StagePlan, device: str) -> None:
    """Refuse what several ranks cannot do, and what DeepSpeed cannot.

    Args:
        run: the config.
        plan: of its stages.
        device: cpu or cuda.

    Raises:
        UserError: names the key, its value, and what to choose instead.
    """
    refuse(UserError, _problems(run, plan))
    if run.engine.name is EngineName.deepspeed:
        load_deepspeed(torch.device(device))
        deepspeed_config(run.engine, run.train.micro_batch_size, run.optim.grad_clip, False)
        if OffloadTo.nvme in (run.engine.offload_optimizer, run.engine.offload_parameters):
            need_nvme(run.engine.nvme_path)


def _problems(run: RunConfig, plan: StagePlan) -> Iterator[str]:
    if run.parallel.offload == "optimizer+master" and launched_world_size() > 1:
        yield (
            "parallel.offload=optimizer+master keeps whole masters of one process, but the world"
            f" size is {launched_world_size()}: say parallel.offload=optimizer"
        )
    if run.engine.name is not EngineName.deepspeed:
        return
    names = parameter_shapes(run.model)
    decays = run.optim.schedule.kind is not ScheduleKind.constant
    for stage in plan.reached():
        for decaying in (False, True) if decays else (False,):
            weights = loss_weights(stage, run.train, decaying)
            frozen = [name for name in names if not trains(name, stage, weights)]
            if frozen:
                yield (
                    f"engine.name=deepspeed trains all parameters, but stage {stage.name} freezes"
                    f" {len(frozen)} of them ({frozen[0]}; losses of weight 0, or the indexer's"
                    " warm-up): say engine=torch"
                )
                break
