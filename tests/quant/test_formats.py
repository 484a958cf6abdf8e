"""Formats against the table-driven reference, everything that can be enumerated enumerated.

All comparisons are bitwise (``assert_bits``): the formats are exact arithmetic, so there is no
tolerance to choose.
"""

import itertools
import math
import struct

import pytest
import torch

from quant.formats import (
    FP8_ACTIVATION,
    FP8_COLUMN,
    FP8_KV,
    FP8_WEIGHT,
    MXFP4,
    BlockFormat,
    Quantised,
    dequantise,
    fake_quant,
    fake_quant_with_scales,
    fp4_code,
    fp4_value,
    pack_fp4,
    quantise,
    scale_byte,
    unpack_fp4,
)
from tests.quant import reference

FORMATS = (MXFP4, FP8_WEIGHT, FP8_ACTIVATION, FP8_KV, FP8_COLUMN)
TABLES = {1: reference.e2m1_magnitudes(), 3: reference.e4m3_magnitudes()}


def assert_bits(a, b):
    """Same dtype, shape and bits; any NaN equals any NaN."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num().view(torch.int32), b.nan_to_num().view(torch.int32))


def assert_matches_reference(x, fmt):
    rows = x.reshape(-1, x.shape[-1])
    _, scales, values = reference.quantise_blocks(
        rows, TABLES[fmt.mantissa_bits], fmt.amax_floor, fmt.rows, fmt.cols
    )
    got, got_scales = fake_quant_with_scales(x, fmt)
    assert_bits(got, values.float().view(x.shape))
    assert torch.equal(got_scales.long().view(scales.shape), scales)
    if fmt.mantissa_bits == 3 or x.shape[-1] % 2 == 0:
        assert_bits(dequantise(quantise(x, fmt), fmt), got)


@pytest.mark.core
def test_fp4_values_are_the_published_table():
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert reference.e2m1_magnitudes() == magnitudes
    got = fp4_value(torch.arange(16, dtype=torch.uint8))
    assert_bits(got, torch.tensor([*magnitudes, *(-m for m in magnitudes)], dtype=torch.float32))


def test_fp4_codes_invert_their_values():
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(fp4_code(fp4_value(codes)), codes)


def test_fp8_torch_dtype_is_the_table():
    # The FP8 codes are written and read through torch's dtype: all 256 of them against the
    # bit-field table.
    codes = torch.arange(256, dtype=torch.uint8)
    table = [*reference.e4m3_magnitudes(), math.nan]
    expected = torch.tensor([*table, *(-m for m in table)], dtype=torch.float32)
    assert_bits(codes.view(torch.float8_e4m3fn).float(), expected)


def test_packing_puts_the_even_column_in_the_low_nibble():
    pairs = torch.cartesian_prod(*[torch.arange(16, dtype=torch.uint8)] * 2)
    packed = pack_fp4(pairs)
    assert packed.dtype == torch.int8
    assert torch.equal(packed.view(torch.uint8).flatten(), pairs[:, 0] + 16 * pairs[:, 1])
    assert torch.equal(unpack_fp4(packed), pairs)


def float_bits(value):
    return struct.unpack("<I", struct.pack("<f", value))[0]


@pytest.mark.parametrize("fmt", FORMATS[:2], ids=lambda f: f.name)
def test_scale_is_exact_at_every_edge(fmt):
    # Every magnitude where the scale may jump (a power of two times the largest element, or a plain
    # power of two), and its float32 neighbours, over the whole range of float32, subnormals
    # included.
    edges = []
    for exponent in range(-149, 128):
        for base in (1.0, fmt.largest / 2 ** math.floor(math.log2(fmt.largest))):
            value = math.ldexp(base, exponent)
            if value < 2.0**-149 or value > 3.4e38:
                continue
            bits = float_bits(value)
            edges += [bits - 1, bits, bits + 1]
    amax = torch.tensor(edges, dtype=torch.int32).view(torch.float32)
    amax = amax[torch.isfinite(amax)]
    expected = [
        reference.scale_exponent(a, fmt.largest, fmt.amax_floor) + 127 for a in amax.tolist()
    ]
    assert scale_byte(amax, fmt).tolist() == expected


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_no_element_saturates_or_could_use_a_smaller_scale(fmt):
    torch.manual_seed(0)
    x = torch.randn(128, 256) * torch.logspace(-3, 3, 128)[:, None]
    _, scale = fake_quant_with_scales(x, fmt)
    full = scale.float().sub(127).exp2()
    full = full.repeat_interleave(fmt.rows, 0).repeat_interleave(fmt.cols, 1)[:128, :256]
    assert bool((x.abs() <= fmt.largest * full).all())
    amax = x.abs().view(128 // fmt.rows, fmt.rows, 256 // fmt.cols, fmt.cols).amax((1, 3))
    assert bool((amax > fmt.largest * scale.float().sub(127).exp2() / 2).all())


@pytest.mark.core
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_random_blocks_match_reference(fmt):
    torch.manual_seed(1)
    x = torch.randn(6, 160) * torch.logspace(-6, 6, 6)[:, None]
    assert_matches_reference(x, fmt)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (2, 3, 40), (130, 6), (5, 200)])
def test_ragged_shapes_match_reference_per_matrix(fmt, shape):
    torch.manual_seed(2)
    x = torch.randn(shape)
    for matrix, whole in zip(
        x.view(-1, *shape[-2:]), fake_quant(x, fmt).view(-1, *shape[-2:]), strict=True
    ):
        assert_matches_reference(matrix, fmt)
        assert_bits(fake_quant(matrix, fmt), whole)


@pytest.mark.core
def test_ties_and_neighbours_of_fp4():
    # Scale 1 (a 6 in the block): every midpoint goes to the even code, its float32 neighbours to
    # the nearer side.
    magnitudes = reference.e2m1_magnitudes()
    points = []
    for low, high in itertools.pairwise(magnitudes):
        middle = torch.tensor((low + high) / 2)
        points += [middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(torch.tensor(9.0))]
    points = torch.stack(points + [-p for p in points])
    block = torch.zeros(len(points), 32)
    block[:, 0], block[:, 5] = 6.0, points
    assert_matches_reference(block, MXFP4)
    ties = fake_quant(block, MXFP4)[: len(points) // 2 : 3, 5]
    assert ties.tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


def test_ties_and_neighbours_of_fp8():
    magnitudes = torch.tensor(reference.e4m3_magnitudes())
    middle = (magnitudes[1:] + magnitudes[:-1]) / 2
    points = torch.cat(
        [middle, middle.nextafter(torch.zeros(())), middle.nextafter(torch.tensor(1e3)), magnitudes]
    )
    x = torch.zeros(2, 8, 128)
    x.view(-1)[: 2 * len(points)] = torch.cat([points, -points])
    x[..., 127] = 448.0
    assert_matches_reference(x, FP8_ACTIVATION)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_subnormals_zeros_and_range_ends(fmt):
    tiny = 2.0**-149
    ends = [
        0.0,
        -0.0,
        tiny,
        -tiny,
        5 * tiny,
        2.0**-126,
        -(2.0**-127),
        6 * 2.0**-126,
        1e-4,
        3.4028235e38,
        -1e38,
    ]
    x = torch.zeros(len(ends) * fmt.rows, max(fmt.cols, 3))
    x[:: fmt.rows, 1] = torch.tensor(ends)
    x[:: fmt.rows, 2] = -0.0
    if fmt.rows > 1:  # the reference is a loop: only the rows that hold something
        for top in range(0, x.shape[0], fmt.rows):
            assert_matches_reference(x[top : top + 2], fmt)
        return
    assert_matches_reference(x, fmt)
    assert bool(torch.signbit(fake_quant(x, fmt)[:, 2]).all())


@pytest.mark.core
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_a_non_finite_value_poisons_its_block_and_no_other(fmt, bad):
    x = torch.ones(2 * fmt.rows, 2 * fmt.cols)
    x[fmt.rows, 0] = bad
    stored = quantise(x, fmt)
    for values in (fake_quant(x, fmt), dequantise(stored, fmt)):
        poisoned = values.isnan()
        assert bool(poisoned[fmt.rows :, : fmt.cols].all())
        assert int(poisoned.sum()) == fmt.rows * fmt.cols
    assert stored.scale.view(torch.uint8).flatten().tolist().count(255) == 1


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_requantising_changes_no_value(fmt):
    # What makes "import the exported checkpoint and run it quantised" give the same logits.
    torch.manual_seed(3)
    once = fake_quant(torch.randn(256, 320) * torch.logspace(-7, 2, 256)[:, None], fmt)
    assert_bits(fake_quant(once, fmt), once)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_give_the_float32_result(fmt, dtype):
    torch.manual_seed(4)
    x = torch.randn(128, 128).to(dtype)
    got = fake_quant(x, fmt)
    assert got.dtype == dtype
    assert_bits(got.float(), fake_quant(x.float(), fmt))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_chunked_work_equals_one_piece(fmt, monkeypatch):
    torch.manual_seed(5)
    x = torch.randn(2, 256, 192)
    whole = fake_quant(x, fmt)
    stored = quantise(x, fmt)
    monkeypatch.setattr("quant.formats._CHUNK", 1)
    assert_bits(fake_quant(x, fmt), whole)
    assert torch.equal(quantise(x, fmt).codes.view(torch.uint8), stored.codes.view(torch.uint8))


def test_non_contiguous_and_empty_inputs():
    torch.manual_seed(6)
    x = torch.randn(4, 6, 96)
    assert_bits(fake_quant(x[..., :64], FP8_KV), fake_quant(x[..., :64].contiguous(), FP8_KV))
    assert_bits(
        fake_quant(x.transpose(0, 1), MXFP4), fake_quant(x, MXFP4).transpose(0, 1).contiguous()
    )
    assert fake_quant(torch.empty(0, 64), MXFP4).shape == (0, 64)


def test_all_fp4_codes_times_all_scales():
    codes = torch.arange(16, dtype=torch.uint8).repeat(2).expand(256, 32)
    scale = torch.arange(256, dtype=torch.uint8)[:, None]
    got = dequantise(Quantised(pack_fp4(codes), scale.view(torch.float8_e8m0fnu)), MXFP4)
    magnitudes = reference.e2m1_magnitudes()
    for byte in range(256):
        for code in range(16):
            value = math.copysign(magnitudes[code & 7], -1 if code & 8 else 1)
            expected = math.nan if byte == 255 else math.ldexp(value, byte - 127)
            actual = float(got[byte, code])
            if math.isnan(expected):
                assert math.isnan(actual)
            elif abs(expected) >= 2.0**128:  # past float32 there is only infinity
                assert actual == math.copysign(math.inf, expected)
            else:
                assert struct.pack("<d", actual) == struct.pack("<d", expected)


def test_all_fp8_codes_times_all_scales():
    codes = torch.arange(256, dtype=torch.uint8).expand(256, 256)
    scale = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 2).contiguous()
    got = dequantise(
        Quantised(codes.contiguous().view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu)),
        FP8_ACTIVATION,
    )
    table = torch.tensor([*reference.e4m3_magnitudes(), math.nan], dtype=torch.float64)
    factor = torch.ldexp(torch.ones(256, 1, dtype=torch.float64), torch.arange(256)[:, None] - 127)
    factor[255] = math.nan
    assert_bits(got, (torch.cat([table, -table]) * factor).float())


@pytest.mark.parametrize("fmt", [MXFP4, FP8_ACTIVATION], ids=lambda f: f.name)
def test_all_codes_times_all_scales_are_written_back(fmt):
    """The writer's side: every value that can be stored is stored as its own code and scale.

    Each block holds every code, its largest too, so its scale is determined. Scales below the
    floor's cannot come out of a cast, nor those with which the largest is beyond float32.
    """
    table = torch.tensor(TABLES[fmt.mantissa_bits])
    table = torch.cat([table, -table])  # FP8: two blocks of one scale
    values = table[: fmt.cols] if fmt.packed else table.view(2, -1)
    values = torch.nn.functional.pad(values, (0, fmt.cols - values.shape[-1]))
    low = reference.scale_exponent(0.0, fmt.largest, fmt.amax_floor) + 127
    byte = torch.arange(low, 255 - math.frexp(fmt.largest)[1] + 1)
    factor = torch.ldexp(torch.ones(len(byte)), byte - 127)
    x = values * factor.view(-1, *(1,) * values.dim())
    assert torch.isfinite(x).all()
    stored = quantise(x, fmt)
    assert torch.equal(stored.scale.view(torch.uint8).flatten().unique(), byte.to(torch.uint8))
    raw = stored.codes.view(torch.uint8)
    codes = unpack_fp4(stored.codes) if fmt.packed else raw
    sign = 8 if fmt.packed else 128
    count = len(table) // 2
    expected = torch.cat([torch.arange(count), torch.arange(count) + sign]).to(torch.uint8)
    rows = values.shape[:-1]
    expected = expected.view(*rows, -1) if rows else expected
    assert (codes[..., : expected.shape[-1]] == expected).all()
    assert_bits(dequantise(stored, fmt), x)


def test_shapes_and_dtypes_of_the_stored_form():
    fp4 = quantise(torch.ones(3, 70, 96), MXFP4)
    assert (fp4.codes.dtype, tuple(fp4.codes.shape)) == (torch.int8, (3, 70, 48))
    assert (fp4.scale.dtype, tuple(fp4.scale.shape)) == (torch.float8_e8m0fnu, (3, 70, 3))
    fp8 = quantise(torch.ones(200, 96), FP8_WEIGHT)
    assert (fp8.codes.dtype, tuple(fp8.codes.shape)) == (torch.float8_e4m3fn, (200, 96))
    assert (fp8.scale.dtype, tuple(fp8.scale.shape)) == (torch.float8_e8m0fnu, (2, 1))


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ValueError, match="float64"):
        fake_quant(torch.ones(2, 32, dtype=torch.float64), MXFP4)
    with pytest.raises(ValueError, match="odd last dim"):
        quantise(torch.ones(2, 33), MXFP4)
    with pytest.raises(ValueError, match="needs a matrix"):
        fake_quant(torch.ones(128), FP8_WEIGHT)
    stored = quantise(torch.ones(2, 64), MXFP4)
    with pytest.raises(ValueError, match="does not belong"):
        dequantise(Quantised(stored.codes, stored.scale[:, :1]), MXFP4)


def test_a_format_is_described_by_its_numbers():
    # The two element types, from the tables: largest value, smallest normal exponent, values per
    # binade.
    for fmt in FORMATS:
        table = TABLES[fmt.mantissa_bits]
        assert isinstance(fmt, BlockFormat)
        assert table[-1] == fmt.largest
        assert table[2**fmt.mantissa_bits] == 2.0**fmt.min_exponent
