"""RMSNorm, clamped SwiGLU and RoPE as one compiled pass each on CPU, forward and backward.

The references are ``elementwise.py`` and ``model.rope.apply_rope``; they also serve the devices and
dtypes that ``cpu/elementwise.cpp`` does not (:func:`compiled`). Nothing but inputs is kept for the
backward pass.
"""

# Legend: N rows, I expert intermediate, R rotation pairs, K channels
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels import elementwise
from model.kernels.cpu_build import KernelLibrary, kernel_library
from model.rope import apply_rope

_LIBRARY = torch.library.Library("v4", "FRAGMENT")
OPS = torch.ops.v4
_Op = Callable[..., Any]
_Pair = tuple[_Op, _Op]  # forward, backward
_MAX_ROTATED = 1024  # PAIR_BUFFER of cpu/elementwise.cpp
# C arguments: p pointer, i int, l long, f float (see the exports of cpu/elementwise.cpp)
_C_SIGNATURES = {
    "rms_norm": "ppfllpi",
    "rms_norm_backward": "pppfllppi",
    "swiglu": "pppfllpi",
    "swiglu_backward": "ppppfllpppi",
    "rope": "pppfllllpi",
}


def _library() -> KernelLibrary | None:
    return kernel_library("elementwise.cpp", _C_SIGNATURES)


def compiled(*tensors: Tensor) -> bool:
    """Whether the C++ kernels serve these: CPU, one dtype of fp32 or bf16, a compiler at hand."""
    fits = {t.device.type for t in tensors} == {"cpu"} and len({t.dtype for t in tensors}) == 1
    return fits and tensors[0].dtype in (torch.float32, torch.bfloat16) and _library() is not None


def _call(name: str, main: Tensor, *arguments: Tensor | float | None) -> None:
    library = _library()
    assert library is not None
    library.call(name, main.dtype, *arguments)


# ---- RMSNorm ----------------------------------------------------------------------------------


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = torch.empty_like(x)
    _call("rms_norm", x, x, weight, eps, *_rows(x), y)
    return y


def _rms_norm_backward(
    x: Tensor, weight: Tensor | None, grad: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x)
    grad_weight = x.new_empty(0 if weight is None else weight.shape[0], dtype=torch.float32)
    pointer = None if weight is None else grad_weight
    _call("rms_norm_backward", x, x, weight, grad, eps, *_rows(x), grad_x, pointer)
    return grad_x, grad_weight


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ops: _Pair, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.backward_op, ctx.eps = ops[1], eps
        return ops[0](x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = ctx.backward_op(x, weight, grad.contiguous(), ctx.eps)
        return None, grad_x, None if weight is None else grad_weight, None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Fused :func:`model.kernels.elementwise.rms_norm`: same arguments and result."""
    if not compiled(x):
        return elementwise.rms_norm(x, weight, eps)
    return rms_norm_by((OPS.rms_norm, OPS.rms_norm_backward), x, weight, eps)


def rms_norm_by(ops: _Pair, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The same by operators of these schemas: forward, backward."""
    weight = None if weight is None else weight.float().contiguous()
    return _RmsNorm.apply(ops, x.contiguous(), weight, eps)


# ---- SwiGLU -----------------------------------------------------------------------------------


def _swiglu(gate: Tensor, up: Tensor, weight: Tensor | None, limit: float) -> Tensor:
    a = torch.empty_like(gate)
    _call("swiglu", gate, gate, up, weight, limit, *_rows(gate), a)
    return a


def _swiglu_backward(
    gate: Tensor, up: Tensor, weight: Tensor | None, grad: Tensor, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    rows, width = _rows(gate)
    grad_weight = gate.new_empty(0 if weight is None else rows, dtype=torch.float32)
    out = (grad_gate, grad_up, None if weight is None else grad_weight)
    _call("swiglu_backward", gate, gate, up, weight, grad, limit, rows, width, *out)
    return grad_gate, grad_up, grad_weight


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ops: _Pair, gate_NI: Tensor, up_NI: Tensor, weight_N: Tensor | None, limit: float
    ) -> Tensor:
        ctx.save_for_backward(gate_NI, up_NI, weight_N)
        ctx.backward_op, ctx.limit = ops[1], limit
        return ops[0](gate_NI, up_NI, weight_N, limit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NI: Tensor) -> tuple[Tensor | None, ...]:
        gate_NI, up_NI, weight_N = ctx.saved_tensors
        grad_gate, grad_up, grad_weight = ctx.backward_op(
            gate_NI, up_NI, weight_N, grad_NI.contiguous(), ctx.limit
        )
        return None, grad_gate, grad_up, None if weight_N is None else grad_weight, None


def swiglu(gate_NI: Tensor, up_NI: Tensor, weight_N: Tensor | None, limit: float) -> Tensor:
    """Fused :func:`model.kernels.elementwise.swiglu`: same arguments and result."""
    if not compiled(gate_NI, up_NI):
        return elementwise.swiglu(gate_NI, up_NI, weight_N, limit)
    return swiglu_by((OPS.swiglu, OPS.swiglu_backward), gate_NI, up_NI, weight_N, limit)


def swiglu_by(
    ops: _Pair, gate_NI: Tensor, up_NI: Tensor, weight_N: Tensor | None, limit: float
) -> Tensor:
    """The same by operators of these schemas: forward, backward."""
    weight = None if weight_N is None else weight_N.float().contiguous()
    return _SwiGlu.apply(ops, gate_NI.contiguous(), up_NI.contiguous(), weight, limit)


# ---- RoPE -------------------------------------------------------------------------------------


def _rope(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    y = torch.empty_like(x)
    tokens, pairs, channels = cos[..., 0].numel(), cos.shape[-1], x.shape[-1]
    heads = x.numel() // max(tokens * channels, 1)
    _call("rope", x, x, cos, sin, sign, tokens, heads, channels, pairs, y)
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: _Op, x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.op, ctx.sign = op, sign
        return op(x, cos, sin, sign)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return None, ctx.op(grad.contiguous(), cos, sin, -ctx.sign), None, None, None


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Fused :func:`model.rope.apply_rope`: same arguments and result."""
    if not compiled(x) or 2 * cos.shape[-1] > _MAX_ROTATED:
        return apply_rope(x, cos, sin)
    return rope_by(OPS.rope, x, cos, sin)


def rope_by(op: _Op, x: Tensor, cos: Tensor, sin: Tensor, sign: float = 1.0) -> Tensor:
    """The same by an operator of this schema, which the backward pass turns back; sign -1: back."""
    return _Rope.apply(op, x.contiguous(), *tables(x, cos, sin), sign)


def tables(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Cosines and sines as kernels read them: fp32, one row for each token of x."""
    shape = (*x.shape[: cos.dim() - 1], cos.shape[-1])
    return tuple(t.float().expand(shape).contiguous() for t in (cos, sin))


def _rows(x: Tensor) -> tuple[int, int]:
    width = x.shape[-1]
    return x.numel() // max(width, 1), width


# ---- torch.ops.v4.*: visible to profiles and dispatch modes, usable on fake tensors ------------

_OPS = {
    "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor": (
        _rms_norm,
        lambda x, weight, eps: torch.empty_like(x),
    ),
    "rms_norm_backward(Tensor x, Tensor? weight, Tensor grad, float eps) -> (Tensor, Tensor)": (
        _rms_norm_backward,
        lambda x, weight, grad, eps: (
            torch.empty_like(x),
            x.new_empty(0 if weight is None else weight.shape[0], dtype=torch.float32),
        ),
    ),
    "swiglu(Tensor gate, Tensor up, Tensor? weight, float limit) -> Tensor": (
        _swiglu,
        lambda gate, up, weight, limit: torch.empty_like(gate),
    ),
    "swiglu_backward(Tensor gate, Tensor up, Tensor? weight, Tensor grad, float limit)"
    " -> (Tensor, Tensor, Tensor)": (
        _swiglu_backward,
        lambda gate, up, weight, grad, limit: (
            torch.empty_like(gate),
            torch.empty_like(up),
            gate.new_empty(0 if weight is None else weight.shape[0], dtype=torch.float32),
        ),
    ),
    "rope(Tensor x, Tensor cos, Tensor sin, float sign) -> Tensor": (
        _rope,
        lambda x, cos, sin, sign: torch.empty_like(x),
    ),
}
for _schema, (_kernel, _shapes) in _OPS.items():
    _name = _schema.split("(")[0]
    _LIBRARY.define(_schema)
    _LIBRARY.impl(_name, _kernel, "CPU")
    torch.library.register_fake(f"v4::{_name}", _shapes, lib=_LIBRARY)
