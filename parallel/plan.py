"""How a model becomes a part of a layout: one ordered list."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.config import ModelConfig
from model.init import init_weights
from model.transformer import DeepSeekV4
from parallel.activation_checkpoint import checkpoint_blocks
from parallel.expert import shard_experts
from parallel.fsdp import region_of, shard_model
from parallel.mesh import Mesh


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
    checkpoint_blocks(model, activation_checkpoint)
    if mesh.layout.ep > 1:
        shard_experts(model, mesh.ep)
    shard_model(model, mesh, precision, reads_master)
    model.to_empty(device=device)
    init_weights(model, seed, token_counts_V, region_of)
    return model
