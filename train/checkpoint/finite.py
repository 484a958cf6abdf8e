"""One rule for what is saved: every number of it is finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from parallel.collectives import gathered, local


def first_not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Name of a tensor that holds NaN or an infinity on any rank; empty: none does. Collective."""
    floats = {name: local(t) for name, t in tensors.items() if t.is_floating_point()}
    # One answer for all of them: on a GPU each would cost a wait.
    finite = [t.isfinite().all() for t in floats.values()]
    mine = torch.stack(finite).tolist() if finite else []
    name = next((name for name, is_finite in zip(floats, mine, strict=True) if not is_finite), "")
    return next((found for found in gathered(name) if found), "")
