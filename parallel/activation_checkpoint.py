"""Recompute blocks in the backward pass instead of keeping what they computed.

``block`` keeps a block's input, ``selective`` also the results of its matmuls. Both keep what was
chosen (top-k of experts and entries), so that the recomputation routes exactly as the first pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from model.block import Block

_CHOICES = (torch.ops.aten.sort.stable, torch.ops.aten.topk.default, torch.ops.aten.argsort.stable)
_MATMULS = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._grouped_mm.default,
)
_KEPT = {"block": _CHOICES, "selective": _CHOICES + _MATMULS}


def checkpoint_blocks(model: nn.Module, mode: str) -> int:
    """Let every block of ``model`` recompute.

    Args:
        model: holds :class:`model.block.Block` modules.
        mode: ``none``, ``block`` or ``selective``.

    Returns:
        Number of blocks that recompute.
    """
    if mode == "none":
        return 0
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    context_fn = partial(create_selective_checkpoint_contexts, _policy(_KEPT[mode]))
    for block in blocks:
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, context_fn=context_fn
        )
    return len(blocks)


def _policy(kept: tuple[Any, ...]) -> Callable[..., CheckpointPolicy]:
    def policy(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
