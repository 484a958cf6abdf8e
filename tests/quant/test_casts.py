"""Hadamard, indexer and KV casts against definitions written out here."""

import pytest
import torch

from quant.formats import FP8_KV, MXFP4, fake_quant
from quant.indexer import IndexerCast, hadamard, hadamard_matrix
from quant.kv import KVCast
from quant.probe import QuantProbe
from tests.quant import reference


def sylvester(size):
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < size:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
    return h


@pytest.mark.parametrize("size", [1, 2, 16, 32, 128])
def test_hadamard_is_sylvesters(size):
    assert torch.equal(hadamard_matrix(size).double(), sylvester(size))


@pytest.mark.core
def test_hadamard_is_orthonormal_and_its_own_inverse():
    torch.manual_seed(0)
    q, k = torch.randn(5, 128), torch.randn(7, 128)
    oracle = q.double() @ sylvester(128) * 128**-0.5
    # fp32 sums of 128 terms of size about 1: 1e-5 is some 80 ulp.
    assert torch.allclose(hadamard(q).double(), oracle, atol=1e-5, rtol=0)
    assert torch.allclose(hadamard(hadamard(q)), q, atol=1e-5, rtol=0)
    assert torch.allclose(hadamard(q) @ hadamard(k).T, q @ k.T, atol=1e-4, rtol=0)


def test_hadamard_refuses_other_sizes():
    with pytest.raises(ValueError, match="power of two, got 48"):
        hadamard_matrix(48)


def test_indexer_cast_is_hadamard_then_fp4_and_passes_gradients_back_through_hadamard():
    torch.manual_seed(1)
    probe = QuantProbe()
    x = torch.randn(2, 3, 4, 64, requires_grad=True)
    y = IndexerCast("q", probe)(x)
    rotated = hadamard(x.detach()).view(-1, 64)
    _, _, values = reference.quantise_blocks(
        rotated, reference.e2m1_magnitudes(), MXFP4.amax_floor, 1, 32
    )
    assert torch.equal(y.detach().view(-1, 64), values.float())
    grad = torch.randn_like(y)
    y.backward(grad)
    oracle = grad.double() @ sylvester(64) / 8
    assert torch.allclose(x.grad.double(), oracle, atol=1e-5, rtol=0)
    assert probe.ran["q"] == 1


@pytest.mark.core
def test_kv_cast_rounds_latent_dims_to_fp8_and_rope_dims_to_bf16():
    torch.manual_seed(2)
    probe = QuantProbe()
    x = torch.randn(2, 5, 200, requires_grad=True)
    y = KVCast(72, "kv", probe)(x)
    latent = x.detach()[..., :128].reshape(-1, 128)
    _, _, values = reference.quantise_blocks(
        latent, reference.e4m3_magnitudes(), FP8_KV.amax_floor, 1, 64
    )
    assert torch.equal(y.detach()[..., :128].reshape(-1, 128), values.float())
    assert torch.equal(y.detach()[..., 128:], x.detach()[..., 128:].bfloat16().float())
    grad = torch.randn_like(y)
    y.backward(grad)
    assert torch.equal(x.grad, grad)


def test_kv_cast_with_nothing_but_rope_dims():
    x = torch.randn(3, 16)
    assert torch.equal(KVCast(16, "kv", QuantProbe())(x), x.bfloat16().float())


def test_probe_measures_what_the_reference_counts():
    torch.manual_seed(3)
    x = torch.randn(130, 64) * torch.logspace(0, 4, 130)[:, None]
    x[0, :32] = 0.0
    probe = QuantProbe()
    probe.measure("experts", x, MXFP4, weight="w")
    assert probe.metrics() == {}  # not a measured step
    probe.begin_step(monitors=True)
    probe.measure("experts", x, MXFP4, weight="w")
    got = probe.metrics()
    codes, scales, values = reference.quantise_blocks(
        x, reference.e2m1_magnitudes(), MXFP4.amax_floor, 1, 32
    )
    error = (values - x.double()).square().sum() / x.double().square().sum()
    ratio = got["quant_error_experts.sum"] / got["quant_error_experts.count"]
    assert abs(float(ratio) / float(error) - 1) < 1e-5
    assert int(got["quant_zeroed_experts.sum"]) == int(((codes == 0) & (x != 0)).sum())
    assert int(got["quant_saturated_experts.sum"]) == int((codes == 7).sum())
    assert int(got["quant_saturated_experts.count"]) == x.numel()
    empty = (values.view(130, 2, 32) == 0).all(-1)
    spreads = []
    for rows in (slice(0, 128), slice(128, 130)):
        kept = scales[rows][~empty[rows]]
        spreads.append(int(kept.max() - kept.min()))
    assert int(got["quant_scale_log2_experts.sum"]) == sum(spreads)
    assert int(got["quant_scale_log2_experts.count"]) == 2
    assert fake_quant(x, MXFP4).shape == x.shape


def test_probe_counts_blocks_beyond_the_lossless_bound():
    x = torch.ones(2, 32)
    x[1] = 2.0**-15
    probe = QuantProbe()
    probe.begin_step(monitors=True)
    probe.measure("experts", x, MXFP4, weight="w")
    assert int(probe.metrics()["quant_lossy_experts.sum"]) == 1
    probe.begin_step(monitors=True)
    x[1] = 2.0**-14
    probe.measure("experts", x, MXFP4, weight="w")
    assert int(probe.metrics()["quant_lossy_experts.sum"]) == 0
