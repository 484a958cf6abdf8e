"""The one switch between the plain and the fast implementation of an op (``model.kernels``).

Each op has a short reference in plain PyTorch, which is the definition, and a fast path that is
tested against it. Both have the same signature. Adding an op is one line in the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from model.config import Kernels
from model.errors import ConfigError
from model.kernels import (
    attention,
    attention_cpu,
    elementwise,
    elementwise_fast,
    indexer,
    indexer_cpu,
    mhc,
    mhc_fast,
)
from model.linear import grouped_linear_op, grouped_linear_reference
from model.rope import apply_rope

Op = Callable[..., Any]

# op -> (reference, fast)
_OPS: dict[str, tuple[Op, Op]] = {
    "attention": (attention.attention_reference, attention_cpu.attention_cpu),
    "index_topk": (indexer.index_topk_reference, indexer_cpu.index_topk_cpu),
    "indexer_loss": (indexer.indexer_loss_reference, indexer_cpu.indexer_loss_cpu),
    "grouped_linear": (grouped_linear_reference, grouped_linear_op),
    "rms_norm": (elementwise.rms_norm, elementwise_fast.rms_norm),
    "swiglu": (elementwise.swiglu, elementwise_fast.swiglu),
    "rope": (apply_rope, elementwise_fast.rope),
    "mhc_pre": (mhc.mhc_pre, mhc_fast.mhc_pre),
    "mhc_merge": (mhc.mhc_merge, mhc_fast.mhc_merge),
    "mhc_head": (mhc.mhc_head, mhc_fast.mhc_head),
}


def op_names() -> list[str]:
    """Names that :func:`select` knows, sorted."""
    return sorted(_OPS)


def select(op_name: str, kernels: Kernels) -> Op:
    """Return the implementation of ``op_name`` that ``kernels`` asks for.

    Raises:
        ValueError: no such op, or no such choice of kernels.
    """
    if op_name not in _OPS:
        raise ValueError(f"unknown op {op_name!r}: known ops are {op_names()}")
    if kernels not in list(Kernels):
        raise ConfigError(f"model.kernels={kernels!r} is none of {[k.value for k in Kernels]}")
    reference, fast = _OPS[op_name]
    return reference if Kernels(kernels) is Kernels.reference else fast
