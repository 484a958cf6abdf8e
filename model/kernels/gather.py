"""Row gathers whose backward pass is a gather too: no scatter-add, deterministic, one pass.

Where the places that take a row are not known beforehand, :func:`add_rows_` sums in a fixed order.
No other file adds floats to places that may meet (tests/arch/test_sums.py).
"""

# Legend: B rows, T tokens, N gathered rows, M rows that may repeat, C channels, K experts per token
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _rows(x_BTC: Tensor, index_BN: Tensor) -> Tensor:
    """``x[b, index[b, n]]``, zeros where the index is T."""
    B, T, C = x_BTC.shape
    flat = index_BN.clamp(max=T - 1) + torch.arange(B, device=x_BTC.device)[:, None] * T
    out = x_BTC.reshape(B * T, C).index_select(0, flat.flatten()).view(B, -1, C)
    return out.masked_fill_((index_BN == T)[..., None], 0)


def count(index: Tensor, size: int) -> Tensor:
    """How often each of ``0 .. size - 1`` stands in ``index``, int64 [size].

    Integers add up alike in any order; ``bincount`` would read the largest back to the host.
    """
    flat = index.flatten()
    return flat.new_zeros(size).scatter_add_(0, flat, torch.ones_like(flat))


def add_rows_(table_NC: Tensor, index_M: Tensor, rows_MC: Tensor) -> None:
    """``table[index[m]] += rows[m]``; rows that meet are added in one order: equal bits each time.

    Each device has one op that keeps an order: ``index_put_`` sorts on CUDA, where ``index_add_``
    adds atomically; on a CPU ``index_add_`` goes through the rows in turn, where ``index_put_``
    adds atomically.
    """
    if table_NC.device.type == "cpu":
        table_NC.index_add_(0, index_M, rows_MC)
    else:
        table_NC.index_put_((index_M,), rows_MC, accumulate=True)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_NC: Tensor, index_M: Tensor) -> Tensor:
        ctx.save_for_backward(index_M)
        ctx.shape = table_NC.shape
        return table_NC.index_select(0, index_M)

    @staticmethod
    def backward(ctx: Any, grad_MC: Tensor) -> tuple[Tensor, None]:
        (index_M,) = ctx.saved_tensors
        grad_NC = grad_MC.new_zeros(ctx.shape)
        add_rows_(grad_NC, index_M, grad_MC)
        return grad_NC, None


def take_rows(table_NC: Tensor, index_M: Tensor) -> Tensor:
    """``table[index]`` along the first dim; gradients meet as in :func:`add_rows_`."""
    return _Take.apply(table_NC, index_M)


class _Injective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTC: Tensor, index_BN: Tensor, inverse_BT: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_BT)
        return _rows(x_BTC, index_BN)

    @staticmethod
    def backward(ctx: Any, grad_BNC: Tensor) -> tuple[Tensor, None, None]:
        (inverse_BT,) = ctx.saved_tensors
        return _rows(grad_BNC, inverse_BT), None, None


def gather_rows(x_BTC: Tensor, index_BN: Tensor, inverse_BT: Tensor) -> Tensor:
    """Gather rows, each of which is taken at most once.

    Args:
        x_BTC: the table of every batch row.
        index_BN: row taken, T for none (gives zeros).
        inverse_BT: place in the result that row t went to, N for none.
    """
    return _Injective.apply(x_BTC, index_BN, inverse_BT)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, token_N: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return x_TC.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, grad_NC: Tensor) -> tuple[Tensor, None, None]:
        (place_TK,) = ctx.saved_tensors
        return _sum_rows(grad_NC, place_TK).to(grad_NC.dtype), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NC: Tensor, token_N: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_N)
        ctx.dtype = rows_NC.dtype
        return _sum_rows(rows_NC, place_TK)

    @staticmethod
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Tensor, None, None]:
        (token_N,) = ctx.saved_tensors
        return grad_TC.to(ctx.dtype).index_select(0, token_N), None, None


def _sum_rows(rows_NC: Tensor, place_TK: Tensor) -> Tensor:
    """fp32 sum of each token's K rows, in the order of K."""
    picked = [rows_NC.index_select(0, place_T).float() for place_T in place_TK.unbind(1)]
    total = picked[0]
    for other in picked[1:]:
        total += other
    return total


def spread(x_TC: Tensor, token_N: Tensor, place_TK: Tensor) -> Tensor:
    """Copy each token to its K places: ``out[n] = x[token[n]]``; backward sums them in fp32.

    Args:
        x_TC: tokens.
        token_N: token of every row.
        place_TK: the K rows of every token (the inverse of ``token``).
    """
    return _Spread.apply(x_TC, token_N, place_TK)


def send(
    x_TC: Tensor, weight_TK: Tensor, token_N: Tensor, copy_N: Tensor, place_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Copy each token, and each copy's weight, to its place.

    Args:
        x_TC: tokens.
        weight_TK: of their copies.
        token_N: token of every row.
        copy_N: copy t * K + k of every row.
        place_TK: the row of every copy.

    Returns:
        Rows [N, C] and their weights [N].
    """
    weight_N1 = spread(weight_TK.reshape(-1, 1), copy_N, place_TK.view(-1, 1))
    return spread(x_TC, token_N, place_TK), weight_N1[:, 0]


def collect(
    rows_NC: Tensor,
    token_N: Tensor,
    place_TK: Tensor,
    plus_TC: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sum each token's K rows in fp32: the inverse direction of :func:`spread`.

    Args:
        rows_NC: results.
        token_N: token of every row.
        place_TK: the K rows of every token.
        plus_TC: added to the sum, if given.
        dtype: the sum is rounded to it once.
    """
    total_TC = _Collect.apply(rows_NC, token_N, place_TK)
    return (total_TC if plus_TC is None else total_TC + plus_TC).to(dtype)
