"""FP4 seen as FP8: every code at every ratio up to the bound, bitwise; refused beyond it."""

import math

import pytest
import torch

from quant import reference
from quant.formats import FP8_WEIGHT, MXFP4, Quantised, dequantise, fake_quant, pack_fp4, quantise
from quant.lossless import fp4_to_fp8, scale_spread


def assert_bits(a, b):
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num().view(torch.int32), b.nan_to_num().view(torch.int32))


def fp4_block(codes, scale_bytes):
    return Quantised(pack_fp4(codes), scale_bytes.to(torch.uint8).view(torch.float8_e8m0fnu))


@pytest.mark.core
def test_fp4_to_fp8_is_exact_for_all_codes_up_to_the_bound():
    # One 128x128 block whose groups span ratios 2**0 .. 2**14 below the largest, each group all 16
    # codes twice.
    codes = torch.arange(16, dtype=torch.uint8).repeat(8).expand(128, 128)
    for top in (20, 127, 254):
        groups = top - torch.arange(128)[:, None].expand(128, 4) % 15
        q = fp4_block(codes, groups)
        view = fp4_to_fp8(q)
        assert view.scale.view(torch.uint8).tolist() == [[top - 6]]
        assert_bits(dequantise(view, FP8_WEIGHT), dequantise(q, MXFP4))


def test_fp4_to_fp8_refuses_a_wider_spread_which_would_lose_values():
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)[None]
    codes = torch.cat([codes, codes])
    q = fp4_block(codes, torch.tensor([[127], [127 - 15]]))
    assert scale_spread(q.scale.view(torch.uint8)).tolist() == [[15]]
    with pytest.raises(ValueError, match=r"differ by 2\*\*15, the bound is 2\*\*14"):
        fp4_to_fp8(q)
    # Independent evidence that the bound is where it must be: half of 2**-15, seen from 6 at scale
    # 2**0.
    table = reference.e4m3_magnitudes()
    assert 0.5 * 2.0**-14 * 2**6 in table
    assert 0.5 * 2.0**-15 * 2**6 not in table


def test_fp4_to_fp8_ignores_groups_of_zeros_and_keeps_nan_groups_apart():
    torch.manual_seed(7)
    x = torch.randn(256, 160)
    x[3, 32:64] = 0.0
    x[200, 0] = math.nan
    q = quantise(x, MXFP4)
    view = fp4_to_fp8(q)
    assert_bits(dequantise(view, FP8_WEIGHT), dequantise(q, MXFP4))
    assert int(dequantise(view, FP8_WEIGHT).isnan().sum()) == 32


def test_fp4_to_fp8_at_the_bottom_of_the_scale_range():
    # The block's scale byte cannot go below 0: it stays there and nothing is lost.
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)[None]
    q = fp4_block(codes, torch.tensor([[2]]))
    view = fp4_to_fp8(q)
    assert view.scale.view(torch.uint8).tolist() == [[0]]
    assert_bits(dequantise(view, FP8_WEIGHT), dequantise(q, MXFP4))


def test_casting_fp4_values_to_fp8_blocks_gives_the_same_view():
    # So the FP8 pipeline may quantise the FP4 values itself (Transformer Engine does): nothing
    # changes.
    torch.manual_seed(8)
    x = torch.randn(256, 384)
    values = fake_quant(x, MXFP4)
    assert_bits(fake_quant(values, FP8_WEIGHT), values)
    view, again = fp4_to_fp8(quantise(x, MXFP4)), quantise(values, FP8_WEIGHT)
    assert_bits(dequantise(view, FP8_WEIGHT), dequantise(again, FP8_WEIGHT))
