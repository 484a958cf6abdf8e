"""How a model becomes a part of a layout: one ordered list."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from model.config import ModelConfig
from model.init import init_weights
from model.transformer import DeepSeekV4
from parallel.activation_checkpoint import checkpoint_blocks
from parallel.expert import shard_experts
from parallel.fsdp import region_of, shard_model
from parallel.mesh import Mesh
from parallel.pipeline_split import rank_of_stage, split_stages, splits_backward
from parallel.pipeline_stage import ModelPart, StageModel

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
    """
    with torch.device("meta"):  # no process ever holds the whole model
        model = DeepSeekV4(config)
    _shard(model, mesh, precision, activation_checkpoint, reads_master)
    model.to_empty(device=device)
    init_weights(model, seed, token_counts_V, region_of)
    return model


def build_pipeline_part(
    config: ModelConfig,
    mesh: Mesh,
    device: torch.device,
    precision: str = "fp32",
    activation_checkpoint: str = "none",
    seed: int = 0,
    token_counts_V: Tensor | None = None,
    reads_master: Callable[[str], bool] = lambda name: False,
    seq_len: int = 4096,
) -> ModelPart:
    """This rank's pipeline stages, with the bits that one process would have given them.

    Args:
        config: of the whole model.
        mesh: of the layout.
        device: where this process computes.
        precision: ``fp32`` or ``bf16``.
        activation_checkpoint: ``none``, ``block`` or ``selective``.
        seed: of the run.
        token_counts_V: occurrences of each token id, for the hash tables.
        reads_master: see :func:`parallel.fsdp.shard_model`.
        seq_len: tokens of a row, by which the stages are balanced.
    """
    layout, rank = mesh.layout, mesh.pipeline.get_local_rank()
    stages = []
    for parts in split_stages(config, layout, seq_len):
        if rank_of_stage(parts.index, layout.pp, layout.schedule) != rank:
            continue
        with torch.device("meta"):
            stage = StageModel(config, parts)
        _shard(stage, mesh, precision, activation_checkpoint, reads_master)
        stage.recomputes = activation_checkpoint != "none"
        register_fsdp_forward_method(stage, "advance")
        stage.to_empty(device=device)
        init_weights(stage, seed, token_counts_V, region_of)
        stages.append(stage)
    if splits_backward(layout.schedule) and activation_checkpoint != "none":
        log.warning(
            "parallel.schedule=%s with train.activation_checkpoint=%s: gradients of weights are"
            " computed with those of inputs; apart, a block would be recomputed for every weight",
            layout.schedule, activation_checkpoint,
        )  # fmt: skip
    return ModelPart(config, stages)


def _shard(
    model: DeepSeekV4,
    mesh: Mesh,
    precision: str,
    activation_checkpoint: str,
    reads_master: Callable[[str], bool],
) -> None:
    checkpoint_blocks(model, activation_checkpoint)
    if mesh.layout.ep > 1:
        shard_experts(model, mesh.ep)
    shard_model(model, mesh, precision, reads_master)
