"""Quantised linear ops for the seams ``Linear.op`` and ``GroupedLinear.op``, emulated.

Operands are rounded to their formats and multiplied in the compute dtype: products of FP8 values
are exact there, so what differs from FP8 hardware is the order of summation. One op serves three
uses (reference C.5 to C.8):

* QAT: weights in FP4 or FP8; the weight gradient goes straight to the fp32 master.
* deployed: inputs in FP8 as well, as inference has them.
* FP8 training: gradients too. dgrad reads the same FP8 weights as the forward pass; wgrad reads the
  stored FP8 input and the gradient, both in blocks of 128 rows.

FP4 weights enter as their values. These are what the FP8 view of ``quant/lossless.py`` holds, as
long as scales keep within its bound, which the probe measures.
"""

# Legend: N rows, I in, O out, E experts
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.linear import BlockLinear, GroupedLinearOp
from quant.experts import fake_quant_rows
from quant.fake_quant import WeightQuantiser
from quant.formats import FP8_ACTIVATION, fake_quant
from quant.probe import QuantProbe


@dataclass(eq=False)
class QuantOp:
    """``(x, w) -> x @ w.T`` and, for experts, ``(x, w, offsets) -> y`` with quantised operands.

    Attributes:
        name: of the module whose op this is.
        part: part of the config that asked for it.
        weight: casts the weight.
        activations: cast the input to FP8.
        gradients: cast the operands of dgrad and wgrad to FP8.
        probe: told that it ran.
        grouped: the experts' plain matmul, with which quantised operands are multiplied.
        owner: module whose weight ``w`` is a slice of, where the whole is quantised: blocks cross
            the slices' edges, or the engine takes the weight as it is stored.
    """

    name: str
    part: str
    weight: WeightQuantiser
    activations: bool
    gradients: bool
    probe: QuantProbe
    grouped: GroupedLinearOp | None = None
    owner: BlockLinear | None = None

    def __call__(self, x: Tensor, w: Tensor, offsets: Tensor | None = None) -> Tensor:
        """Multiply; dtype of ``x``.

        Raises:
            ValueError: a trained weight that is not the fp32 master.
        """
        check_master(self.name, w)
        self.probe.saw(self.name)
        self.probe.measure(self.part, w, self.weight.fmt, weight=self.name)
        if self.activations:
            self.probe.measure(f"{self.part}_input", x, FP8_ACTIVATION)
        y = _QuantMatmul.apply(x.reshape(-1, x.shape[-1]), w, offsets, self)
        return y.view(*x.shape[:-1], y.shape[-1])

    def quantised_weight(self, w: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of ``w`` in its format; blocks are those of the whole parameter."""
        if self.owner is None:
            return self.weight(w, dtype)
        whole = self.owner.weight
        first = int(w.storage_offset() - whole.storage_offset()) // int(whole.stride(0))
        return self.weight(whole, dtype)[first : first + w.shape[0]]


def check_master(name: str, w: Tensor) -> None:
    """Refuse to train a weight that was rounded before it is quantised.

    Raises:
        ValueError: gradients are on and the weight is not fp32.
    """
    if torch.is_grad_enabled() and w.requires_grad and w.dtype != torch.float32:
        raise ValueError(
            f"weight of {name} arrives as {w.dtype}, but quantisation rounds the fp32 master (else"
            " trained and exported values differ): the layout must gather it in fp32"
        )


class _QuantMatmul(torch.autograd.Function):
    """The three products of a linear layer on quantised operands.

    Quantised weights are not saved but made again in the backward pass (or taken from the kept
    copy): saved ones would defeat layouts that free a gathered weight between the passes.
    """

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, w: Tensor, offsets: Tensor | None, op: QuantOp) -> Tensor:
        if op.activations:
            x_NI = fake_quant(x_NI, FP8_ACTIVATION)
        ctx.save_for_backward(x_NI, w, offsets)
        ctx.op = op
        return _product(x_NI, op.quantised_weight(w, x_NI.dtype), offsets, op)

    @staticmethod
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_NI, w, offsets = ctx.saved_tensors
        op: QuantOp = ctx.op
        needs_x, needs_w = ctx.needs_input_grad[:2]
        grad_NO = grad_NO.contiguous()
        grad_x = grad_w = None
        if needs_x:
            operand_NO = fake_quant(grad_NO, FP8_ACTIVATION) if op.gradients else grad_NO
            w_q = op.quantised_weight(w, grad_NO.dtype)
            grad_x = _product(operand_NO, w_q.transpose(-2, -1), offsets, op)
        if needs_w:
            if op.gradients:
                grad_NO, x_NI = fake_quant_rows(grad_NO, offsets), fake_quant_rows(x_NI, offsets)
            grad_w = _weight_gradient(grad_NO, x_NI, offsets, w)
        return grad_x, grad_w, None, None


def _weight_gradient(grad_NO: Tensor, x_NI: Tensor, offsets: Tensor | None, w: Tensor) -> Tensor:
    if offsets is None:
        return (grad_NO.t() @ x_NI).to(w.dtype)
    if x_NI.shape[0] == 0:  # refused by grouped_mm
        return torch.zeros_like(w)
    return F.grouped_mm(grad_NO.t(), x_NI, offs=offsets).to(w.dtype)


def _product(x_NI: Tensor, w: Tensor, offsets: Tensor | None, op: QuantOp) -> Tensor:
    if offsets is None:
        return F.linear(x_NI, w)
    assert op.grouped is not None
    if x_NI.shape[0] == 0:
        return x_NI.new_zeros(0, w.shape[-2])
    return op.grouped(x_NI, w, offsets)
