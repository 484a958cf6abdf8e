"""Planted bugs of streams, RoPE, attention, compressor and plan: each is a patch of one attribute.

A plant takes a ``pytest.MonkeyPatch`` and replaces one function, so the source stays as it is.
``tests/model/test_mutants.py`` holds the table and runs them.
"""

# Legend: B rows, T tokens, S streams, D hidden, E entries, M tokens of an entry, R rotation pairs
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import model.context as context_module
import model.hyper_connections as hyper_connections
import model.kernels.mhc as mhc
import model.kernels.select as select_module
from model.attention.compressor import Compressor
from model.attention.core import WindowAttention
from model.attention.csa import CompressedSparseAttention
from model.attention.hca import HeavilyCompressedAttention
from model.linear import BlockLinear
from model.moe.experts import Experts, SharedExpert
from model.rope import apply_rope

Plant = Callable[[pytest.MonkeyPatch], None]


def op(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Plant:
    """Replace an op of the kernel table by ``make(real op)``."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        wrong = make(select_module._OPS[name].reference)
        wrongs = select_module.Implementations(wrong, wrong, None, None)
        patch.setitem(select_module._OPS, name, wrongs)

    return plant


def attribute(owner: Any, name: str, make: Callable[[Any], Any]) -> Plant:
    """Replace an attribute of a module or class by ``make(real one)``."""
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


def after_init(cls: type[nn.Module], change: Callable[[Any], None]) -> Plant:
    """Change every new instance of a module class."""

    def make(real: Callable[..., None]) -> Callable[..., None]:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            real(self, *args, **kwargs)
            change(self)

        return init

    return attribute(cls, "__init__", make)


# ---- mHC ----------------------------------------------------------------------------------------
def _mix(change: Callable[[Any, float], Any]) -> Plant:
    """Change what ``mhc_pre`` hands to the merge, given its eps."""

    def make(real: Any) -> Any:
        def pre(*args: Any) -> Any:
            u, mix = real(*args)
            return u, change(mix, args[5])

        return pre

    return op("mhc_pre", make)


comb_not_transposed = _mix(lambda mix, eps: mix._replace(comb_BTSS=mix.comb_BTSS.mT))
post_one_sigmoid = _mix(lambda mix, eps: mix._replace(post_BTS=mix.post_BTS / 2))
post_with_eps = _mix(lambda mix, eps: mix._replace(post_BTS=mix.post_BTS + eps))


def _read(change: Callable[[Tensor, Tensor, float], Tensor]) -> Plant:
    def make(real: Any) -> Any:
        def pre(x_BTSD: Tensor, *args: Any) -> Any:
            u, mix = real(x_BTSD, *args)
            return change(u, x_BTSD, args[4]), mix

        return pre

    return op("mhc_pre", make)


pre_without_eps = _read(lambda u, x, eps: u - eps * x.sum(dim=-2))
reads_one_stream = _read(lambda u, x, eps: x[..., 0, :] + 0 * u)


def _sinkhorn(change: Callable[[Any, Tensor, int, float], Tensor]) -> Plant:
    return attribute(
        mhc, "sinkhorn", lambda real: lambda logits, iters, eps: change(real, logits, iters, eps)
    )


def _eps_inside_softmax(real: Any, logits: Tensor, iters: int, eps: float) -> Tensor:
    e = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    comb = e / (e.sum(dim=-1, keepdim=True) + eps)
    comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(dim=-1, keepdim=True) + eps)
        comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    return comb


def _row_step_last(real: Any, logits: Tensor, iters: int, eps: float) -> Tensor:
    comb = real(logits, iters, eps)
    return comb / (comb.sum(dim=-1, keepdim=True) + eps)


sinkhorn_softmax_over_sources = _sinkhorn(lambda real, x, n, eps: real(x.mT, n, eps).mT)
sinkhorn_eps_inside_softmax = _sinkhorn(_eps_inside_softmax)
sinkhorn_ten_iterations = _sinkhorn(lambda real, x, n, eps: real(x, 10, eps))
sinkhorn_row_step_last = _sinkhorn(_row_step_last)


def _eps_outside(x_BTSD: Tensor, fn_MC: Tensor, eps: float) -> Tensor:
    flat = x_BTSD.flatten(-2)
    return flat @ fn_MC.T / (flat.square().mean(dim=-1, keepdim=True).sqrt() + eps)


projection_eps_outside_root = attribute(mhc, "rms_projection", lambda real: _eps_outside)
mix_static = attribute(mhc, "rms_projection", lambda real: lambda *args: 0 * real(*args))
head_is_a_mean = op("mhc_head", lambda real: lambda x, *args: x.mean(dim=-2) + 0 * real(x, *args))
gamma_ignored = attribute(hyper_connections, "_fold", lambda real: lambda fn, gamma: fn)


def _norm_eps_outside(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x / (x.square().mean(dim=-1, keepdim=True).sqrt() + eps)
    return y if weight is None else y * weight


norm_eps_outside_root = op("rms_norm", lambda real: _norm_eps_outside)


# ---- RoPE ---------------------------------------------------------------------------------------
def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if x.dim() == cos.dim() + 1:
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    R = cos.shape[-1]
    plain, a, b = x[..., : -2 * R], x[..., -2 * R : -R], x[..., -R:]
    return torch.cat((plain, a * cos - b * sin, a * sin + b * cos), dim=-1)


def _rope_first(real: Any) -> Any:
    def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        width = 2 * cos.shape[-1]
        return real(x.roll(-width, dims=-1), cos, sin).roll(width, dims=-1)

    return rope


def _is_inverse(sin: Tensor) -> bool:
    return bool(sin[:, 1, 0].sum() < 0)  # the first frequency is 1: sin(1) > 0


def _no_inverse(real: Any) -> Any:
    return lambda x, cos, sin: x if _is_inverse(sin) else real(x, cos, sin)


def _inverse_in_place(real: Any) -> Any:
    def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if _is_inverse(sin):
            x.data.copy_(real(x.detach(), cos, sin))  # autograd does not see the rotation
            return x
        return real(x, cos, sin)

    return rope


rope_rotate_half = op("rope", lambda real: rotate_half)
rope_first_channels = op("rope", _rope_first)
inverse_rope_missing = op("rope", _no_inverse)
inverse_rope_in_place = op("rope", _inverse_in_place)


def _frequencies(change: Callable[[Any, Any, bool, bool], Tensor]) -> Plant:
    def make(real: Any) -> Any:
        def frequencies(config: Any, compressed: bool, yarn: bool = True) -> Tensor:
            return change(real, config, compressed, yarn)

        return frequencies

    return attribute(context_module, "rope_frequencies", make)


def _more_yarn(config: Any, factor: float) -> Any:
    return replace(config, rope_scaling=replace(config.rope_scaling, factor=factor))


def _half_the_dims(real: Any, config: Any, compressed: bool, yarn: bool) -> Tensor:
    twice = config.qk_rope_head_dim * config.qk_rope_head_dim // config.head_dim
    return real(replace(config, qk_rope_head_dim=twice), compressed, yarn)


rope_base_40000 = _frequencies(
    lambda real, c, compressed, yarn: real(replace(c, compress_rope_theta=4e4), compressed, yarn)
)
yarn_wrong_factor = _frequencies(
    lambda real, c, compressed, yarn: real(_more_yarn(c, 16.0), compressed, yarn)
)
yarn_missing = _frequencies(lambda real, c, compressed, yarn: real(c, compressed, False))
yarn_on_window_layers = _frequencies(
    lambda real, c, compressed, yarn: real(
        c if compressed else replace(c, compress_rope_theta=c.rope_theta), True, yarn
    )
)
partial_rotary_twice = _frequencies(_half_the_dims)


def _mscale(real: Any) -> Any:
    def tables(positions: Tensor, frequencies_R: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = real(positions, frequencies_R)
        scale = 0.1 * math.log(16) + 1
        return cos * scale, sin * scale

    return tables


mscale_applied = attribute(context_module, "rope_tables", _mscale)


def base_mixed_in_a_layer(patch: pytest.MonkeyPatch) -> None:
    """Queries and window KV take the window layers' base, entries keep their own."""
    for cls in (CompressedSparseAttention, HeavilyCompressedAttention):
        patch.setattr(cls, "rope", lambda self, context: context.window_rope)


def _context(change: Callable[[Any, Any], Any]) -> Plant:
    """Change the finished context, given the config."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        import model.transformer as transformer  # noqa: PLC0415

        real = transformer.build_context

        def build(config: Any, *rest: Any) -> Any:
            return change(real(config, *rest), config)

        patch.setattr(transformer, "build_context", build)

    return plant


def _pool_index(context: Any, config: Any) -> Any:
    frequencies = context_module.rope_frequencies(config, compressed=True)
    for m, plan in context.plan.compressed.items():
        context.entry_rope[m] = context_module.rope_tables(plan.position_BL // m, frequencies)
    return context


entry_at_pool_index = _context(_pool_index)


# ---- attention ----------------------------------------------------------------------------------
def _attention(change: Callable[..., tuple[Any, ...]]) -> Plant:
    return op("attention", lambda real: lambda *args: real(*change(*args)))


sink_missing = _attention(
    lambda q, kv, sink, start, window, entries: (q, kv, 0 * sink - 1e9, start, window, entries)
)
window_one_short = _attention(
    lambda q, kv, sink, start, window, entries: (q, kv, sink, start, window - 1, entries)
)
window_one_long = _attention(
    lambda q, kv, sink, start, window, entries: (q, kv, sink, start, window + 1, entries)
)
query_norm_missing = op(
    "rms_norm", lambda real: lambda x, w, eps: x if w is None else real(x, w, eps)
)


def _no_kv_norm(attention: WindowAttention) -> None:
    def forward(x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return x if rope is None else apply_rope(x, *rope)

    attention.kv_norm.forward = forward


window_kv_norm_missing = after_init(WindowAttention, _no_kv_norm)
output_groups_shifted = attribute(
    BlockLinear, "forward", lambda real: lambda self, x: real(self, x.roll(1, dims=-2))
)


# ---- clamp --------------------------------------------------------------------------------------
def _no_limit(module: Any) -> None:
    module.limit = 1e9


shared_clamp_missing = after_init(SharedExpert, _no_limit)
routed_clamp_missing = after_init(Experts, _no_limit)


def _straight_through(gate: Tensor, up: Tensor, weight: Tensor | None, limit: float) -> Tensor:
    g = gate + (gate.clamp(max=limit) - gate).detach()
    v = up + (up.clamp(-limit, limit) - up).detach()
    y = nn.functional.silu(g) * v
    return y if weight is None else y * weight[:, None]


def _both_sides(real: Any) -> Any:
    return lambda gate, up, weight, limit: real(gate.clamp(min=-limit), up, weight, limit)


clamp_straight_through = op("swiglu", lambda real: _straight_through)
gate_clamped_below = op("swiglu", _both_sides)


# ---- compressor ---------------------------------------------------------------------------------
def _swap_halves(real: Any) -> Any:
    def project(self: Compressor, u_BTD: Tensor) -> tuple[Tensor, ...]:
        k_z = real(self, u_BTD)
        return tuple(x.roll(self.dim, dims=-1) for x in k_z) if self.overlap else k_z

    return project


def _without_ape(real: Any) -> Any:
    return lambda k, z, ape, *rest: real(k, z, torch.zeros_like(ape), *rest)


overlap_halves_swapped = attribute(Compressor, "project", _swap_halves)
ape_missing = op("pool_entries", _without_ape)


# ---- plan: packing and visibility ---------------------------------------------------------------
def _plan(change: Callable[[Any, Any, Tensor], Any]) -> Plant:
    """Change the sequence plan, given how it is built and the document ids."""

    def make(real: Any) -> Any:
        def build(document_ids_BT: Tensor, *rest: Any) -> Any:
            plan = real(document_ids_BT, *rest)
            one_document = real(torch.zeros_like(document_ids_BT), *rest)
            return change(plan, one_document, document_ids_BT)

        return build

    return attribute(context_module, "build_sequence_plan", make)


def _each_ratio(change: Callable[[Any], Any]) -> Plant:
    return _plan(
        lambda plan, one, docs: replace(
            plan, compressed={m: change(p) for m, p in plan.compressed.items()}
        )
    )


def _first_has_previous(p: Any) -> Any:
    return replace(p, has_previous_BL=torch.ones_like(p.has_previous_BL))


def _crosses(p: Any) -> Any:
    later = torch.ones_like(p.valid_BL)
    later[:, 0] = False
    return replace(p, has_previous_BL=later & p.valid_BL)


def _unfinished_block(p: Any) -> Any:
    last = p.valid_BL.sum(dim=1, keepdim=True)
    return replace(p, stop_BT=torch.minimum(p.stop_BT + 1, last))


def _one_late(p: Any) -> Any:
    stop = torch.cat((p.first_BT[:, :1], p.stop_BT[:, :-1]), dim=1)
    return replace(p, stop_BT=torch.maximum(stop, p.first_BT))


entry_zero_reads_before_itself = _each_ratio(_first_has_previous)
overlap_crosses_documents = _each_ratio(_crosses)
block_seen_before_its_end = _each_ratio(_unfinished_block)
block_seen_one_token_late = _each_ratio(_one_late)
entries_of_other_documents_visible = _each_ratio(
    lambda p: replace(p, first_BT=torch.zeros_like(p.first_BT))
)
compressor_ignores_documents = _plan(
    lambda plan, one, docs: replace(plan, compressed=one.compressed)
)
window_ignores_documents = _plan(lambda plan, one, docs: replace(plan, start_BT=one.start_BT))
positions_run_on = _plan(lambda plan, one, docs: replace(plan, position_BT=one.position_BT))
padding_is_a_document = _plan(
    lambda plan, one, docs: replace(plan, valid_BT=torch.ones_like(plan.valid_BT))
)
