"""mHC against reference B.2: golden values, a float64 oracle written per token, known traps.

Bounds: the oracle and the reference both run in float64, so 1e-12 is rounding. The fast path is
compared in tests/model/kernels.
"""

import functools
import math

import pytest
import torch

from model.config import Kernels, ModelConfig
from model.hyper_connections import HyperConnection, HyperHead, PlainHead, PlainResidual
from model.kernels.mhc import StreamMix, mhc_head, mhc_merge, mhc_pre, sinkhorn
from model.kernels.select import op_names, select

GOLDEN_LOGITS = [[1, 2, 3, 4], [0, 1, 0, 1], [-1, 0, 2, 1], [0.5, 0.5, -0.5, -0.5]]
GOLDEN_COMB = [
    [0.090269, 0.138944, 0.234342, 0.536445],
    [0.270645, 0.416589, 0.095090, 0.217676],
    [0.084874, 0.130639, 0.598933, 0.185553],
    [0.554212, 0.313828, 0.071634, 0.060326],
]


def sigmoid(v):
    return 1.0 / (1.0 + math.exp(-v))


def oracle_weights(x_SD, fn, base, scale, iters, eps):
    """Steps 1-5 of B.2 for one token, in Python floats, index by index."""
    S = len(x_SD)
    flat = [v for stream in x_SD for v in stream]
    rms = 1.0 / math.sqrt(sum(v * v for v in flat) / len(flat) + 1e-6)
    mix = [sum(w * v for w, v in zip(row, flat, strict=True)) * rms for row in fn]
    pre = [sigmoid(scale[0] * mix[j] + base[j]) + 1e-6 for j in range(S)]
    post = [2 * sigmoid(scale[1] * mix[S + k] + base[S + k]) for k in range(S)]
    at = [[2 * S + S * j + k for k in range(S)] for j in range(S)]
    logits = [[scale[2] * mix[i] + base[i] for i in row] for row in at]
    exp = [[math.exp(v - max(row)) for v in row] for row in logits]
    comb = [[v / sum(row) + eps for v in row] for row in exp]
    for step in range(iters):
        if step:
            comb = [[v / (sum(row) + eps) for v in row] for row in comb]
        columns = [sum(comb[j][k] for j in range(S)) + eps for k in range(S)]
        comb = [[row[k] / columns[k] for k in range(S)] for row in comb]
    return pre, post, comb


def oracle_step(x_SD, y_D, fn, base, scale, iters, eps):
    """u (step 6) and the new streams (step 7) of one token."""
    pre, post, comb = oracle_weights(x_SD, fn, base, scale, iters, eps)
    S, D = len(x_SD), len(x_SD[0])
    u = [sum(pre[j] * x_SD[j][d] for j in range(S)) for d in range(D)]
    new = [
        [post[k] * y_D[d] + sum(comb[j][k] * x_SD[j][d] for j in range(S)) for d in range(D)]
        for k in range(S)
    ]
    return u, new


def random_case(S, D, T=3, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    M = (2 + S) * S
    x, y = normal(1, T, S, D) * 3, normal(1, T, D)
    return x, y, normal(M, S * D) * 0.3, normal(M), torch.tensor([0.9, -1.3, 1.7]).double()


def tiny_config(**changes):
    return ModelConfig(hidden_size=8, kernels=Kernels.reference, **changes)


def filled(module):
    g = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=g)
    return module


@pytest.mark.core
def test_sinkhorn_equals_the_golden_values():
    comb = sinkhorn(torch.tensor(GOLDEN_LOGITS, dtype=torch.float64), 20, 1e-6)
    assert (comb - torch.tensor(GOLDEN_COMB, dtype=torch.float64)).abs().max() < 6e-7
    uniform = sinkhorn(torch.zeros(4, 4, dtype=torch.float64), 20, 1e-6)
    assert (uniform - 0.24999975).abs().max() < 1e-9


def test_sinkhorn_softmax_runs_over_destinations_first():
    """One iteration: row softmax + eps, then one column division; rows and columns not swapped."""
    logits = torch.tensor(GOLDEN_LOGITS, dtype=torch.float64)
    soft = logits.softmax(1) + 1e-2
    assert torch.allclose(sinkhorn(logits, 1, 1e-2), soft / (soft.sum(0) + 1e-2), atol=1e-15)


def test_sinkhorn_rows_and_columns_sum_to_one():
    logits = torch.randn(50, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    comb = sinkhorn(logits, 20, 1e-6)
    assert (comb.sum(-2) - 1).abs().max() < 2e-6
    assert (comb.sum(-1) - 1).abs().max() < 1e-3


@pytest.mark.core
@pytest.mark.parametrize(("S", "iters"), [(4, 20), (2, 3), (3, 1)])
def test_reference_equals_the_oracle(S, iters):
    x, y, fn, base, scale = random_case(S, D=5)
    u, mix = mhc_pre(x, fn, base, scale, iters, 1e-6, 1e-6)
    new = mhc_merge(y, mix)
    _, post, comb = mix
    for t in range(x.shape[1]):
        args = (fn.tolist(), base.tolist(), scale.tolist(), iters, 1e-6)
        want_u, want_new = oracle_step(x[0, t].tolist(), y[0, t].tolist(), *args)
        _, want_post, want_comb = oracle_weights(x[0, t].tolist(), *args)
        for got, want in ((u, want_u), (new, want_new), (post, want_post), (comb, want_comb)):
            assert (got[0, t] - torch.tensor(want, dtype=torch.float64)).abs().max() < 1e-12


def test_merge_applies_the_transpose():
    """A comb that sends all of stream 0 to stream 1: source on axis -2, destination on axis -1."""
    x = torch.zeros(1, 1, 4, 2)
    x[0, 0, 0] = torch.tensor([3.0, 5.0])
    comb = torch.zeros(1, 1, 4, 4)
    comb[0, 0, 0, 1] = 1.0
    new = mhc_merge(torch.zeros(1, 1, 2), StreamMix(x, torch.ones(1, 1, 4), comb))
    want = torch.zeros(1, 1, 4, 2)
    want[0, 0, 1] = torch.tensor([3.0, 5.0])
    assert torch.equal(new, want)


def test_post_is_twice_a_sigmoid_without_eps_and_pre_has_one():
    """Base -40: sigmoid is 4e-18, so pre shows its eps alone and post shows none."""
    x, _, fn, base, scale = random_case(4, D=5)
    u, (_, post, _) = mhc_pre(x, fn, base * 0 - 40, scale * 0, 20, 1e-6, 1e-6)
    assert post.max() < 1e-16
    assert torch.allclose(u, x.sum(-2) * 1e-6, rtol=1e-9, atol=0)
    _, (_, post, _) = mhc_pre(x, fn, base * 0 + 40, scale * 0, 20, 1e-6, 1e-6)
    assert torch.equal(post, torch.full_like(post, 2.0))


def test_rms_covers_all_streams_and_keeps_its_eps_inside_the_root():
    """Tiny streams: with eps inside the root the mix shrinks; one norm per stream differs."""
    x, _, fn, base, scale = random_case(4, D=5)
    x = x * 1e-4
    _, (_, post, _) = mhc_pre(x, fn, base, scale, 20, 1e-6, 1e-6)
    flat = x.flatten(-2)
    mix = (flat @ fn.T) / torch.sqrt(flat.square().mean(-1, keepdim=True) + 1e-6)
    assert torch.allclose(post, 2 * torch.sigmoid(scale[1] * mix[..., 4:8] + base[4:8]), atol=1e-12)


def test_head_equals_the_oracle():
    x, _, fn, base, scale = random_case(4, D=5)
    y = mhc_head(x, fn[:4], base[:4], scale[:1], 1e-6, 1e-6)
    for t in range(x.shape[1]):
        fn_list, base_list, scale_list = fn.tolist(), base.tolist(), scale.tolist()
        pre, _, _ = oracle_weights(x[0, t].tolist(), fn_list, base_list, scale_list, 1, 1e-6)
        want = (torch.tensor(pre, dtype=torch.float64)[:, None] * x[0, t]).sum(0)
        assert (y[0, t] - want).abs().max() < 1e-12


@pytest.mark.parametrize("gamma", [False, True])
def test_connection_parameters_and_dtypes(gamma):
    with torch.device("meta"):
        connection, head = (f(tiny_config(hc_gamma=gamma)) for f in (HyperConnection, HyperHead))
    shapes = {name: tuple(p.shape) for name, p in connection.named_parameters()}
    extra = {"gamma": (32,)} if gamma else {}
    assert shapes == {"fn": (24, 32), "base": (24,), "scale": (3,), **extra}
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    assert shapes == {"fn": (4, 32), "base": (4,), "scale": (1,), **extra}


def test_connection_runs_bf16_streams_with_fp32_weights():
    connection, head = filled(HyperConnection(tiny_config())), filled(HyperHead(tiny_config()))
    x = torch.randn(2, 3, 4, 8).bfloat16()
    u, mix = connection(x)
    new = connection.merge(u, mix)
    _, post, comb = mix
    assert (u.dtype, new.dtype, head(x).dtype) == (torch.bfloat16,) * 3
    assert (post.dtype, comb.dtype) == (torch.float32, torch.float32)
    assert (u.shape, post.shape, comb.shape) == ((2, 3, 8), (2, 3, 4), (2, 3, 4, 4))


def test_gamma_equals_a_folded_projection():
    """reference B.2: mix = r * (x * gamma) fn^T, and the released fn is fn * gamma."""
    with_gamma = filled(HyperConnection(tiny_config(hc_gamma=True)))
    folded = filled(HyperConnection(tiny_config()))
    folded.fn.data = with_gamma.fn.data * with_gamma.gamma.data
    folded.base.data, folded.scale.data = with_gamma.base.data, with_gamma.scale.data
    x = torch.randn(1, 5, 4, 8)
    (u, mix), (want_u, want_mix) = with_gamma(x), folded(x)
    for got, want in zip((u, *mix), (want_u, *want_mix), strict=True):
        assert torch.equal(got, want)


def test_plain_residual_is_x_plus_y():
    plain, head = PlainResidual(), PlainHead()
    x, y = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 8)
    u, mix = plain(x)
    assert torch.equal(u, x[:, :, 0])
    assert torch.equal(head(plain.merge(y, mix)), x[:, :, 0] + y)
    assert list(plain.parameters()) == []


def test_select_refuses_unknown_names():
    with pytest.raises(ValueError, match=r"unknown op 'mhc_prefix'.*mhc_pre"):
        select("mhc_prefix", Kernels.fast)
    with pytest.raises(ValueError, match=r"model\.kernels='quick'"):
        select("mhc_pre", "quick")
    for name in op_names():
        for kernels in Kernels:
            assert callable(select(name, kernels))
    served = select("mhc_pre", Kernels.reference)
    assert isinstance(served, functools.partial)
    assert served.args[-1] is mhc_pre, "counted, but the reference itself"
