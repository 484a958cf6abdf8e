"""Residual streams: manifold-constrained hyper-connections, their head, the plain twin.

A block holds one connection per sublayer and uses both kinds alike::

    u_BTD, *mix = connection(x_BTSD)
    x_BTSD = connection.merge(sublayer(norm(u_BTD)), x_BTSD, *mix)

The arithmetic (reference B.2) lives in ``model/kernels/mhc.py`` (plain) and beside it (fast). All
parameters are fp32 masters, created uninitialised: ``model/init.py`` fills them.
"""

# Legend: B batch, T tokens, S streams (a second S: destination), D hidden, C = S * D,
# M = (2 + S) * S mix channels
from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.kernels.mhc import StreamMix
from model.kernels.select import select


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

    def forward(self, x_BTSD: Tensor) -> tuple[Tensor, StreamMix]:
        """Return ``(u_BTD, mix)``; u is in the dtype of x, not yet normalised."""
        fn_MC = _fold(self.fn, self.gamma)
        return self.pre_op(x_BTSD, fn_MC, self.base, self.scale, self.iters, self.eps, self.rms_eps)

    def merge(self, y_BTD: Tensor, x_BTSD: Tensor, mix: StreamMix) -> Tensor:
        """Return ``post (x) y + comb^T x`` in the dtype of x.

        Args:
            y_BTD: the sublayer's output.
            x_BTSD: what was given to :meth:`forward`; ``mix`` holds it too, and in the fast path
                with the gradient of both uses.
            mix: from :meth:`forward`.
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

    def forward(self, x_BTSD: Tensor) -> tuple[Tensor]:
        """Return the stream itself and no mix."""
        return (x_BTSD.squeeze(-2),)

    def merge(self, y_BTD: Tensor, x_BTSD: Tensor) -> Tensor:
        """Return ``x + y``."""
        return x_BTSD + y_BTD.unsqueeze(-2)


class PlainHead(nn.Module):
    """The ablation twin of HyperHead: the only stream."""

    def forward(self, x_BTSD: Tensor) -> Tensor:
        """Return ``x[..., 0, :]``."""
        return x_BTSD.squeeze(-2)


def _fold(fn_MC: Tensor, gamma_C: Tensor | None) -> Tensor:
    return fn_MC if gamma_C is None else fn_MC * gamma_C
