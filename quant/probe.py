"""What quantisation did in a step: which casts ran, and how much they lost.

The trainer makes one :class:`QuantProbe`, hands it to ``apply_quant`` and reads it after a step.
An audit can then hold what ran against what was asked for. Nothing here changes a number of the
model, and nothing is kept outside the probe.
"""

# Legend: R rows, C columns, r, c blocks along them
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from quant.formats import MXFP4, BlockFormat, fake_quant_with_scales, scale_value
from quant.lossless import LOSSLESS_LOG2, scale_spread


class QuantProbe:
    """Evidence and measurements of one step.

    Attributes:
        monitors: measure errors too; costs about one more cast per tensor.
        ran: calls of every quantising op, by the name of its module. Recomputation counts again.
    """

    def __init__(self) -> None:
        self.monitors = False
        self.ran: Counter[str] = Counter()
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}

    def begin_step(self, monitors: bool = False) -> None:
        """Forget the last step.

        Args:
            monitors: whether this step is measured.
        """
        self.monitors = monitors
        self.ran.clear()
        self._sums.clear()
        self._weights.clear()

    def silent(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that did not run since the step began."""
        return [name for name in names if not self.ran[name]]

    def metrics(self) -> dict[str, Tensor]:
        """Measurements by part, as ``<name>.sum`` and ``<name>.count``; the value is sum / count.

        ``quant_error``: squared error over squared norm. ``quant_zeroed``: share of non-zero values
        that became zero. ``quant_saturated``: share of values at the largest element (the scale
        rule lets none go beyond). ``quant_scale_log2``: mean over 128x128 blocks of the log2 ratio
        of the largest to the smallest FP4 group scale. ``quant_lossy``: share of those blocks
        beyond the bound up to which FP4 is exact in FP8.
        """
        return dict(self._sums)

    def weight_errors(self) -> dict[str, Tensor]:
        """Squared error and norm of each weight, as ``<module>.sum`` and ``<module>.count``."""
        return dict(self._weights)

    def saw(self, name: str) -> None:
        """Note that the cast of module ``name`` ran."""
        self.ran[name] += 1

    @torch.no_grad()
    def measure(self, part: str, x: Tensor, fmt: BlockFormat, weight: str = "") -> None:
        """In measured steps, note what a cast does to ``x``.

        Args:
            part: part of the config that asked for the cast.
            x: what is cast.
            fmt: its format.
            weight: of which module ``x`` is the weight, a matrix whose FP4 groups have to fit in
                FP8 blocks; empty: it is none.
        """
        if not self.monitors or x.numel() == 0:
            return
        x_q, scale_bytes = fake_quant_with_scales(x, fmt, torch.float32)
        x = x.float()
        lost, held = (x_q - x).square().sum(), x.square().sum()
        self._add(f"quant_error_{part}", lost, held)
        if weight:
            _add(self._weights, weight, lost, held)
        self._add(f"quant_zeroed_{part}", ((x_q == 0) & (x != 0)).sum(), x.numel())
        top = _per_element(scale_value(scale_bytes) * fmt.largest, x.shape, fmt)
        self._add(f"quant_saturated_{part}", (x_q.abs() == top).sum(), x.numel())
        if weight and fmt is MXFP4:
            spread = scale_spread(scale_bytes)
            self._add(f"quant_scale_log2_{part}", spread.sum(), spread.numel())
            self._add(f"quant_lossy_{part}", (spread > LOSSLESS_LOG2).sum(), spread.numel())

    def _add(self, name: str, value: Tensor, count: Tensor | int) -> None:
        _add(self._sums, name, value, count)


def _add(sums: dict[str, Tensor], name: str, value: Tensor, count: Tensor | int) -> None:
    for key, term in ((f"{name}.sum", value), (f"{name}.count", count)):
        amount = torch.as_tensor(term, dtype=torch.float32, device=value.device)
        sums[key] = sums[key] + amount if key in sums else amount


def _per_element(blocks: Tensor, shape: torch.Size, fmt: BlockFormat) -> Tensor:
    """Repeat one value per block over the elements of a tensor of ``shape``."""
    wide = blocks.repeat_interleave(fmt.cols, dim=-1)[..., : shape[-1]]
    return wide.repeat_interleave(fmt.rows, dim=-2)[..., : shape[-2], :] if fmt.rows > 1 else wide
