"""Cross-entropy of rows of logits, and its gradient by them (reference B.8): the reference."""

# Legend: N positions, V vocabulary
from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy_rows(
    logits_NV: Tensor, labels_N: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of each row in nats, and the gradient of their sum; one exp serves both.

    Args:
        logits_NV: fp32; overwritten.
        labels_N: token ids, negative where nothing is predicted: 0, and no gradient.
        dtype: of the gradient; None: it is not wanted.
    """
    counted, target = labels_N >= 0, labels_N.clamp(min=0)[:, None]
    top = logits_NV.amax(dim=-1, keepdim=True)
    picked = logits_NV.gather(1, target) - top
    p = logits_NV.sub_(top).exp_()
    normaliser = p.sum(dim=-1, keepdim=True)
    losses_N = (normaliser.log() - picked)[:, 0] * counted
    if dtype is None:
        return losses_N, None
    p *= counted[:, None] / normaliser
    p.scatter_add_(1, target, -counted[:, None].to(p.dtype))
    return losses_N, p.to(dtype)
