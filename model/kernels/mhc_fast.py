"""mHC as fused kernels with analytic gradients (reference B.2); the reference is ``mhc.py``.

On CPU the kernels are the C++ of ``cpu/mhc.cpp`` (one pass over the streams per call), elsewhere
and without a compiler the torch formulas of ``mhc_torch.py``. Streams are fp32 or bf16, parameters
fp32. Other kernels of the same schemas come in as :class:`MhcOps`.

The merge mixes the streams, but the backward pass of ``mhc_pre``, which reads them anyway, takes
the gradient through that mixing: the merge hands its incoming gradient on. So ``mhc_pre`` returns
the streams once more, in a :class:`StreamMix`; there they stand for ``comb^T x`` in the graph.
"""

# Legend: B batch, T tokens, N = B * T, S streams (a second S: destination), D hidden, C = S * D,
# M = (2 + S) * S mix channels
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels import mhc_torch
from model.kernels.mhc import StreamMix
from model.kernels.mhc_ops import OPS


class MhcOps(NamedTuple):
    """Kernels by the schemas of ``mhc_ops.py``, and the dtypes of streams that they take."""

    pre: Callable[..., Any]
    pre_backward: Callable[..., Any]
    merge: Callable[..., Any]
    merge_backward: Callable[..., Any]
    head: Callable[..., Any]
    head_backward: Callable[..., Any]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


_BY_DEVICE = MhcOps(
    OPS.mhc_pre, OPS.mhc_pre_backward, OPS.mhc_merge, OPS.mhc_merge_backward, OPS.mhc_head,
    OPS.mhc_head_backward,
)  # fmt: skip


class _Pre(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ops: MhcOps,
        x_NSD: Tensor,
        fn_MC: Tensor,
        base_M: Tensor,
        scale_3: Tensor,
        iters: int,
        eps: float,
        rms_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        u_ND, post_NS, comb_NSS, mix_NM, rms_N = ops.pre(
            x_NSD, fn_MC, base_M, scale_3, iters, eps, rms_eps
        )
        ctx.save_for_backward(x_NSD, fn_MC, base_M, scale_3, mix_NM, rms_N)
        ctx.ops, ctx.iters, ctx.eps = ops, iters, eps
        ctx.set_materialize_grads(False)
        return u_ND, x_NSD.view_as(x_NSD), post_NS, comb_NSS

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_u_ND: Tensor | None,
        grad_new_NSD: Tensor | None,
        grad_post_NS: Tensor | None,
        grad_comb_NSS: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        x_NSD, fn_MC, base_M, scale_3, mix_NM, rms_N = ctx.saved_tensors
        grads = ctx.ops.pre_backward(
            x_NSD, fn_MC, base_M, scale_3, ctx.iters, ctx.eps, mix_NM, rms_N,
            *filled(x_NSD, mix_NM, grad_u_ND, grad_new_NSD, grad_post_NS, grad_comb_NSS),
        )  # fmt: skip
        return None, *grads, None, None, None


def filled(
    x_NSD: Tensor,
    mix_NM: Tensor,
    grad_u_ND: Tensor | None,
    grad_new_NSD: Tensor | None,
    grad_post_NS: Tensor | None,
    grad_comb_NSS: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of what a pre returns, zeros where there is none; that of comb may be None."""
    N, S, D = x_NSD.shape
    return (
        x_NSD.new_zeros(N, D) if grad_u_ND is None else grad_u_ND,
        torch.zeros_like(x_NSD) if grad_new_NSD is None else grad_new_NSD,
        mix_NM.new_zeros(N, S) if grad_post_NS is None else grad_post_NS,
        grad_comb_NSS,
    )


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ops: MhcOps, y_ND: Tensor, x_NSD: Tensor, post_NS: Tensor, comb_NSS: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y_ND, post_NS)
        ctx.ops = ops
        return ops.merge(y_ND, x_NSD, post_NS, comb_NSS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NSD: Tensor) -> tuple[Tensor | None, ...]:
        y_ND, post_NS = ctx.saved_tensors
        grad_NSD = grad_NSD.contiguous()
        grad_y_ND, grad_post_NS = ctx.ops.merge_backward(grad_NSD, y_ND, post_NS)
        # For the streams: the gradient of comb^T x itself. _Pre takes it through comb.
        return None, grad_y_ND, grad_NSD, grad_post_NS, None


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ops: MhcOps,
        x_NSD: Tensor,
        fn_SC: Tensor,
        base_S: Tensor,
        scale_1: Tensor,
        eps: float,
        rms_eps: float,
    ) -> Tensor:
        y_ND, mix_NS, rms_N = ops.head(x_NSD, fn_SC, base_S, scale_1, eps, rms_eps)
        ctx.save_for_backward(x_NSD, fn_SC, base_S, scale_1, mix_NS, rms_N)
        ctx.ops, ctx.eps = ops, eps
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_NSD, fn_SC, base_S, scale_1, mix_NS, rms_N = ctx.saved_tensors
        grads = ctx.ops.head_backward(
            x_NSD, fn_SC, base_S, scale_1, ctx.eps, mix_NS, rms_N, grad_ND
        )
        return None, *grads, None, None


def mhc_pre(
    x_BTSD: Tensor,
    fn_MC: Tensor,
    base_M: Tensor,
    scale_3: Tensor,
    iters: int,
    eps: float,
    rms_eps: float,
    ops: MhcOps = _BY_DEVICE,
) -> tuple[Tensor, StreamMix]:
    """Fused :func:`model.kernels.mhc.mhc_pre`: same arguments and results.

    Raises:
        ValueError: streams that are neither fp32 nor bf16, or parameters that are not fp32.
    """
    x_NSD = rows_of(ops, x_BTSD, fn_MC, base_M, scale_3)
    u_ND, new_NSD, post_NS, comb_NSS = _Pre.apply(
        ops, x_NSD, fn_MC.contiguous(), base_M, scale_3, iters, eps, rms_eps
    )
    lead = x_BTSD.shape[:-2]
    post_BTS, comb_BTSS = post_NS.unflatten(0, lead), comb_NSS.unflatten(0, lead)
    return u_ND.unflatten(0, lead), StreamMix(new_NSD.view(x_BTSD.shape), post_BTS, comb_BTSS)


def mhc_merge(y_BTD: Tensor, mix: StreamMix, ops: MhcOps = _BY_DEVICE) -> Tensor:
    """Fused :func:`model.kernels.mhc.mhc_merge`; ``mix`` must come from the fused pre.

    Raises:
        ValueError: y and the streams differ in dtype.
    """
    x_BTSD = mix.x_BTSD
    new_NSD = _Merge.apply(
        ops,
        written(y_BTD, x_BTSD),
        x_BTSD.flatten(0, -3),
        mix.post_BTS.flatten(0, -2),
        mix.comb_BTSS.flatten(0, -3),
    )
    return new_NSD.view(x_BTSD.shape)


def mhc_head(
    x_BTSD: Tensor,
    fn_SC: Tensor,
    base_S: Tensor,
    scale_1: Tensor,
    eps: float,
    rms_eps: float,
    ops: MhcOps = _BY_DEVICE,
) -> Tensor:
    """Fused :func:`model.kernels.mhc.mhc_head`: same arguments, result and errors as the pre."""
    x_NSD = rows_of(ops, x_BTSD, fn_SC, base_S, scale_1)
    y_ND = _Head.apply(ops, x_NSD, fn_SC.contiguous(), base_S, scale_1, eps, rms_eps)
    return y_ND.unflatten(0, x_BTSD.shape[:-2])


_TORCH = MhcOps(
    mhc_torch.pre, mhc_torch.pre_backward, mhc_torch.merge, mhc_torch.merge_backward,
    mhc_torch.head, mhc_torch.head_backward,
)  # fmt: skip
# In plain torch on every device.
mhc_pre_torch = partial(mhc_pre, ops=_TORCH)
mhc_merge_torch = partial(mhc_merge, ops=_TORCH)
mhc_head_torch = partial(mhc_head, ops=_TORCH)


def rows_of(ops: MhcOps, x_BTSD: Tensor, *parameters: Tensor) -> Tensor:
    """The streams [N, S, D], when kernels take them and the parameters."""
    if x_BTSD.dtype not in ops.dtypes:
        known = " or ".join(str(dtype).removeprefix("torch.") for dtype in ops.dtypes)
        raise ValueError(f"mHC kernels take {known} streams, not {x_BTSD.dtype}")
    for parameter in parameters:
        if parameter.dtype is not torch.float32:
            raise ValueError(f"mHC parameters must be fp32, not {parameter.dtype}")
    return x_BTSD.contiguous().flatten(0, -3)


def written(y_BTD: Tensor, x_BTSD: Tensor) -> Tensor:
    """What a sublayer writes into the streams [N, D], when kernels can mix the two."""
    if y_BTD.dtype != x_BTSD.dtype:
        raise ValueError(
            f"fused mHC kernels mix one dtype: sublayer output {y_BTD.dtype}, streams"
            f" {x_BTSD.dtype}"
        )
    return y_BTD.flatten(0, -2).contiguous()
