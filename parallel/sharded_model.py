"""How a model becomes a part of a layout: one ordered list."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from model.config import ModelConfig
from model.init import init_weights
from model.transformer import DeepSeekV4
from parallel.activation_offload import ActivationOffload, prepare_blocks
from parallel.compiled_blocks import CompiledBlocks
from parallel.expert import shard_experts
from parallel.fsdp import region_of, shard_model
from parallel.mesh import Mesh
from parallel.pipeline_split import PipelineStageParts, rank_of_stage, split_stages, splits_backward
from parallel.pipeline_stage import ModelPart, PipelineStageModel

log = logging.getLogger(__name__)


def build_sharded_model(
    config: ModelConfig,
    mesh: Mesh,
    device: torch.device,
    precision: str = "fp32",
    activation_checkpoint: str = "none",
    seed: int = 0,
    token_counts_V: Tensor | None = None,
    reads_master: Callable[[str], bool] = lambda name: False,
    seq_len: int = 4096,
    offload: ActivationOffload | None = None,
    compiled: CompiledBlocks | None = None,
) -> DeepSeekV4:
    """This process's part of a model, with the bits that one process would have given it.

    Args:
        config: of the whole model.
        mesh: of the layout.
        device: where this process computes.
        precision: ``fp32`` or ``bf16``.
        activation_checkpoint: ``none``, ``block`` or ``selective``.
        seed: of the run.
        token_counts_V: occurrences of each token id, for the hash tables.
        reads_master: see :func:`parallel.fsdp.shard_model`.
        seq_len: tokens of a row, by which pipeline stages are balanced.
        offload: takes what blocks keep to the host; None: it stays.
        compiled: makes graphs of the blocks, in front of the sharding: what gathers and reduces
            stays around a graph. None: nothing does.

    Returns:
        The whole model with this process's shards, or with pipeline stages a :class:`ModelPart`.
    """

    def materialise(make: Callable[[], DeepSeekV4]) -> DeepSeekV4:
        with torch.device("meta"):  # no process ever holds the whole model
            model = make()
        prepare_blocks(model, activation_checkpoint, offload, compiled)
        if mesh.layout.ep > 1:
            shard_experts(model, mesh.ep)
        shard_model(model, mesh, precision, reads_master, graphs=compiled is not None)
        model.to_empty(device=device)
        init_weights(model, seed, token_counts_V, region_of)
        return model

    if mesh.layout.pp == 1:
        return materialise(lambda: DeepSeekV4(config))
    recomputes = activation_checkpoint != "none"
    stages = []
    for parts in _stages_here(config, mesh, seq_len):
        stage = materialise(partial(PipelineStageModel, config, parts, recomputes))
        assert isinstance(stage, PipelineStageModel)
        register_fsdp_forward_method(stage, "advance")
        stages.append(stage)
    if splits_backward(mesh.layout.schedule) and recomputes:
        log.warning(
            "parallel.schedule=%s with train.activation_checkpoint=%s: gradients of weights are"
            " computed with those of inputs; apart, a block would be recomputed for every weight",
            mesh.layout.schedule, activation_checkpoint,
        )  # fmt: skip
    return ModelPart(config, stages)


def _stages_here(config: ModelConfig, mesh: Mesh, seq_len: int) -> list[PipelineStageParts]:
    """What each of this rank's pipeline stages holds, in order."""
    layout, rank = mesh.layout, mesh.pipeline.get_local_rank()
    return [
        parts
        for parts in split_stages(config, layout, seq_len)
        if rank_of_stage(parts.index, layout.pp, layout.schedule) == rank
    ]
