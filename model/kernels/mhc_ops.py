"""The operators ``torch.ops.v4.mhc_*``: one schema each, the implementation chosen by device.

Being torch operators they show up in profiles and dispatch modes and work on fake and meta tensors.
CPU tensors run ``cpu/mhc.cpp`` where a compiler exists; everything else runs ``mhc_torch.py``.
"""

# Legend: N tokens, S streams (a second S: destination), D hidden, C = S * D,
# M = (2 + S) * S mix channels
from __future__ import annotations

import torch
from torch import Tensor

from model.kernels import mhc_torch
from model.kernels.cpu_build import KernelLibrary, kernel_library

_LIBRARY = torch.library.Library("v4", "FRAGMENT")
SCHEMAS = {
    "mhc_pre": "(Tensor x, Tensor fn, Tensor base, Tensor scale, int iters, float eps,"
    " float rms_eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "mhc_pre_backward": "(Tensor x, Tensor fn, Tensor base, Tensor scale, int iters, float eps,"
    " Tensor mix, Tensor rms, Tensor grad_u, Tensor grad_new, Tensor grad_post, Tensor? grad_comb)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "mhc_merge": "(Tensor y, Tensor x, Tensor post, Tensor comb) -> Tensor",
    "mhc_merge_backward": "(Tensor grad, Tensor y, Tensor post) -> (Tensor, Tensor)",
    "mhc_head": "(Tensor x, Tensor fn, Tensor base, Tensor scale, float eps, float rms_eps)"
    " -> (Tensor, Tensor, Tensor)",
    "mhc_head_backward": "(Tensor x, Tensor fn, Tensor base, Tensor scale, float eps, Tensor mix,"
    " Tensor rms, Tensor grad_y) -> (Tensor, Tensor, Tensor, Tensor)",
}
# C arguments: p pointer, i int, l long, f float (see the exports of cpu/mhc.cpp)
_C_SIGNATURES = {
    "mhc_pre": "ppppiffllpppppi",
    "mhc_pre_backward": "ppppifllppppppppppi",
    "mhc_merge": "ppppllpi",
    "mhc_merge_backward": "pppllppi",
    "mhc_head": "ppppffllpppi",
    "mhc_head_backward": "ppppfllpppppppi",
}


def _compiled(streams: int) -> KernelLibrary | None:
    return kernel_library("mhc.cpp", _C_SIGNATURES, f"STREAMS={streams}")


def _pre(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, eps: float, rms_eps: float
) -> tuple[Tensor, ...]:
    library = _compiled(x.shape[1])
    if library is None:
        return mhc_torch.pre(x, fn, base, scale, iters, eps, rms_eps)
    out = _pre_like(x, fn, base, scale, iters, eps, rms_eps)
    size = (x.shape[0], x.shape[2])
    library.call("mhc_pre", x.dtype, x, fn, base, scale, iters, eps, rms_eps, *size, *out)
    return out


def _pre_like(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, eps: float, rms_eps: float
) -> tuple[Tensor, ...]:
    N, S, D = x.shape
    return (
        x.new_empty(N, D), fn.new_empty(N, S), fn.new_empty(N, S, S),
        fn.new_empty(N, fn.shape[0]), fn.new_empty(N),
    )  # fmt: skip


def _pre_backward(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, eps: float, mix: Tensor,
    rms: Tensor, grad_u: Tensor, grad_new: Tensor, grad_post: Tensor, grad_comb: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    library = _compiled(x.shape[1])
    if library is None:
        return mhc_torch.pre_backward(
            x, fn, base, scale, iters, eps, mix, rms, grad_u, grad_new, grad_post, grad_comb
        )
    out = _gradients_like(x, fn, base, scale)
    size = (x.shape[0], x.shape[2])
    grads = [g if g is None else g.contiguous() for g in (grad_u, grad_new, grad_post, grad_comb)]
    library.call(
        "mhc_pre_backward", x.dtype, x, fn, base, scale, iters, eps, *size, mix, rms, *grads, *out
    )
    return out


def _gradients_like(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *rest: object
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in (x, fn, base, scale))


def _merge(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    library = _compiled(x.shape[1])
    if library is None:
        return mhc_torch.merge(y, x, post, comb)
    new = torch.empty_like(x)
    library.call("mhc_merge", x.dtype, y, x, post, comb, x.shape[0], x.shape[2], new)
    return new


def _merge_backward(grad: Tensor, y: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
    library = _compiled(grad.shape[1])
    if library is None:
        return mhc_torch.merge_backward(grad, y, post)
    grad_y, grad_post = torch.empty_like(y), torch.empty_like(post)
    size = (grad.shape[0], grad.shape[2])
    library.call("mhc_merge_backward", y.dtype, grad, y, post, *size, grad_y, grad_post)
    return grad_y, grad_post


def _head(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, rms_eps: float
) -> tuple[Tensor, ...]:
    library = _compiled(x.shape[1])
    if library is None:
        return mhc_torch.head(x, fn, base, scale, eps, rms_eps)
    out = _head_like(x, fn, base, scale, eps, rms_eps)
    size = (x.shape[0], x.shape[2])
    library.call("mhc_head", x.dtype, x, fn, base, scale, eps, rms_eps, *size, *out)
    return out


def _head_like(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, rms_eps: float
) -> tuple[Tensor, ...]:
    N, S, D = x.shape
    return x.new_empty(N, D), fn.new_empty(N, S), fn.new_empty(N)


def _head_backward(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, mix: Tensor, rms: Tensor,
    grad_y: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    library = _compiled(x.shape[1])
    if library is None:
        return mhc_torch.head_backward(x, fn, base, scale, eps, mix, rms, grad_y)
    out = _gradients_like(x, fn, base, scale)
    size = (x.shape[0], x.shape[2])
    grad_y = grad_y.contiguous()
    library.call(
        "mhc_head_backward", x.dtype, x, fn, base, scale, eps, *size, mix, rms, grad_y, *out
    )
    return out


# op -> (CPU, elsewhere, shapes only)
_IMPLEMENTATIONS = {
    "mhc_pre": (_pre, mhc_torch.pre, _pre_like),
    "mhc_pre_backward": (_pre_backward, mhc_torch.pre_backward, _gradients_like),
    "mhc_merge": (_merge, mhc_torch.merge, lambda y, x, post, comb: torch.empty_like(x)),
    "mhc_merge_backward": (
        _merge_backward,
        mhc_torch.merge_backward,
        lambda grad, y, post: (torch.empty_like(y), torch.empty_like(post)),
    ),
    "mhc_head": (_head, mhc_torch.head, _head_like),
    "mhc_head_backward": (_head_backward, mhc_torch.head_backward, _gradients_like),
}
for _name, (_cpu, _elsewhere, _shapes) in _IMPLEMENTATIONS.items():
    _LIBRARY.define(_name + SCHEMAS[_name])
    _LIBRARY.impl(_name, _cpu, "CPU")
    _LIBRARY.impl(_name, _elsewhere, "CUDA")
    torch.library.register_fake(f"v4::{_name}", _shapes, lib=_LIBRARY)
OPS = torch.ops.v4
