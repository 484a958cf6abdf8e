"""FP4 values as FP8 blocks: every code at every ratio up to the bound, bitwise; lost beyond it."""

import math

import pytest
import torch

from quant.formats import FP8_WEIGHT, MXFP4, Quantised, dequantise, fake_quant, pack_fp4, quantise
from quant.lossless import LOSSLESS_LOG2, scale_spread
from tests.quant import reference


def assert_bits(a, b):
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num().view(torch.int32), b.nan_to_num().view(torch.int32))


def fp4_values(codes, scale_bytes):
    scale = scale_bytes.to(torch.uint8).view(torch.float8_e8m0fnu)
    return dequantise(Quantised(pack_fp4(codes), scale), MXFP4)


@pytest.mark.core
def test_fp8_blocks_hold_all_codes_up_to_the_bound():
    # One 128x128 block whose groups span ratios 2**0 .. 2**14 below the largest, each group all 16
    # codes twice. FP8 has a floor of 1e-4 under a block's largest value, so tops are above it.
    codes = torch.arange(16, dtype=torch.uint8).repeat(8).expand(128, 128)
    for top in (113, 127, 200):
        groups = top - torch.arange(128)[:, None].expand(128, 4) % 15
        assert scale_spread(groups.to(torch.uint8)).tolist() == [[LOSSLESS_LOG2]]
        values = fp4_values(codes, groups)
        stored = quantise(values, FP8_WEIGHT)
        assert stored.scale.view(torch.uint8).tolist() == [[top - 6]]
        assert_bits(dequantise(stored, FP8_WEIGHT), values)


def test_a_wider_spread_loses_values():
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)[None]
    codes = torch.cat([codes, codes])
    groups = torch.tensor([[127], [127 - 15]])
    assert scale_spread(groups.to(torch.uint8)).tolist() == [[LOSSLESS_LOG2 + 1]]
    values = fp4_values(codes, groups)
    assert not torch.equal(fake_quant(values, FP8_WEIGHT), values)
    # Independent evidence that the bound is where it must be: half of 2**-15, seen from 6 at scale
    # 2**0.
    table = reference.e4m3_magnitudes()
    assert 0.5 * 2.0**-14 * 2**6 in table
    assert 0.5 * 2.0**-15 * 2**6 not in table


def test_groups_of_zeros_and_of_nan_do_not_count():
    torch.manual_seed(7)
    x = torch.randn(256, 160)
    x[3, 32:64] = 0.0
    q = quantise(x, MXFP4)
    spread = scale_spread(q.scale.view(torch.uint8))
    assert int(spread.max()) <= LOSSLESS_LOG2
    assert_bits(fake_quant(dequantise(q, MXFP4), FP8_WEIGHT), dequantise(q, MXFP4))
    x[200, 0] = math.nan
    with_nan = quantise(x, MXFP4)
    bytes_with_nan = with_nan.scale.view(torch.uint8)
    assert 255 in bytes_with_nan
    assert int(scale_spread(bytes_with_nan).max()) <= LOSSLESS_LOG2
