"""What is particular to the experts' matmuls: rows belong to experts, and so do blocks of rows.

The forward and the input gradient quantise along the contraction dim of the weights, row by row.
The weight gradient contracts over rows: its operands are quantised in blocks of 128 rows, which
must not mix two experts (reference C.8: 128x1 blocks for wgrad).
"""

# Legend: N rows sorted by expert, C columns, E experts, P rows once every expert is padded
from __future__ import annotations

import torch
from torch import Tensor

from quant.formats import FP8_COLUMN, fake_quant

_ROWS = FP8_COLUMN.rows


def fake_quant_rows(x_NC: Tensor, offsets_E: Tensor | None) -> Tensor:
    """FP8 in blocks of 128 rows and 1 column; same shape, contiguous.

    Args:
        x_NC: operand of a weight gradient.
        offsets_E: ends of the experts' rows; each expert's blocks start at its own first row. None:
            all rows are one expert's.
    """
    if offsets_E is None:
        return fake_quant(x_NC, FP8_COLUMN)
    position_N, padded = padded_positions(offsets_E, x_NC.shape[0])
    x_PC = x_NC.new_zeros(padded, x_NC.shape[1]).index_copy_(0, position_N, x_NC)
    return fake_quant(x_PC, FP8_COLUMN).index_select(0, position_N)


def padded_positions(offsets_E: Tensor, num_rows: int) -> tuple[Tensor, int]:
    """Where each row goes when every expert's rows are padded to a multiple of 128.

    Args:
        offsets_E: cumulative row counts; the last is ``num_rows``.
        num_rows: N.

    Returns:
        int64 [N], and a number of rows that suffices whatever the offsets are (so that nothing has
        to be read back from the device).
    """
    start_E = torch.cat((offsets_E.new_zeros(1), offsets_E[:-1]))
    count_E = offsets_E - start_E
    padded_E = (count_E + _ROWS - 1) // _ROWS * _ROWS
    shift_E = padded_E.cumsum(0) - padded_E - start_E
    row_N = torch.arange(num_rows, device=offsets_E.device)
    expert_N = torch.bucketize(row_N, offsets_E, right=True)
    bound = num_rows + offsets_E.shape[0] * (_ROWS - 1)
    return row_N + shift_E[expert_N], -(-bound // _ROWS) * _ROWS
