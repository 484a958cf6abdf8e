"""Manifold-constrained hyper-connections in plain PyTorch: the reference (reference B.2).

The streams may be of any dtype; everything inside runs in the dtype of ``fn`` (fp32 in training,
float64 in tests) and is cast once at the end. Order matters and is spelled out: the RMS factor is
applied after the matmul, ``pre`` carries an eps and ``post`` none, Sinkhorn starts with a softmax
over the destinations and ends with a column step, and streams are mixed by the transpose (source j,
destination k).
"""

# Legend: B batch, T tokens, S streams (a second S: destination), D hidden, C = S * D,
# M = (2 + S) * S mix channels
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class StreamMix(NamedTuple):
    """What writes a sublayer's output back: the streams as they were read, and the weights."""

    x_BTSD: Tensor
    post_BTS: Tensor
    comb_BTSS: Tensor


def sinkhorn(logits_SS: Tensor, iters: int, eps: float) -> Tensor:
    """Bring each matrix near the doubly stochastic ones (DeepSeek-V4 section 2.2, step 5).

    Args:
        logits_SS: [..., source, destination].
        iters: number of row steps (the first is the softmax), each followed by a column step.
        eps: added after the softmax and to every divisor.

    Returns:
        Same shape; the weights of each destination sum to 1 over the sources, up to eps.
    """
    comb_SS = logits_SS.softmax(-1) + eps
    comb_SS = comb_SS / (comb_SS.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb_SS = comb_SS / (comb_SS.sum(-1, keepdim=True) + eps)
        comb_SS = comb_SS / (comb_SS.sum(-2, keepdim=True) + eps)
    return comb_SS


def rms_projection(x_BTSD: Tensor, fn_MC: Tensor, rms_eps: float) -> Tensor:
    """Project a token's streams, flattened stream by stream; divide by their RMS afterwards."""
    flat_BTC = x_BTSD.flatten(-2).to(fn_MC.dtype)
    rms_BT = torch.rsqrt(flat_BTC.square().mean(-1, keepdim=True) + rms_eps)
    return (flat_BTC @ fn_MC.T) * rms_BT


def mhc_pre(
    x_BTSD: Tensor,
    fn_MC: Tensor,
    base_M: Tensor,
    scale_3: Tensor,
    iters: int,
    eps: float,
    rms_eps: float,
) -> tuple[Tensor, StreamMix]:
    """Read a sublayer's input from the streams, and the weights that write it back (steps 1-6).

    Args:
        x_BTSD: streams.
        fn_MC: projection [(2 + S) * S, S * D] with gamma multiplied in; rows are pre, post, comb
            (source, destination) row-major.
        base_M: bias of each mix channel.
        scale_3: gating factors of pre, post and comb.
        iters: Sinkhorn iterations.
        eps: of pre and of Sinkhorn.
        rms_eps: inside the root of the RMS.

    Returns:
        ``(u_BTD, mix)``: u in the dtype of x, the weights of the mix in that of fn.
    """
    S = x_BTSD.shape[-2]
    mix_BTM = rms_projection(x_BTSD, fn_MC, rms_eps)
    pre_BTS = torch.sigmoid(scale_3[0] * mix_BTM[..., :S] + base_M[:S]) + eps
    post_BTS = 2.0 * torch.sigmoid(scale_3[1] * mix_BTM[..., S : 2 * S] + base_M[S : 2 * S])
    logits_BTSS = (scale_3[2] * mix_BTM[..., 2 * S :] + base_M[2 * S :]).unflatten(-1, (S, S))
    u_BTD = (pre_BTS.unsqueeze(-1) * x_BTSD).sum(-2).to(x_BTSD.dtype)
    return u_BTD, StreamMix(x_BTSD, post_BTS, sinkhorn(logits_BTSS, iters, eps))


def mhc_merge(y_BTD: Tensor, mix: StreamMix) -> Tensor:
    """Write a sublayer's output into the mixed streams (step 7).

    Returns:
        ``post (x) y + comb^T x`` in the dtype of x.
    """
    x_BTSD, post_BTS, comb_BTSS = mix
    mixed_BTSD = comb_BTSS.transpose(-1, -2) @ x_BTSD.to(comb_BTSS.dtype)
    return (post_BTS.unsqueeze(-1) * y_BTD.unsqueeze(-2) + mixed_BTSD).to(x_BTSD.dtype)


def mhc_merge_pre(
    y_BTD: Tensor,
    mix: StreamMix,
    fn_MC: Tensor,
    base_M: Tensor,
    scale_3: Tensor,
    iters: int,
    eps: float,
    rms_eps: float,
) -> tuple[Tensor, StreamMix]:
    """Write one sublayer's output and read the next one's input, by the next one's parameters.

    Returns:
        As :func:`mhc_pre` of what :func:`mhc_merge` returns.
    """
    return mhc_pre(mhc_merge(y_BTD, mix), fn_MC, base_M, scale_3, iters, eps, rms_eps)


def mhc_head(
    x_BTSD: Tensor, fn_SC: Tensor, base_S: Tensor, scale_1: Tensor, eps: float, rms_eps: float
) -> Tensor:
    """Collapse the streams into one before the final norm; [..., D] in the dtype of x."""
    pre_BTS = torch.sigmoid(scale_1 * rms_projection(x_BTSD, fn_SC, rms_eps) + base_S) + eps
    return (pre_BTS.unsqueeze(-1) * x_BTSD).sum(-2).to(x_BTSD.dtype)
