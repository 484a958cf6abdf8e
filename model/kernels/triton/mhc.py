"""Hyper-connections in Triton (reference B.2; ``model/kernels/mhc.py``), any number of streams.

Forward: ``mhc_mix`` projects the streams (channels in parts, summed in order by the next kernel),
``mhc_coefficients`` makes pre, post and the Sinkhorn matrix of a token in registers and collapses
its streams, ``mhc_merge`` reads and writes them. Backward: ``mhc_products`` takes the
inner products of streams and gradients, ``mhc_coefficients_backward`` goes back through Sinkhorn
with the divisors of its steps, ``mhc_streams_backward`` reads the streams once more for their own
gradient and that of the projection. The head is the same without post and comb (``HEAD``).

``mhc_merge_pre`` is a merge and the pre of the next sublayer: ``mhc_merge_mix`` writes the streams
and projects them while it holds them, and the way back forms the gradients of what was written
while it holds that of the streams: each way reads all streams once less.

Tensor cores form the products from parts of fp32 numbers, which keeps fp32's accuracy. The kernels
are in ``mhc_kernels.py``.
"""

# Legend: N tokens, S streams (SP: rounded up to a power of two), D hidden, C = S * D,
# M mix channels: pre S, post S, comb S * S; of the head pre alone (MP: rounded up)
from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels import mhc_fast
from model.kernels.mhc import StreamMix
from model.kernels.mhc_ops import SCHEMAS
from model.kernels.triton.launch import (
    INTERPRETER,
    OPS,
    Shipped,
    Tile,
    architecture_of,
    blocks,
    define,
    launch,
    power_of_two,
    tile_of,
)
from model.kernels.triton.mhc_kernels import (
    mhc_coefficients,
    mhc_coefficients_backward,
    mhc_merge_mix,
    mhc_merge_streams,
    mhc_merge_streams_backward,
    mhc_mix,
    mhc_products,
    mhc_streams_backward,
)

_PARTS = {INTERPRETER: 2, "other": 4}  # of the channels, in the projection
_SPLITS = {INTERPRETER: 2, "other": 8}  # of the tokens, in the gradient of the projection
_AMD = {"matrix_instr_nonkdim": 16}
_FP32 = {"PRECISION": "tf32x3"}
_FP32_AMD = {"PRECISION": "bf16x6"}
_MIX = {
    INTERPRETER: Tile({"BT": 16, "BK": 64, "PRECISION": "ieee"}),
    "gfx942": Tile({"BT": 64, "BK": 32, **_FP32_AMD}, options=_AMD),
    "other": Tile({"BT": 64, "BK": 32, **_FP32}, stages=4),
}
_MERGE_MIX = {
    INTERPRETER: Tile({"BT": 16, "BD": 64, "PRECISION": "ieee"}),
    "gfx942": Tile({"BT": 32, "BD": 32, **_FP32_AMD}, options=_AMD),
    "other": Tile({"BT": 64, "BD": 16, **_FP32}, 4, 2),
}
_COEFFICIENTS = {
    INTERPRETER: Tile({"BT": 16}),
    "gfx942": Tile({"BT": 16}, warps=1, stages=1),
    "other": Tile({"BT": 8}, warps=1, stages=1),
}
_COLLAPSE = {
    INTERPRETER: Tile({"BT": 16, "BD": 64}),
    "other": Tile({"BT": 8, "BD": 128}, stages=1),
}
_ROWS = {INTERPRETER: Tile({"BT": 16, "BD": 64}), "other": Tile({"BT": 1, "BD": 1024}, stages=1)}
_PRODUCTS = {
    INTERPRETER: Tile({"BT": 16, "BD": 64}),
    "other": Tile({"BT": 1, "BD": 512}, stages=1),
}
_STREAMS = {
    INTERPRETER: Tile({"BT": 16, "BD": 64, "PRECISION": "ieee"}),
    "gfx942": Tile({"BT": 16, "BD": 64, **_FP32_AMD}, warps=4, options=_AMD),
    "other": Tile({"BT": 16, "BD": 64, **_FP32}, warps=8),
}


def _pre(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, eps: float, rms_eps: float
) -> tuple[Tensor, ...]:
    """u, post, comb, mix, rms; of the head post and comb are empty."""
    N, S, D = x.shape
    M, C, head = fn.shape[0], S * D, fn.shape[0] == S
    arch = architecture_of(x.device)
    parts = tile_of(_PARTS, arch)
    part, squares = fn.new_empty(parts, N, M), fn.new_empty(parts, N)
    tile = tile_of(_MIX, arch)
    chunk = blocks(blocks(C, parts), tile.sizes["BK"]) * tile.sizes["BK"]
    launch(
        mhc_mix, (blocks(N, tile.sizes["BT"]), parts), x, fn, part, squares, N, C, chunk, M=M,
        MP=max(16, power_of_two(M)), **tile.constants(),
    )  # fmt: skip
    return _coefficients(x, part, squares, base, scale, iters, eps, rms_eps, head)


def _coefficients(
    x: Tensor, part: Tensor, squares: Tensor, base: Tensor, scale: Tensor, iters: int, eps: float,
    rms_eps: float, head: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """u, post, comb, mix, rms from the parts of the projection."""
    N, S, D = x.shape
    parts, _, M = part.shape
    u, rms, mix = x.new_empty(N, D), part.new_empty(N), part.new_empty(N, M)
    rows = 0 if head else N
    post, comb = part.new_empty(rows, S), part.new_empty(rows, S, S)
    tile = tile_of(_COLLAPSE, architecture_of(x.device))
    launch(
        mhc_coefficients, (blocks(N, tile.sizes["BT"]),), x, part, squares, base, scale, u, post,
        comb, mix, rms, N, D, eps, rms_eps, iters, S=S, SP=power_of_two(S), M=M, HEAD=head,
        PARTS=parts, **tile.constants(),
    )  # fmt: skip
    return u, post, comb, mix, rms


def _head(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, rms_eps: float
) -> tuple[Tensor, ...]:
    u, _, _, mix, rms = _pre(x, fn, base, scale, 1, eps, rms_eps)
    return u, mix, rms


def _merge(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    N, S, D = x.shape
    new = torch.empty_like(x)
    tile = tile_of(_ROWS, architecture_of(x.device))
    grid = (blocks(N, tile.sizes["BT"]), blocks(D, tile.sizes["BD"]))
    launch(mhc_merge_streams, grid, y, x, post, comb, new, N, D, S=S, **tile.constants())
    return new


def _merge_pre(
    y: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor,
    iters: int, eps: float, rms_eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The streams after the merge, and what :func:`_pre` makes of them."""
    N, S, D = x.shape
    M, new = fn.shape[0], torch.empty_like(x)
    arch = architecture_of(x.device)
    parts, tile = tile_of(_PARTS, arch), tile_of(_MERGE_MIX, arch)
    part, squares = fn.new_empty(parts, N, M), fn.new_empty(parts, N)
    chunk = blocks(blocks(D, parts), tile.sizes["BD"]) * tile.sizes["BD"]
    launch(
        mhc_merge_mix, (blocks(N, tile.sizes["BT"]), parts), y, x, post, comb, fn, new, part,
        squares, N, D, chunk, S=S, M=M, MP=max(16, power_of_two(M)), **tile.constants(),
    )  # fmt: skip
    return new, *_coefficients(new, part, squares, base, scale, iters, eps, rms_eps, False)


def _merge_backward(grad: Tensor, y: Tensor, post: Tensor) -> tuple[Tensor, Tensor]:
    N, S, D = grad.shape
    grad_y, grad_post = torch.empty_like(y), torch.empty_like(post)
    tile = tile_of(_ROWS, architecture_of(y.device))
    launch(
        mhc_merge_streams_backward, (blocks(N, tile.sizes["BT"]),), grad, y, post, grad_y,
        grad_post, N, D, S=S, **tile.constants(),
    )  # fmt: skip
    return grad_y, grad_post


def _pre_backward(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, eps: float, mix: Tensor,
    rms: Tensor, grad_u: Tensor, grad_new: Tensor | None, grad_post: Tensor | None,
    grad_comb: Tensor | None, y: Tensor | None = None, post: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, fn, base and scale; with y and post, which x was formed of, of these too."""
    N, S, D = x.shape
    M, head = fn.shape[0], fn.shape[0] == S
    arch = architecture_of(x.device)
    grad_u = grad_u.contiguous()
    grad_new = grad_u if grad_new is None else grad_new.contiguous()
    cells = 0 if head else N
    pre, products = fn.new_empty(N, S), fn.new_empty(N, S)
    comb, comb_products = fn.new_empty(cells, S, S), fn.new_empty(cells, S, S)
    tile = tile_of(_PRODUCTS, arch)
    launch(
        mhc_products, (blocks(N, tile.sizes["BT"]),), x, grad_u, grad_new, products,
        comb_products, N, D, S=S, HEAD=head, **tile.constants(),
    )  # fmt: skip
    tile = tile_of(_COEFFICIENTS, arch)
    programs = blocks(N, tile.sizes["BT"])
    raw, shrink = torch.empty_like(mix), torch.empty_like(rms)
    bases, scales = fn.new_empty(programs, M), fn.new_empty(programs, 3)
    launch(
        mhc_coefficients_backward, (programs,), mix, base, scale, rms, products,
        None if grad_post is None else grad_post.contiguous(), comb_products,
        None if grad_comb is None else grad_comb.contiguous(), pre, comb, raw, shrink, bases,
        scales, fn.new_empty(2 * iters - 1, cells, S), N, S * D, eps, iters, S=S,
        SP=power_of_two(S), M=M, HEAD=head, **tile.constants(),
    )  # fmt: skip
    tile = tile_of(_STREAMS, arch)
    splits = tile_of(_SPLITS, arch)
    chunk = blocks(blocks(N, splits), tile.sizes["BT"]) * tile.sizes["BT"]
    grad_x, parts = torch.empty_like(x), fn.new_empty(splits, M, S * D)
    columns = blocks(D, tile.sizes["BD"])
    grad_y = None if y is None else torch.empty_like(y)
    posts = None if y is None else fn.new_empty(columns, N, S)
    launch(
        mhc_streams_backward, (columns, splits), grad_u, grad_new, x, pre, comb, raw, shrink, fn,
        grad_x, parts, y, post, grad_y, posts, N, D, chunk, S=S, M=M, MP=max(16, power_of_two(M)),
        HEAD=head, **tile.constants(),
    )  # fmt: skip
    grads = grad_x, parts.sum(0), bases.sum(0), scales[:, : scale.shape[0]].sum(0)
    return grads if grad_y is None or posts is None else (*grads, grad_y, posts.sum(0))


def _head_backward(
    x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, mix: Tensor, rms: Tensor,
    grad_y: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _pre_backward(x, fn, base, scale, 1, eps, mix, rms, grad_y, None, None, None)


def _defined(name: str, implementation: Any) -> Any:
    return define(f"triton_{name}{SCHEMAS[name]}", implementation)


_OPS = mhc_fast.MhcOps(
    pre=_defined("mhc_pre", _pre),
    pre_backward=_defined("mhc_pre_backward", _pre_backward),
    merge=_defined("mhc_merge", _merge),
    merge_backward=_defined("mhc_merge_backward", _merge_backward),
    head=_defined("mhc_head", _head),
    head_backward=_defined("mhc_head_backward", _head_backward),
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)
# As the functions of model.kernels.mhc: same arguments and results.
mhc_pre = partial(mhc_fast.mhc_pre, ops=_OPS)
mhc_merge = partial(mhc_fast.mhc_merge, ops=_OPS)
mhc_head = partial(mhc_fast.mhc_head, ops=_OPS)

define(
    "triton_mhc_merge_pre(Tensor y, Tensor x, Tensor post, Tensor comb, Tensor fn, Tensor base,"
    " Tensor scale, int iters, float eps, float rms_eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _merge_pre,
)
define(
    "triton_mhc_merge_pre_backward(Tensor x, Tensor fn, Tensor base, Tensor scale, int iters,"
    " float eps, Tensor mix, Tensor rms, Tensor grad_u, Tensor grad_new, Tensor grad_post,"
    " Tensor? grad_comb, Tensor y, Tensor post)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _pre_backward,
)


class _MergePre(torch.autograd.Function):
    """A merge and the next pre; gradients of streams are those of ``mhc_fast``'s two."""

    @staticmethod
    def forward(
        ctx: Any,
        y_ND: Tensor,
        x_NSD: Tensor,
        post_NS: Tensor,
        comb_NSS: Tensor,
        fn_MC: Tensor,
        base_M: Tensor,
        scale_3: Tensor,
        *numbers: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        new_NSD, u_ND, new_post, new_comb, mix_NM, rms_N = OPS.triton_mhc_merge_pre(
            y_ND, x_NSD, post_NS, comb_NSS, fn_MC, base_M, scale_3, *numbers
        )
        ctx.save_for_backward(y_ND, post_NS, new_NSD, fn_MC, base_M, scale_3, mix_NM, rms_N)
        ctx.iters, ctx.eps, _ = numbers
        ctx.set_materialize_grads(False)
        return u_ND, new_NSD, new_post, new_comb

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        y_ND, post_NS, new_NSD, fn_MC, base_M, scale_3, mix_NM, rms_N = ctx.saved_tensors
        grad_x, grad_fn, grad_base, grad_scale, grad_y, grad_post = (
            OPS.triton_mhc_merge_pre_backward(
                new_NSD, fn_MC, base_M, scale_3, ctx.iters, ctx.eps, mix_NM, rms_N,
                *mhc_fast.filled(new_NSD, mix_NM, *grads), y_ND, post_NS,
            )
        )  # fmt: skip
        back = (grad_y, grad_x, grad_post, None, grad_fn, grad_base, grad_scale)
        return *back, None, None, None


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
    """:func:`model.kernels.mhc.mhc_merge_pre` in one pass; ``mix`` comes from a pre here."""
    x_BTSD = mix.x_BTSD
    x_NSD = mhc_fast.rows_of(_OPS, x_BTSD, fn_MC, base_M, scale_3)
    u_ND, new_NSD, post_NS, comb_NSS = _MergePre.apply(
        mhc_fast.written(y_BTD, x_BTSD), x_NSD, mix.post_BTS.flatten(0, -2),
        mix.comb_BTSS.flatten(0, -3), fn_MC.contiguous(), base_M, scale_3, iters, eps, rms_eps,
    )  # fmt: skip
    lead = x_BTSD.shape[:-2]
    post_BTS, comb_BTSS = post_NS.unflatten(0, lead), comb_NSS.unflatten(0, lead)
    return u_ND.unflatten(0, lead), StreamMix(new_NSD.view(x_BTSD.shape), post_BTS, comb_BTSS)


_WRITTEN = ("WROTE", "WEIGHT", "GWROTE", "PWEIGHT")  # of mhc_streams_backward after a merge


def _shipped(head: bool) -> tuple[Shipped, ...]:
    S, M = 4, 4 if head else 24
    kind = "head" if head else "pre"
    f32 = "*fp32"
    coefficients = {
        name: f32
        for name in ("PART", "SQUARES", "BASE", "SCALE", "PRE", "POST", "COMB", "MIX", "RMS")
    }
    back = ("MIX", "BASE", "SCALE", "RMS", "GPRE", "GPOST", "GCOMB", "PRE", "COMB", "RAW",
            "SHRINK", "PBASE", "PSCALE", "TAPE")  # fmt: skip
    streams = {"GU": "*bf16", "U": "*bf16", "G": "*bf16", "X": "*bf16", "GX": "*bf16"}
    numbers = {"N": "i32:16", "C": "i32:16", "D": "i32:16", "chunk": "i32:16"}
    small = {"eps": "fp32", "rms_eps": "fp32", "iters": "i32"}
    shape = {"S": S, "SP": S, "M": M, "MP": max(16, power_of_two(M)), "HEAD": head, "PARTS": 4,
             "MORE": None, **dict.fromkeys(_WRITTEN)}  # fmt: skip
    floats = dict.fromkeys(("FN", "PFN", *back), f32)
    types = {**floats, **coefficients, **streams, **numbers, **small}
    lines = [
        Shipped(
            f"{kind}: {kernel.fn.__name__.removeprefix('mhc_')}", kernel, types, {**shape}, tiles
        )
        for kernel, tiles in (
            (mhc_mix, _MIX),
            (mhc_coefficients, _COLLAPSE),
            (mhc_products, _PRODUCTS),
            (mhc_coefficients_backward, _COEFFICIENTS),
            (mhc_streams_backward, _STREAMS),
        )
    ]
    if not head:
        for name in ("MORE", *_WRITTEN):
            del shape[name]
        types |= {"MORE": f32, "WROTE": "*bf16", "GWROTE": "*bf16", "WEIGHT": f32, "PWEIGHT": f32}
        types |= {"Y": "*bf16", "NEW": "*bf16"}
        lines += [
            Shipped(name, kernel, types, {**shape}, tiles)
            for name, kernel, tiles in (
                ("pre: coefficients_backward of more", mhc_coefficients_backward, _COEFFICIENTS),
                ("merge_pre: merge_mix", mhc_merge_mix, _MERGE_MIX),
                ("merge_pre: streams_backward", mhc_streams_backward, _STREAMS),
            )
        ]
    return tuple(lines)


def _rows_shipped() -> tuple[Shipped, ...]:
    types = dict.fromkeys(("X", "U", "Y", "NEW", "G", "GY"), "*bf16")
    types |= dict.fromkeys(("PRE", "POST", "COMB", "GPOST"), "*fp32")
    types |= {"N": "i32:16", "D": "i32:16"}
    return tuple(
        Shipped(kernel.fn.__name__.removeprefix("mhc_"), kernel, types, {"S": 4}, _ROWS)
        for kernel in (mhc_merge_streams, mhc_merge_streams_backward)
    )


SHIPPED = (*_shipped(head=False), *_shipped(head=True), *_rows_shipped())
