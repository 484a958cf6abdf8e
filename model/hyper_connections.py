"""Residual streams: manifold-constrained hyper-connections, their head, the plain twin.

A block holds one connection per sublayer and uses both kinds alike::

    u_BTD, mix = first(x_BTSD)
    u_BTD, mix = second(first.write(sublayer(norm(u_BTD)), mix))
    x_BTSD = second.merge(other_sublayer(norm(u_BTD)), mix)

What the first writes the second forms while it reads it: with Triton one pass over the streams.

The arithmetic (reference B.2) lives in ``model/kernels/mhc.py`` (plain) and beside it (fast). All
parameters are fp32 masters, created uninitialised: ``model/init.py`` fills them.
"""

# Legend: B batch, T tokens, S streams (a second S: destination), D hidden, C = S * D,
# M = (2 + S) * S mix channels
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.kernels.mhc import StreamMix
from model.kernels.select import select


class Written(NamedTuple):
    """Streams that are still to be formed: what a sublayer wrote, and into what."""

    y_BTD: Tensor
    mix: StreamMix


class HyperConnection(nn.Module):
    """Reads a sublayer's input from the streams, writes its output back (DeepSeek-V4 section 2.2).

    Attributes:
        fn: [(2 + S) * S, S * D] projection; rows: S pre, S post, then comb [source, destination].
        base: [(2 + S) * S] bias of each row.
        scale: [3] gating factors of pre, post and comb.
        gamma: [S * D] RMSNorm weight of the projection (``hc_gamma``; folded on export) or None.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        streams, channels = config.hc_mult, config.hc_mult * config.hidden_size
        self.iters = config.hc_sinkhorn_iters
        self.eps, self.rms_eps = config.hc_eps, config.rms_norm_eps
        self.fn = nn.Parameter(torch.empty((2 + streams) * streams, channels))
        self.base = nn.Parameter(torch.empty((2 + streams) * streams))
        self.scale = nn.Parameter(torch.empty(3))
        self.gamma = nn.Parameter(torch.empty(channels)) if config.hc_gamma else None
        self.pre_op = select("mhc_pre", config.kernels)
        self.merge_op = select("mhc_merge", config.kernels)
        self.merge_pre_op = select("mhc_merge_pre", config.kernels)

    def forward(self, streams: Tensor | Written) -> tuple[Tensor, StreamMix]:
        """Return ``(u_BTD, mix)``; u is in the dtype of x, not yet normalised.

        Args:
            streams: [B, T, S, D], or what the sublayer before wrote.
        """
        own = (_fold(self.fn, self.gamma), self.base, self.scale, self.iters, self.eps)
        if isinstance(streams, Written):
            return self.merge_pre_op(*streams, *own, self.rms_eps)
        return self.pre_op(streams, *own, self.rms_eps)

    def write(self, y_BTD: Tensor, mix: StreamMix) -> Written:
        """What :meth:`merge` would return, for the next connection to form."""
        return Written(y_BTD, mix)

    def merge(self, y_BTD: Tensor, mix: StreamMix) -> Tensor:
        """Return ``post (x) y + comb^T x`` in the dtype of x.

        Args:
            y_BTD: the sublayer's output.
            mix: from :meth:`forward`; it holds the streams that were read, in the fast path with
                the gradient of both uses.
        """
        return self.merge_op(y_BTD, mix)


class HyperHead(nn.Module):
    """Collapses the streams into one before the final norm (and before the norm of a MTP block).

    Attributes:
        fn: [S, S * D]; base: [S]; scale: [1]; gamma: [S * D] or None.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        streams, channels = config.hc_mult, config.hc_mult * config.hidden_size
        self.eps, self.rms_eps = config.hc_eps, config.rms_norm_eps
        self.fn = nn.Parameter(torch.empty(streams, channels))
        self.base = nn.Parameter(torch.empty(streams))
        self.scale = nn.Parameter(torch.empty(1))
        self.gamma = nn.Parameter(torch.empty(channels)) if config.hc_gamma else None
        self.head_op = select("mhc_head", config.kernels)

    def forward(self, x_BTSD: Tensor) -> Tensor:
        """Return the weighted sum of the streams [B, T, D], in the dtype of x."""
        fn_SC = _fold(self.fn, self.gamma)
        return self.head_op(x_BTSD, fn_SC, self.base, self.scale, self.eps, self.rms_eps)


class PlainResidual(nn.Module):
    """The ablation twin: one stream, ``x + sublayer(x)``; no parameters, same interface."""

    def forward(self, x_BTSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stream itself, and the streams in place of a mix."""
        return x_BTSD.squeeze(-2), x_BTSD

    def merge(self, y_BTD: Tensor, mix: Tensor) -> Tensor:
        """Return ``x + y``."""
        return mix + y_BTD.unsqueeze(-2)

    write = merge


class PlainHead(nn.Module):
    """The ablation twin of HyperHead: the only stream."""

    def forward(self, x_BTSD: Tensor) -> Tensor:
        """Return ``x[..., 0, :]``."""
        return x_BTSD.squeeze(-2)


def _fold(fn_MC: Tensor, gamma_C: Tensor | None) -> Tensor:
    return fn_MC if gamma_C is None else fn_MC * gamma_C
