"""FP8 matmuls on tensor cores by NVIDIA Transformer Engine, for the same seams as the emulated op.

Its block-scaling recipe is the emulated one: E4M3 everywhere, inputs and gradients in blocks of
1x128, weights in 128x128, power-of-two scales that round up. Weights reach it in the compute dtype;
FP4 weights as their values, which its own cast keeps as they are (``quant/lossless.py``).

The package is imported when an op is made, and only here. It builds from source against CUDA, so
every way in which that import can fail ends in one message.
"""

# Legend: N rows sorted by expert, P rows once every expert is padded, I in, O out, E experts
from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from quant.errors import ConfigError
from quant.experts import padded_positions
from quant.fake_quant import straight_through
from quant.formats import MXFP4
from quant.linear import QuantOp, check_master

_INSTALL = (
    "quant.engine=transformer_engine needs NVIDIA Transformer Engine 2 and a GPU with FP8"
    " (compute capability 9.0 or above): install torch for CUDA, then"
    " `pip install --no-build-isolation 'transformer-engine[pytorch]>=2'`; without it use"
    " quant.engine=emulated"
)


def load() -> tuple[Any, Any]:
    """The package ``transformer_engine.pytorch`` and its FP8 block-scaling recipe.

    Raises:
        ValueError: not installed, broken, or no GPU for it; says what to install.
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
    if hasattr(te, "is_fp8_block_scaling_available"):  # 2.8 and later; else its first matmul raises
        available, reason = te.is_fp8_block_scaling_available(return_reason=True)
        if not available:
            raise ConfigError(f"{_INSTALL} (it says: {reason})")
    return te, recipe


def transformer_engine_op(op: QuantOp) -> Callable[..., Tensor]:
    """The op that runs on tensor cores what ``op`` emulates.

    Args:
        op: names the module, its weight format and the probe.

    Raises:
        ValueError: Transformer Engine cannot be used here.
    """
    te, recipe = load()
    return _GroupedOp(op, te, recipe) if op.grouped is not None else _LinearOp(op, te, recipe)


class TransformerEngineOp:
    """Calls a Transformer Engine module with our weight in place of its own."""

    def __init__(self, op: QuantOp, te: Any, recipe: Any) -> None:
        self.op, self.te, self.recipe = op, te, recipe
        self._modules: dict[tuple[int, ...], nn.Module] = {}

    def _weight(self, w: Tensor, dtype: torch.dtype) -> Tensor:
        check_master(self.op.name, w)
        self.op.probe.saw(self.op.name)
        self.op.probe.measure(self.op.part, w, self.op.weight.fmt, weight=True)
        if self.op.weight.fmt is MXFP4:
            w = straight_through(w, lambda master: self.op.quantised_weight(master, torch.float32))
        return w.to(dtype)

    def _fp8(self) -> AbstractContextManager[None]:
        if hasattr(self.te, "autocast"):  # 2.8 and later
            return self.te.autocast(enabled=True, recipe=self.recipe)
        return self.te.fp8_autocast(enabled=True, fp8_recipe=self.recipe)


class _LinearOp(TransformerEngineOp):
    def __call__(self, x: Tensor, w: Tensor) -> Tensor:
        shape = tuple(w.shape)
        if shape not in self._modules:
            self._modules[shape] = self.te.Linear(
                shape[1], shape[0], bias=False, params_dtype=x.dtype, device="meta"
            )
        weight = self._weight(w, x.dtype)
        with self._fp8():
            return functional_call(self._modules[shape], {"weight": weight}, (x.contiguous(),))


class _GroupedOp(TransformerEngineOp):
    """Experts: every expert's rows are padded to a multiple of 128, as FP8 matmuls want them."""

    def __call__(self, x_NI: Tensor, w_EOI: Tensor, offsets_E: Tensor) -> Tensor:
        shape = tuple(w_EOI.shape)
        experts, out_features, in_features = shape
        if shape not in self._modules:
            self._modules[shape] = self.te.GroupedLinear(
                experts, in_features, out_features, bias=False, params_dtype=x_NI.dtype,
                device="meta",
            )  # fmt: skip
        position_N, padded = padded_positions(offsets_E, x_NI.shape[0])
        counts = offsets_E.diff(prepend=offsets_E.new_zeros(1))
        splits = ((counts + 127) // 128 * 128).tolist()  # Transformer Engine wants them on the host
        x_PI = x_NI.new_zeros(padded, in_features).index_copy(0, position_N, x_NI)[: sum(splits)]
        weights = self._weight(w_EOI, x_NI.dtype).unbind(0)
        named = {f"weight{expert}": weight for expert, weight in enumerate(weights)}
        with self._fp8():
            y_PO = functional_call(self._modules[shape], named, (x_PI, splits))
        return y_PO[position_N]
