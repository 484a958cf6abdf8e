"""Rounding to blocks in Triton, bit for bit that of quant/formats.py, in the interpreter.

tests/quant/test_formats.py proves quant/formats.py against tables.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model.kernels.triton import fake_quant as triton_quant
from quant import formats
from tests.model.kernels.triton.checks import poisoned, shuffled

FORMATS = [
    formats.MXFP4, formats.FP8_WEIGHT, formats.FP8_ACTIVATION, formats.FP8_COLUMN, formats.FP8_KV
]  # fmt: skip
BF16, F16 = torch.bfloat16, torch.float16


def hard(shape):
    """Magnitudes of every exponent, both zeros, subnormals, and ties of FP4 and FP8."""
    x = torch.randn(shape) * 2.0 ** torch.randint(-140, 120, (*shape[:-1], 1)).float()
    flat = x.flatten()
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 0.25, -0.75, 1.25, 2.5, 5.0, 17 / 16, 448.0])
    places = torch.randperm(flat.numel())[: flat.numel() // 5]
    flat[places] = special[torch.randint(len(special), (len(places),))]
    return flat.view(shape)


def assert_same(x, fmt, dtype=None):
    expected, scales = formats.fake_quant_with_scales(x, fmt, dtype)
    with poisoned(), shuffled(0):
        got, got_scales = triton_quant.fake_quant_with_scales(x, fmt, dtype)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert torch.equal(got_scales, scales)
    assert torch.equal(got.isnan(), expected.isnan())
    bits = torch.int32 if got.element_size() == 4 else torch.int16
    numbers = expected.isfinite()
    assert torch.equal(got[numbers].view(bits), expected[numbers].view(bits))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(3, 130, 260), (2, 5, 31), (1, 128, 128), (4, 1, 1)])
def test_every_format_and_ragged_shapes(fmt, shape):
    assert_same(hard(shape), fmt)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize(("dtype", "out"), [(BF16, None), (F16, torch.float32), (None, BF16)])
def test_dtypes(fmt, dtype, out):
    x = torch.randn(3, 70) if dtype is None else torch.randn(3, 70).to(dtype)
    assert_same(x, fmt, out)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_block_that_is_not_finite_becomes_nan(fmt, bad):
    x = torch.randn(130, 200)
    x[1, 40], x[129, 199] = bad, bad
    assert_same(x, fmt)
    assert triton_quant.fake_quant(x, fmt)[1, 40].isnan()


def test_every_magnitude_near_an_edge_of_the_scale():
    """Largest elements times every power of two, and the floats next to them."""
    for fmt in (formats.MXFP4, formats.FP8_KV):
        tops = fmt.largest * 2.0 ** torch.arange(-126, 119).float()
        around = [tops, tops.nextafter(torch.tensor(torch.inf)), tops.nextafter(torch.tensor(0.0))]
        x = torch.randn(3 * len(tops), fmt.cols) * 1e-3
        x = x * torch.cat(around)[:, None]
        x[:, 0] = torch.cat(around)
        assert_same(x, fmt)


def test_blocks_of_vectors_and_of_nothing():
    assert_same(torch.randn(70), formats.MXFP4)
    assert_same(torch.randn(0, 64), formats.MXFP4)
    assert_same(torch.randn(2, 0, 64), formats.FP8_WEIGHT)
    assert_same(torch.randn(6, 4).t(), formats.MXFP4)


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(ValueError, match="rounded twice"):
        triton_quant.fake_quant(torch.zeros(2, 2, dtype=torch.float64), formats.MXFP4)
    with pytest.raises(ValueError, match=r"128 rows need a matrix, got shape \(4,\)"):
        triton_quant.fake_quant(torch.zeros(4), formats.FP8_WEIGHT)


@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_a_call_traces_and_reads_nothing(kind):
    mode = FakeTensorMode()
    x = torch.randn(2, 130, 70)
    traced = mode.from_tensor(x) if kind == "fake" else x.to("meta")
    with mode if kind == "fake" else torch.device("meta"):
        got = triton_quant.fake_quant_with_scales(traced, formats.FP8_WEIGHT, BF16)
    real = formats.fake_quant_with_scales(x, formats.FP8_WEIGHT, BF16)
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in real]


def test_a_planted_fault_is_caught(monkeypatch):
    """The floor rule of scales instead of the ceil rule."""
    plain = triton_quant._numbers

    def floored(*numbers):
        floor, carry, *rest = plain(*numbers)
        return floor, carry - 1, *rest

    monkeypatch.setattr(triton_quant, "_numbers", floored)
    with pytest.raises(AssertionError):
        test_every_magnitude_near_an_edge_of_the_scale()
