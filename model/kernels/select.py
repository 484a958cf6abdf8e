"""The one table of implementations of an op, and the switch between them (``model.kernels``).

Each op has a short reference in plain PyTorch, which is the definition, and others that are tested
against it: plain torch in chunks (any device), C++ (CPU), Triton (GPU; on a CPU in its interpreter,
for tests). All have the same signature. Adding an op is one line in the table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.config import Kernels, ModelConfig
from model.errors import ConfigError
from model.kernels import (
    attention,
    attention_cpu,
    attention_fast,
    cpu_build,
    cross_entropy,
    elementwise,
    elementwise_fast,
    gather,
    indexer,
    indexer_cpu,
    mhc,
    mhc_fast,
    pool,
    routing,
    symmetric,
)
from model.kernels.ran import serving
from model.linear import block_linear_loop, grouped_linear_op, grouped_linear_reference
from model.rope import apply_rope

Op = Callable[..., Any]


class Implementations(NamedTuple):
    """Of one op.

    Attributes:
        reference: the definition.
        torch: plain torch operations, on any device.
        compiled: C++ on CPU tensors that it can serve, else ``torch``; None: there is none.
        triton: ``file:function`` in ``model/kernels/triton``, imported when it is asked for.
        atomics: whether that function takes ``deterministic=False``.
    """

    reference: Op
    torch: Op
    compiled: Op | None
    triton: str | None
    atomics: bool = False


def _rope_back(kind: Kernels, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The inverse rotation by a kind's op."""
    return _implementation("rope", kind)(x, cos, -sin)


def _norm_rope(
    kind: Kernels, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor
) -> Tensor:
    """RMSNorm, then the rotation, by the two ops of a kind."""
    normed = _implementation("rms_norm", kind)(x, weight, eps)
    return _implementation("rope", kind)(normed, cos, sin)


def _merge_pre(kind: Kernels, y: Tensor, mix: mhc.StreamMix, *parameters: Any) -> Any:
    """A merge, then the pre of the next sublayer, by the two ops of a kind."""
    return _implementation("mhc_pre", kind)(_implementation("mhc_merge", kind)(y, mix), *parameters)


_OPS: dict[str, Implementations] = {
    "attention": Implementations(
        attention.attention_reference,
        attention_fast.attention_chunked,
        attention_cpu.attention_cpu,
        "attention:attention",
        atomics=True,
    ),
    "index_topk": Implementations(
        indexer.index_topk_reference,
        attention_fast.index_topk_chunked,
        indexer_cpu.index_topk_cpu,
        "indexer:index_topk",
    ),
    "indexer_loss": Implementations(
        indexer.indexer_loss_reference,
        attention_fast.indexer_loss_chunked,
        indexer_cpu.indexer_loss_cpu,
        "indexer:indexer_loss",
        atomics=True,
    ),
    "grouped_linear": Implementations(
        grouped_linear_reference, grouped_linear_op, None, "grouped:grouped_linear"
    ),
    "route": Implementations(routing.route, routing.route, None, "routing:route"),
    "expert_order": Implementations(
        routing.expert_order, routing.expert_order, None, "routing:expert_order"
    ),
    "load_and_balance": Implementations(
        routing.load_and_balance, routing.load_and_balance, None, "routing:load_and_balance"
    ),
    "send": Implementations(gather.send, gather.send, None, "grouped:send"),
    "collect": Implementations(gather.collect, gather.collect, None, "grouped:collect"),
    "pool_entries": Implementations(
        pool.pool_entries, pool.pool_entries, None, "pool:pool_entries"
    ),
    "block_linear": Implementations(
        block_linear_loop, block_linear_loop, None, "grouped:block_linear"
    ),
    "rms_norm": Implementations(
        elementwise.rms_norm, elementwise.rms_norm, elementwise_fast.rms_norm, "norm_rope:rms_norm"
    ),
    "swiglu": Implementations(
        elementwise.swiglu, elementwise.swiglu, elementwise_fast.swiglu, "swiglu:swiglu"
    ),
    "rope": Implementations(apply_rope, apply_rope, elementwise_fast.rope, "norm_rope:rope"),
    "rope_back": Implementations(
        functools.partial(_rope_back, Kernels.reference),
        functools.partial(_rope_back, Kernels.torch),
        functools.partial(_rope_back, Kernels.compiled),
        "norm_rope:rope_back",
    ),
    "norm_rope": Implementations(
        functools.partial(_norm_rope, Kernels.reference),
        functools.partial(_norm_rope, Kernels.torch),
        functools.partial(_norm_rope, Kernels.compiled),
        "norm_rope:norm_rope",
    ),
    "symmetric_product": Implementations(
        symmetric.symmetric_product,
        symmetric.symmetric_product,
        None,
        "symmetric:symmetric_product",
    ),
    "mhc_pre": Implementations(
        mhc.mhc_pre, mhc_fast.mhc_pre_torch, mhc_fast.mhc_pre, "mhc:mhc_pre"
    ),
    "mhc_merge": Implementations(
        mhc.mhc_merge, mhc_fast.mhc_merge_torch, mhc_fast.mhc_merge, "mhc:mhc_merge"
    ),
    "mhc_merge_pre": Implementations(
        mhc.mhc_merge_pre,
        functools.partial(_merge_pre, Kernels.torch),
        functools.partial(_merge_pre, Kernels.compiled),
        "mhc:mhc_merge_pre",
    ),
    "cross_entropy": Implementations(
        cross_entropy.cross_entropy_rows,
        cross_entropy.cross_entropy_rows,
        None,
        "cross_entropy:cross_entropy_rows",
    ),
    "mhc_head": Implementations(
        mhc.mhc_head, mhc_fast.mhc_head_torch, mhc_fast.mhc_head, "mhc:mhc_head"
    ),
}


def op_names() -> list[str]:
    """Names that :func:`select` knows, sorted."""
    return sorted(_OPS)


def triton_installed() -> bool:
    """Whether Triton can be imported."""
    return find_spec("triton") is not None


def active_kernels(kernels: Kernels, device: torch.device) -> dict[str, str]:
    """Which code serves each op for fp32 and bf16 tensors of ``device``.

    Returns:
        op -> ``reference``, ``torch``, ``compiled`` (C++, this machine) or ``triton``.
    """
    return {name: _kind(_OPS[name], Kernels(kernels), device.type).value for name in op_names()}


def check_kernels(config: ModelConfig, device: str) -> None:
    """Refuse kernels that cannot run here.

    Args:
        config: asks for them.
        device: ``cpu`` or ``cuda``: where the model will compute.

    Raises:
        ConfigError: names what is missing.
    """
    kernels = Kernels(config.kernels)
    if kernels is Kernels.compiled:
        if device != "cpu":
            raise ConfigError(f"model.kernels=compiled is for a CPU, not train.device={device}")
        if cpu_build.compiler() is None:
            raise ConfigError("model.kernels=compiled needs g++, and there is none on the PATH")
        for key in ("head_dim", "index_head_dim"):
            if getattr(config, key) % 16:
                raise ConfigError(
                    f"model.kernels=compiled takes head dims in multiples of 16, not"
                    f" model.{key}={getattr(config, key)}"
                )
    if kernels is Kernels.triton:
        if not triton_installed():
            raise ConfigError(
                "model.kernels=triton needs Triton: pip install 'v4-pretrain[triton]'"
            )
        if device == "cpu" and not interprets():
            raise ConfigError(
                "model.kernels=triton on a CPU runs in Triton's interpreter, for tests only:"
                " TRITON_INTERPRET=1 switches it on; or give model.kernels=auto"
            )


def interprets() -> bool:
    """Whether Triton runs kernels in its interpreter."""
    return bool(import_module("triton").knobs.runtime.interpret)


def select(op_name: str, kernels: Kernels, deterministic: bool = True) -> Op:
    """Return the implementation of ``op_name`` that ``kernels`` asks for.

    ``auto`` decides by the device of the first tensor of a call.

    Args:
        op_name: of the table.
        kernels: as ``model.kernels``.
        deterministic: as ``model.deterministic``: not so, Triton's ops may sum in no order.

    Raises:
        ValueError: no such op, or no such choice of kernels.
    """
    if op_name not in _OPS:
        raise ValueError(f"unknown op {op_name!r}: known ops are {op_names()}")
    if kernels not in list(Kernels):
        raise ConfigError(f"model.kernels={kernels!r} is none of {[k.value for k in Kernels]}")
    kernels = Kernels(kernels)
    if kernels in (Kernels.auto, Kernels.fast):
        op = functools.partial(_by_device, op_name)
        return functools.update_wrapper(op, _OPS[op_name].torch)
    kind = _kind(_OPS[op_name], kernels, "cpu" if kernels is Kernels.compiled else "cuda")
    found = _implementation(op_name, kind)
    plain = getattr(found, "__wrapped__", found)
    if kind is Kernels.triton and _OPS[op_name].atomics and not deterministic:
        found = functools.partial(found, deterministic=False)
    return functools.update_wrapper(functools.partial(_serve, op_name, kind, found), plain)


def _by_device(op_name: str, *args: Any, **named: Any) -> Any:
    device = next(a for a in _tensors(args)).device.type
    kind = _kind(_OPS[op_name], Kernels.auto, device)
    return _serve(op_name, kind, _implementation(op_name, kind), *args, **named)


def _serve(op_name: str, kind: Kernels, found: Op, *args: Any, **named: Any) -> Any:
    """Call an implementation, counted (``model/kernels/ran.py``)."""
    with serving(op_name, kind):
        return found(*args, **named)


def _tensors(args: tuple[Any, ...]) -> Any:
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, tuple):
            yield from _tensors(a)


def _kind(op: Implementations, kernels: Kernels, device: str) -> Kernels:
    """What runs on a device where ``kernels`` is asked for."""
    if kernels in (Kernels.reference, Kernels.torch):
        return kernels
    if kernels in (Kernels.auto, Kernels.fast):
        if device == "cpu":
            kernels = Kernels.compiled
        elif device == "cuda":
            kernels = Kernels.triton
        else:
            return Kernels.torch
    if kernels is Kernels.compiled:
        here = op.compiled is not None and cpu_build.compiler() is not None
        return Kernels.compiled if here else Kernels.torch
    here = op.triton is not None and triton_installed()
    return Kernels.triton if here else Kernels.torch


def _implementation(op_name: str, kind: Kernels) -> Op:
    op = _OPS[op_name]
    if kind is Kernels.triton:
        file, _, function = str(op.triton).partition(":")
        found = getattr(import_module(f"model.kernels.triton.{file}"), function)
        return functools.update_wrapper(functools.partial(found), op.torch)
    found = {
        Kernels.reference: op.reference, Kernels.torch: op.torch, Kernels.compiled: op.compiled,
    }[kind]  # fmt: skip
    assert found is not None
    return found
