"""The one linear layer and the one grouped expert linear; their op is a seam.

An op is a function ``(x, w) -> y`` (grouped: ``(x, w, offsets) -> y``), backward included, and is
replaceable as a
whole: a cast before a matmul could not express FP8 dgrad and wgrad. The weight is the fp32 master;
an op brings it to the activation's dtype itself, so that under FSDP2 (weights already cast) nothing
is cast twice.
"""

# Legend: B batch, T tokens, N rows, I in, O out, E experts, G groups
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.kernels.gather import take_rows

LinearOp = Callable[..., Tensor]  # (x, w), or (x, w, copy of w) if ``reads_copies``
GroupedLinearOp = Callable[..., Tensor]  # the same with offsets before the copy


def linear_op(x: Tensor, w_OI: Tensor, copy_OI: Tensor | None = None) -> Tensor:
    """``x @ w.T`` in the dtype of ``x``.

    Args:
        x: [..., I].
        w_OI: the weight.
        copy_OI: of the weight in the dtype of ``x``, in place of a cast.
    """
    if copy_OI is None:
        return F.linear(x, w_OI.to(x.dtype))
    return _ByCopy.apply(x, w_OI, copy_OI)


class _ByCopy(torch.autograd.Function):
    """Reads the copy; the gradient goes to the weight, in the weight's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_OI: Tensor, copy_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, copy_OI)
        ctx.dtype = w_OI.dtype
        return F.linear(x, copy_OI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, copy_OI = ctx.saved_tensors
        grad_x = grad @ copy_OI if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None, None
        return grad_x, weight_gradient(grad.flatten(0, -2), x.flatten(0, -2), ctx.dtype), None


def weight_gradient(grad_NO: Tensor, x_NI: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad.T @ x`` [O, I] in ``dtype``.

    A GPU's products give their fp32 sum; a CPU rounds it to the operands' dtype once.
    """
    if dtype == x_NI.dtype or x_NI.device.type == "cpu":
        return (x_NI.T @ grad_NO).T.to(dtype)
    return torch.mm(grad_NO.T, x_NI, out_dtype=dtype)


def grouped_linear_reference(
    x_NI: Tensor, w_EOI: Tensor, offsets_E: Tensor, copy_EOI: Tensor | None = None
) -> Tensor:
    """Same as :func:`grouped_linear_op`, every row by a product of its own.

    A row's bits then do not depend on how many rows its expert got, which a grouped matmul cannot
    promise: this is the mode in which isolation and causality hold bit for bit. Slow: it copies a
        matrix per row.
    """
    row_N = torch.arange(x_NI.shape[0], device=x_NI.device)
    expert_N = torch.bucketize(row_N, offsets_E, right=True, out_int32=True)
    w_EOI = w_EOI.to(x_NI.dtype) if copy_EOI is None else _Copied.apply(w_EOI, copy_EOI)
    w_NIO = take_rows(w_EOI.transpose(-2, -1), expert_N)
    return torch.bmm(x_NI[:, None, :], w_NIO)[:, 0]


def grouped_linear_op(
    x_NI: Tensor, w_EOI: Tensor, offsets_E: Tensor, copy_EOI: Tensor | None = None
) -> Tensor:
    """Rows ``offsets[e-1]:offsets[e]`` of ``x`` times ``w[e].T``, in the dtype of ``x``.

    Args:
        x_NI: rows sorted by expert.
        w_EOI: one matrix an expert.
        offsets_E: int32 cumulative row counts; the last must be N, or the rows behind it are
            undefined.
        copy_EOI: of the weight in the dtype of ``x``, in place of a cast.
    """
    w_EOI = w_EOI.to(x_NI.dtype) if copy_EOI is None else _Copied.apply(w_EOI, copy_EOI)
    return F.grouped_mm(x_NI, w_EOI.transpose(-2, -1), offs=offsets_E)


def reads_copies(op: LinearOp | GroupedLinearOp) -> bool:
    """Whether an op casts the master to its input's dtype, so that a copy may stand for it."""
    plain = getattr(op, "__wrapped__", op)  # of an op that is chosen by device: what it does
    return plain in (linear_op, grouped_linear_op, grouped_linear_reference)


class _Copied(torch.autograd.Function):
    """The copy in place of the cast: same value, same gradient."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = w.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def _copies(copy: Tensor | None, x: Tensor) -> tuple[Tensor, ...]:
    """What an op is given beside the weight: its copy, if it is in the dtype of x."""
    return () if copy is None or copy.dtype != x.dtype else (copy,)


class Linear(nn.Module):
    """A bias-free linear map ``[..., in] -> [..., out]``.

    Attributes:
        weight: [out, in], fp32 master.
        op: the seam; set it to another :data:`LinearOp` to change the arithmetic.
        copy: of the weight in the compute dtype (``model/weight_copies.py``), if there is one.
    """

    copy: Tensor | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.op: LinearOp = linear_op

    def forward(self, x: Tensor) -> Tensor:
        """Apply the op."""
        return self.op(x, self.weight, *_copies(self.copy, x))


def block_linear_loop(op: LinearOp, x: Tensor, groups: int, *weights: Tensor) -> Tensor:
    """Group g of ``x [..., groups, in]`` by block g of the weight (and its copy), one by one.

    Args:
        op: of a block.
        x: [..., groups, in].
        groups: of the weight.
        weights: the weight [groups * out, in], and its copy if there is one.

    Returns:
        [..., groups * out].
    """
    blocks = zip(x.unbind(-2), *(w.chunk(groups) for w in weights), strict=True)
    return torch.cat([op(*block) for block in blocks], dim=-1)


class BlockLinear(Linear):
    """Independent linears stacked in one weight [groups * out, in] (wo_a, reference B.3).

    Args:
        in_features: of a group.
        out_features: of all groups.
        groups: number of blocks.
        blocks: serves all blocks while :attr:`op` is plain; as :func:`block_linear_loop`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: int,
        blocks: Callable[..., Tensor] = block_linear_loop,
    ) -> None:
        super().__init__(in_features, out_features)
        self.groups, self.blocks = groups, blocks

    def forward(self, x_BTGI: Tensor) -> Tensor:
        """Map group g of ``[..., groups, in]`` by block g; returns ``[..., out_features]``."""
        blocks = self.blocks if reads_copies(self.op) else block_linear_loop
        return blocks(self.op, x_BTGI, self.groups, self.weight, *_copies(self.copy, x_BTGI))


class GroupedLinear(nn.Module):
    """One linear per expert, stacked [E, out, in]; never fused, so that Muon sees matrices."""

    copy: Tensor | None = None  # as Linear.copy

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        op: GroupedLinearOp = grouped_linear_op,
    ) -> None:
        super().__init__()
        self.num_experts, self.in_features, self.out_features = (
            num_experts,
            in_features,
            out_features,
        )
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.op = op

    def forward(self, x_NI: Tensor, offsets_E: Tensor) -> Tensor:
        """Apply the op to rows sorted by expert."""
        return self.op(x_NI, self.weight, offsets_E, *_copies(self.copy, x_NI))


class ActivationCast(nn.Module):
    """Named seam on an activation (KV, indexer q and k): identity until quantisation swaps it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``."""
        return x
