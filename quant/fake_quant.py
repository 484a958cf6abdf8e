"""Fake quantisation for training: round in the forward pass, let gradients pass straight through.

Also the copy of a weight that is kept between microbatches, and the view of a parameter as its
stored dtype. The formats themselves are in ``quant/formats.py``.
"""

# Legend: R rows, C columns
from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from quant.formats import BlockFormat, fake_quant

T = TypeVar("T")
_SAMPLE = 4096  # elements compared before a kept copy is used again


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cast: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.dtype = x.dtype
        return cast(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def straight_through(x: Tensor, cast: Callable[[Tensor], Tensor]) -> Tensor:
    """``cast(x)``, whose gradient is taken to be the identity."""
    return _StraightThrough.apply(x, cast)


class WeightQuantiser:
    """Quantised values of one weight; with ``keep``, made once per change of the weight.

    A kept copy belongs to one tensor object at one value of its version counter, which every
    in-place update raises. Layouts that refill a parameter behind that counter (FSDP gathers) must
    not keep; a sample of the weight is compared on every use, so that one that does is found out.

    Args:
        fmt: format of the weight.
        keep: keep the copy until the weight changes.
    """

    def __init__(self, fmt: BlockFormat, keep: bool) -> None:
        self.fmt, self.keep = fmt, keep
        self._key: tuple[int, object] | None = None
        self._owner: weakref.ref[Tensor] | None = None
        self._copy: Any = None
        self._sample: Tensor | None = None

    def __call__(self, w: Tensor, dtype: torch.dtype) -> Tensor:
        """Values of ``w`` in the format, as ``dtype``.

        Raises:
            RuntimeError: the weight changed without its version counter.
        """
        return self.once(w, dtype, lambda: fake_quant(w, self.fmt, dtype))

    @torch.no_grad()
    def once(self, w: Tensor, kind: object, make: Callable[[], T]) -> T:
        """What ``make`` makes of ``w``; with ``keep``, the same until ``w`` changes.

        Args:
            w: the weight.
            kind: of the copy; another kind replaces it.
            make: quantises ``w``.

        Raises:
            RuntimeError: the weight changed without its version counter.
        """
        if not self.keep or w.is_inference():
            return make()
        key, sample = (w._version, kind), _sample(w)
        owner = self._owner() if self._owner is not None else None
        if owner is w and self._key == key and self._copy is not None:
            assert self._sample is not None
            if not torch.equal(sample, self._sample):
                raise RuntimeError(
                    "a weight changed behind its version counter while its quantised copy was"
                    " kept; use apply_quant(..., keep_weights=False) with this layout"
                )
            return self._copy
        self._copy = make()
        self._owner, self._key, self._sample = weakref.ref(w), key, sample.clone()
        return self._copy


def _sample(w: Tensor) -> Tensor:
    flat = w.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)]
