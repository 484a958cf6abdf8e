"""mHC with analytic gradients in plain torch ops: the fast path where no compiled kernel fits.

The same maths as ``mhc.py`` and the same calls as the CPU kernels. Compared with autograd over the
reference it keeps only the streams, the mix channels and the RMS factors, recomputes Sinkhorn in
the backward pass, and runs it on [channel, token] planes, whose row and column sums are plain adds.
"""

# Legend: N tokens, S streams (a second S: destination), D hidden, C = S * D,
# M = (2 + S) * S mix channels (head: S)
from __future__ import annotations

import torch
from torch import Tensor


def pre(
    x_NSD: Tensor,
    fn_MC: Tensor,
    base_M: Tensor,
    scale_3: Tensor,
    iters: int,
    eps: float,
    rms_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``(u_ND, post_NS, comb_NSS, mix_NM, rms_N)``; the last two for the backward pass."""
    S = x_NSD.shape[1]
    flat_NC, mix_NM, rms_N = _mix(x_NSD, fn_MC, rms_eps)
    logits_MN = _logits(mix_NM, base_M, scale_3, S)
    pre_SN = torch.sigmoid(logits_MN[:S]) + eps
    post_SN = 2.0 * torch.sigmoid(logits_MN[S : 2 * S])
    comb_SSN, _ = _sinkhorn(logits_MN[2 * S :].unflatten(0, (S, S)), iters, eps)
    u_ND = _collapse(pre_SN, flat_NC.view(x_NSD.shape)).to(x_NSD.dtype)
    return u_ND, post_SN.T.contiguous(), comb_SSN.permute(2, 0, 1).contiguous(), mix_NM, rms_N


def pre_backward(
    x_NSD: Tensor,
    fn_MC: Tensor,
    base_M: Tensor,
    scale_3: Tensor,
    iters: int,
    eps: float,
    mix_NM: Tensor,
    rms_N: Tensor,
    grad_u_ND: Tensor,
    grad_new_NSD: Tensor,
    grad_post_NS: Tensor,
    grad_comb_NSS: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, fn, base and scale.

    Args:
        x_NSD: streams; fn, base, scale, iters and eps as in the forward pass.
        fn_MC: see x.
        base_M: see x.
        scale_3: see x.
        iters: see x.
        eps: see x.
        mix_NM: from the forward pass.
        rms_N: from the forward pass.
        grad_u_ND: gradient of the sublayer's input.
        grad_new_NSD: gradient of the merged streams; comb^T x is differentiated here.
        grad_post_NS: gradient of post, from the merge.
        grad_comb_NSS: further gradient of comb, or None.
    """
    S = x_NSD.shape[1]
    x32_NSD, du_ND, new_NSD = x_NSD.float(), grad_u_ND.float(), grad_new_NSD.float()
    logits_MN = _logits(mix_NM, base_M, scale_3, S)
    gate_MN = torch.sigmoid(logits_MN[: 2 * S])
    comb_SSN, tape = _sinkhorn(logits_MN[2 * S :].unflatten(0, (S, S)), iters, eps)
    grad_comb = torch.einsum("njd,nkd->njk", x32_NSD, new_NSD)
    if grad_comb_NSS is not None:
        grad_comb = grad_comb + grad_comb_NSS
    grad_pre_SN = torch.einsum("nd,nsd->sn", du_ND, x32_NSD)
    grad_gates_MN = torch.cat((grad_pre_SN, 2.0 * grad_post_NS.T))
    grad_gates_MN = grad_gates_MN * gate_MN * (1.0 - gate_MN)
    grad_logits_SSN = _sinkhorn_backward(grad_comb.permute(1, 2, 0), tape)
    grad_logits_MN = torch.cat((grad_gates_MN, grad_logits_SSN.flatten(0, 1)))
    pre_NS1 = (gate_MN[:S] + eps).T[..., None]
    grad_x = pre_NS1 * du_ND[:, None] + comb_SSN.permute(2, 0, 1) @ new_NSD
    sections = (S, S, S * S)
    return _projection_backward(
        grad_x, x32_NSD, x_NSD.dtype, fn_MC, scale_3, mix_NM, rms_N, grad_logits_MN, sections
    )


def merge(y_ND: Tensor, x_NSD: Tensor, post_NS: Tensor, comb_NSS: Tensor) -> Tensor:
    """Return ``post (x) y + comb^T x`` in the dtype of x."""
    new_NSD = torch.baddbmm(
        post_NS[..., None] * y_ND[:, None], comb_NSS.transpose(1, 2), x_NSD.float()
    )
    return new_NSD.to(x_NSD.dtype)


def merge_backward(grad_NSD: Tensor, y_ND: Tensor, post_NS: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of y and post."""
    grad32_NSD = grad_NSD.float()
    grad_y_ND = torch.einsum("nsd,ns->nd", grad32_NSD, post_NS).to(y_ND.dtype)
    return grad_y_ND, torch.einsum("nsd,nd->ns", grad32_NSD, y_ND.float())


def head(
    x_NSD: Tensor, fn_SC: Tensor, base_S: Tensor, scale_1: Tensor, eps: float, rms_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(y_ND, mix_NS, rms_N)``."""
    flat_NC, mix_NS, rms_N = _mix(x_NSD, fn_SC, rms_eps)
    pre_SN = torch.sigmoid(_logits(mix_NS, base_S, scale_1, x_NSD.shape[1])) + eps
    return _collapse(pre_SN, flat_NC.view(x_NSD.shape)).to(x_NSD.dtype), mix_NS, rms_N


def head_backward(
    x_NSD: Tensor,
    fn_SC: Tensor,
    base_S: Tensor,
    scale_1: Tensor,
    eps: float,
    mix_NS: Tensor,
    rms_N: Tensor,
    grad_y_ND: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, fn, base and scale."""
    x32_NSD, dy_ND = x_NSD.float(), grad_y_ND.float()
    gate_SN = torch.sigmoid(_logits(mix_NS, base_S, scale_1, x_NSD.shape[1]))
    grad_pre_SN = torch.einsum("nd,nsd->sn", dy_ND, x32_NSD)
    grad_logits_SN = grad_pre_SN * gate_SN * (1.0 - gate_SN)
    grad_x = (gate_SN + eps).T[..., None] * dy_ND[:, None]
    sections = (x_NSD.shape[1],)
    return _projection_backward(
        grad_x, x32_NSD, x_NSD.dtype, fn_SC, scale_1, mix_NS, rms_N, grad_logits_SN, sections
    )


def _mix(x_NSD: Tensor, fn_MC: Tensor, rms_eps: float) -> tuple[Tensor, Tensor, Tensor]:
    flat_NC = x_NSD.float().flatten(1)
    rms_N = torch.rsqrt(torch.linalg.vecdot(flat_NC, flat_NC) / flat_NC.shape[1] + rms_eps)
    return flat_NC, (flat_NC @ fn_MC.T) * rms_N[:, None], rms_N


def _collapse(pre_SN: Tensor, x_NSD: Tensor) -> Tensor:
    return torch.einsum("sn,nsd->nd", pre_SN, x_NSD)


def _logits(mix_NM: Tensor, base_M: Tensor, scale: Tensor, S: int) -> Tensor:
    """[channel, token] planes of ``scale * mix + base``."""
    if scale.shape[0] == 1:
        return torch.addcmul(base_M[:, None], scale, mix_NM.T)
    sizes = (S, S, S * S)
    scale_M1 = torch.cat([s.expand(n) for s, n in zip(scale, sizes, strict=True)])[:, None]
    return torch.addcmul(base_M[:, None], scale_M1, mix_NM.T)


def _sinkhorn(logits_SSN: Tensor, iters: int, eps: float) -> tuple[Tensor, list[Tensor]]:
    """Sinkhorn over planes; the tape: the softmax, then output and 1 / divisor of each step."""
    soft_SSN = logits_SSN.softmax(1)
    comb_SSN, tape = soft_SSN + eps, [soft_SSN]
    for half in range(2 * iters):
        if half == 0:  # the first row step is the softmax
            continue
        inverse = (comb_SSN.sum(1 - half % 2, keepdim=True) + eps).reciprocal_()
        comb_SSN = comb_SSN * inverse
        tape += [comb_SSN, inverse]
    return comb_SSN, tape


def _sinkhorn_backward(grad_SSN: Tensor, tape: list[Tensor]) -> Tensor:
    half = (len(tape) - 1) // 2
    while half:
        comb_SSN, inverse = tape[2 * half - 1], tape[2 * half]
        dot = (grad_SSN * comb_SSN).sum(1 - half % 2, keepdim=True)
        grad_SSN = (grad_SSN - dot) * inverse
        half -= 1
    soft_SSN = tape[0]
    return (grad_SSN - (grad_SSN * soft_SSN).sum(1, keepdim=True)) * soft_SSN


def _projection_backward(
    grad_x_NSD: Tensor,
    x_NSD: Tensor,
    dtype: torch.dtype,
    fn_MC: Tensor,
    scale: Tensor,
    mix_NM: Tensor,
    rms_N: Tensor,
    grad_logits_MN: Tensor,
    sections: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Through logits = scale * mix + base and mix = rms * (x fn^T), added to ``grad_x``."""
    by_scale_M = torch.linalg.vecdot(grad_logits_MN, mix_NM.T)
    grad_scale = torch.stack([part.sum() for part in by_scale_M.split(sections)])
    parts = zip(grad_logits_MN.split(sections), scale, strict=True)
    grad_mix_NM = torch.cat([part * factor for part, factor in parts]).T
    shrink_N = (grad_mix_NM * mix_NM).sum(1) * rms_N.square() / fn_MC.shape[1]
    grad_raw_NM = grad_mix_NM * rms_N[:, None]
    grad_x_NC = torch.addmm(grad_x_NSD.flatten(1), grad_raw_NM, fn_MC)
    grad_x_NC = torch.addcmul(grad_x_NC, shrink_N[:, None], x_NSD.flatten(1), value=-1.0)
    grad_fn_MC = grad_raw_NM.T @ x_NSD.flatten(1)
    grad_base = grad_logits_MN.sum(1)
    return grad_x_NC.view(x_NSD.shape).to(dtype), grad_fn_MC, grad_base, grad_scale
