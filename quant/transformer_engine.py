"""FP8 matmuls on tensor cores by NVIDIA Transformer Engine, for the same seams as the emulated op.

Its block-scaling recipe is the emulated one: E4M3 everywhere, inputs and gradients in blocks of
1x128, weights in 128x128, power-of-two scales that round up. A weight is handed over in FP8,
rounded from the fp32 master by ``quant/handover.py``; such a tensor is taken as it is.

The package is imported when an op is made, and only here. It builds from source against CUDA, so
every way in which that import can fail ends in one message.
"""

# Legend: N rows sorted by expert, P rows once every expert is padded, I in, O out, E experts
from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quant.errors import ConfigError
from quant.experts import padded_positions
from quant.fake_quant import straight_through
from quant.formats import FP8_WEIGHT
from quant.handover import Fp8Matrices, fp8_matrices
from quant.linear import QuantOp, check_master

_INSTALL = (
    "quant.engine=transformer_engine needs NVIDIA Transformer Engine 2.17 and a GPU with FP8"
    " (compute capability 9.0 or above): install torch for CUDA, then"
    " `pip install --no-build-isolation 'transformer-engine[pytorch]>=2.17'`; without it use"
    " quant.engine=emulated"
)
# With these a weight can be handed over in FP8; all are there since 2.17.
_NEEDED = (
    "DType", "Float8BlockQuantizer", "Float8BlockwiseQTensor", "GroupedLinear", "Linear",
    "autocast", "is_fp8_block_scaling_available",
)  # fmt: skip


def load() -> tuple[Any, Any]:
    """The package ``transformer_engine.pytorch`` and its FP8 block-scaling recipe.

    Raises:
        ValueError: not installed, too old, broken, or no GPU for it; says what to install.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        found = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
        raise ConfigError(f"{_INSTALL} (found {found})")
    try:  # the import runs CUDA libraries: it may raise anything
        te = importlib.import_module("transformer_engine.pytorch")
        recipe = importlib.import_module("transformer_engine.common.recipe").Float8BlockScaling()
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{_INSTALL} (import failed: {reason})") from error
    lacking = [name for name in _NEEDED if not hasattr(te, name)]
    if lacking:
        version = getattr(te, "__version__", "of unknown version")
        raise ConfigError(f"{_INSTALL} (found {version}, which lacks {', '.join(lacking)})")
    available, reason = te.is_fp8_block_scaling_available(return_reason=True)
    if not available:
        raise ConfigError(f"{_INSTALL} (it says: {reason})")
    return te, recipe


def transformer_engine_op(op: QuantOp) -> Callable[..., Tensor]:
    """The op that runs on tensor cores what ``op`` emulates.

    Args:
        op: names the module, its weight format and the probe.

    Raises:
        ValueError: Transformer Engine cannot be used here, or not for this module.
    """
    te, recipe = load()
    if op.owner is not None:
        rows = op.owner.out_features // op.owner.groups
        if rows % FP8_WEIGHT.rows:
            raise ConfigError(
                f"quant.engine=transformer_engine: a group of {op.name} has {rows} rows, no"
                f" multiple of {FP8_WEIGHT.rows}, so its FP8 blocks are not those of the stored"
                " weight; use quant.engine=emulated"
            )
    return _GroupedOp(op, te, recipe) if op.grouped is not None else _LinearOp(op, te, recipe)


class TransformerEngineOp:
    """Calls a Transformer Engine module with our FP8 weight in place of its own."""

    def __init__(self, op: QuantOp, te: Any, recipe: Any) -> None:
        self.op, self.te, self.recipe = op, te, recipe
        self._modules: dict[tuple[int, ...], nn.Module] = {}

    def _weights(self, w: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """``w``'s matrices as FP8 tensors that pass for ``dtype``; gradients go to the master."""
        check_master(self.op.name, w)
        self.op.probe.saw(self.op.name)
        self.op.probe.measure(self.op.part, w, self.op.weight.fmt, weight=self.op.name)
        out_features, in_features = w.shape[-2:]
        whole, first = (w, 0) if self.op.owner is None else _within(self.op.owner.weight, w)
        matrices = self.op.weight.once(
            whole,
            Fp8Matrices,
            lambda: fp8_matrices(
                whole.detach().reshape(-1, out_features, in_features), self.op.weight.fmt
            ),
        )
        masters = w.unbind(0) if w.dim() == 3 else (w,)
        return [
            straight_through(master, lambda _, at=first + i: self._tensor(matrices, at, dtype))
            for i, master in enumerate(masters)
        ]

    def _tensor(self, matrices: Fp8Matrices, at: int, dtype: torch.dtype) -> Tensor:
        """A new wrapper of the kept bytes: autograd and Transformer Engine write to wrappers."""
        rows, row_scales, columns, column_scales = (part[at] for part in matrices)
        e4m3 = self.te.DType.kFloat8E4M3
        return self.te.Float8BlockwiseQTensor(
            shape=rows.shape,
            dtype=dtype,
            rowwise_data=rows,
            rowwise_scale_inv=row_scales,
            columnwise_data=columns,
            columnwise_scale_inv=column_scales,
            fp8_dtype=e4m3,
            quantizer=self.te.Float8BlockQuantizer(
                e4m3, rowwise=True, columnwise=True, block_scaling_dim=2
            ),
            is_2D_scaled=True,
            device=rows.device,
        )


def _within(whole: Tensor, part: Tensor) -> tuple[Tensor, int]:
    """``whole``, and which of its equal slices along the rows ``part`` is."""
    first_row = int(part.storage_offset() - whole.storage_offset()) // int(whole.stride(0))
    return whole, first_row // part.shape[0]


class _LinearOp(TransformerEngineOp):
    def __call__(self, x: Tensor, w: Tensor) -> Tensor:
        shape = tuple(w.shape)
        if shape not in self._modules:
            self._modules[shape] = self.te.Linear(
                shape[1], shape[0], bias=False, params_dtype=x.dtype, device="meta"
            )
        (weight,) = self._weights(w, x.dtype)
        with self.te.autocast(enabled=True, recipe=self.recipe):
            return functional_call(self._modules[shape], {"weight": weight}, (x.contiguous(),))


class _GroupedOp(TransformerEngineOp):
    """Experts: every expert's rows are padded to a multiple of 128, as FP8 matmuls want them."""

    def __call__(self, x_NI: Tensor, w_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        shape = tuple(w_EOI.shape)
        experts, out_features, in_features = shape
        on_device = self._splits_on_device(x_NI.dtype)
        if shape not in self._modules:
            self._modules[shape] = self.te.GroupedLinear(
                experts, in_features, out_features, bias=False, params_dtype=x_NI.dtype,
                device="meta", **({"use_grouped_tensor": True} if on_device else {}),
            )  # fmt: skip
        position_N, padded = padded_positions(offsets_E, x_NI.shape[0])
        counts = offsets_E.diff(prepend=offsets_E.new_zeros(1))
        splits: Any = ((counts + 127) // 128 * 128).long()
        x_PI = x_NI.new_zeros(padded, in_features).index_copy(0, position_N, x_NI)
        if not on_device:
            splits = splits.tolist()
            x_PI = x_PI[: sum(splits)]
        weights = self._weights(w_EOI, x_NI.dtype)
        named = {f"weight{expert}": weight for expert, weight in enumerate(weights)}
        with self.te.autocast(enabled=True, recipe=self.recipe):
            y_PO = functional_call(self._modules[shape], named, (x_PI, splits))
        return y_PO[position_N]

    def _splits_on_device(self, dtype: torch.dtype) -> bool:
        """Whether this version, GPU and cuBLAS multiply experts whose row counts stay on the GPU.

        2.17 and 2.18 do so by an environment variable only, on any cuBLAS; later ones say for
        which recipe, GPU and cuBLAS it is right (FP8 blocks: Hopper with cuBLAS 13.6).
        """
        module = getattr(self.te, "module", None)
        supported = getattr(module, "is_module_grouped_tensor_path_supported", None)
        return supported is not None and bool(supported(self.recipe, dtype))
