"""The names of Transformer Engine that we call, on a CPU, to see what we hand over to them.

Only their contract is kept: a block-scaled tensor is multiplied as it is, rows forward and columns
backward; the weight's gradient comes back in the activations' dtype. Nothing else is rounded.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F


class BlockTensor(torch.Tensor):
    """A wrapper, as Float8BlockwiseQTensor is; any operation on it but ``detach`` raises."""

    rows: torch.Tensor
    row_scales: torch.Tensor
    columns: torch.Tensor
    column_scales: torch.Tensor

    @staticmethod
    def __new__(cls, *, shape, dtype, rowwise_data, rowwise_scale_inv, columnwise_data,
                columnwise_scale_inv, fp8_dtype, quantizer, is_2D_scaled, device):  # fmt: skip
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        assert is_2D_scaled
        assert fp8_dtype == "e4m3"
        assert quantizer["block_scaling_dim"] == 2
        self.rows, self.row_scales = rowwise_data, rowwise_scale_inv
        self.columns, self.column_scales = columnwise_data, columnwise_scale_inv
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.detach.default:
            raise NotImplementedError(str(func))
        (self,) = args
        return BlockTensor.__new__(
            cls, shape=self.shape, dtype=self.dtype, rowwise_data=self.rows,
            rowwise_scale_inv=self.row_scales, columnwise_data=self.columns,
            columnwise_scale_inv=self.column_scales, fp8_dtype="e4m3",
            quantizer={"block_scaling_dim": 2}, is_2D_scaled=True, device=self.device,
        )  # fmt: skip


def values(codes, scales):
    """float32 [R, C] of codes and their padded scales."""
    rows, cols = codes.shape
    wide = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    return codes.view(torch.float8_e4m3fn).float() * wide


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        assert isinstance(weight, BlockTensor)
        ctx.save_for_backward(x, weight)
        return F.linear(x, values(weight.rows, weight.row_scales).to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = F.linear(grad, values(weight.columns, weight.column_scales).to(grad.dtype))
        return grad_x, grad.flatten(0, -2).T @ x.flatten(0, -2)


class StandInLinear(nn.Module):
    def __init__(self, inputs, outputs, bias, params_dtype, device):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=params_dtype, device=device))

    def forward(self, x):
        return _Product.apply(x, self.weight)


class StandInGroupedLinear(nn.Module):
    def __init__(
        self, experts, inputs, outputs, bias, params_dtype, device, use_grouped_tensor=False
    ):
        super().__init__()
        self.experts, self.on_device = experts, use_grouped_tensor
        empty = torch.empty(outputs, inputs, dtype=params_dtype, device=device)
        for expert in range(experts):
            self.register_parameter(f"weight{expert}", nn.Parameter(empty))

    def forward(self, x, splits):
        assert isinstance(splits, torch.Tensor) == self.on_device
        sizes = [int(size) for size in splits]
        parts = x[: sum(sizes)].split(sizes)
        weights = [getattr(self, f"weight{expert}") for expert in range(self.experts)]
        y = torch.cat([_Product.apply(*both) for both in zip(parts, weights, strict=True)])
        return F.pad(y, (0, 0, 0, x.shape[0] - y.shape[0]), value=float("nan"))


def stand_in(splits_on_device=False):
    """The module ``transformer_engine.pytorch``."""
    return SimpleNamespace(
        DType=SimpleNamespace(kFloat8E4M3="e4m3"),
        Float8BlockQuantizer=lambda dtype, **options: options,
        Float8BlockwiseQTensor=BlockTensor,
        Linear=StandInLinear,
        GroupedLinear=StandInGroupedLinear,
        autocast=lambda enabled, recipe: nullcontext(),
        module=SimpleNamespace(
            is_module_grouped_tensor_path_supported=lambda recipe, dtype: splits_on_device
        ),
        is_fp8_block_scaling_available=lambda return_reason: (True, ""),
    )
