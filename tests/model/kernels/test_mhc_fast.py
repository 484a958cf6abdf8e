"""Fused mHC against the float64 reference, which tests/model/test_hyper_connections.py proves.

Bound: the error against float64 is at most 2x that of the fp32 (bf16) reference, which runs the
same formula with other rounding; the floor of 1e-6 (1e-3: a third of a bf16 rounding) covers
tensors where the reference happens to be lucky. Sizes leave the last tile of 16 tokens and the last
vector of a row partly filled.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from model.config import Kernels, ModelConfig
from model.hyper_connections import HyperConnection, HyperHead
from model.kernels import mhc, mhc_fast, mhc_ops

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(params=["compiled", "torch"])
def implementation(request, monkeypatch):
    """Both implementations of the operators; a compiler is promised wherever the tests run."""
    if request.param == "torch":
        monkeypatch.setattr(mhc_ops, "_compiled", lambda streams: None)
    assert (mhc_ops._compiled(4) is not None) == (request.param == "compiled")
    return request.param


def make_case(N, S, D, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    M = (2 + S) * S
    return {
        "x": normal(1, N, S, D).to(dtype),
        "y": normal(1, N, D).to(dtype),
        "fn": normal(M, S * D) * 0.1,
        "base": normal(M),
        "scale": torch.tensor([0.9, 1.3, 1.7]).double(),
        "head_fn": normal(S, S * D) * 0.1,
        "to_u": normal(1, N, D).to(dtype),
        "to_new": normal(1, N, S, D).to(dtype),
        "to_comb": normal(1, N, S, S).float(),
    }


def run(module, case, dtype, parameter_dtype):
    """Outputs and gradients of pre, merge and head, with a gradient into every output."""
    wide = {"fn", "base", "scale", "head_fn"}
    t = {k: v.clone().to(parameter_dtype if k in wide else dtype) for k, v in case.items()}
    inputs = {k: v.requires_grad_() for k, v in t.items() if not k.startswith("to_")}
    S = t["x"].shape[-2]
    u, mix = module.mhc_pre(t["x"], t["fn"], t["base"], t["scale"], 20, 1e-6, 1e-6)
    new = module.mhc_merge(t["y"], mix)
    head = module.mhc_head(new, t["head_fn"], t["base"][:S], t["scale"][:1], 1e-6, 1e-6)
    out = {"u": u, "new": new, "head": head, "post": mix.post_BTS, "comb": mix.comb_BTSS}
    weights = {"u": "to_u", "new": "to_new", "head": "to_u", "comb": "to_comb"}
    total = sum((out[k].to(parameter_dtype) * t[w]).sum() for k, w in weights.items())
    total.backward()
    return out | {f"d{k}": v.grad for k, v in inputs.items()}


def distance(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.core
@pytest.mark.parametrize(
    ("N", "S", "D", "dtype"),
    [(37, 4, 64, F32), (5, 4, 37, F32), (33, 3, 7, F32), (37, 4, 64, BF16), (19, 4, 50, BF16)],
)
def test_fused_is_as_close_to_float64_as_the_reference(N, S, D, dtype, implementation):
    case = make_case(N, S, D, dtype)
    exact = run(mhc, case, torch.float64, torch.float64)
    plain = run(mhc, case, dtype, F32)
    fused = run(mhc_fast, case, dtype, F32)
    floor = 1e-6 if dtype is F32 else 1e-3
    for name, want in exact.items():
        assert fused[name].dtype == plain[name].dtype, name
        assert fused[name].shape == plain[name].shape, name
        bound = 2 * distance(plain[name], want) + floor
        assert distance(fused[name], want) <= bound, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_fused_on_a_gpu_is_as_close_to_float64(dtype):
    case = make_case(37, 4, 64, dtype)
    exact = run(mhc, case, torch.float64, torch.float64)
    on_gpu = {k: v.cuda() for k, v in case.items()}
    plain, fused = (run(module, on_gpu, dtype, F32) for module in (mhc, mhc_fast))
    for name, want in exact.items():
        bound = 2 * distance(plain[name].cpu(), want) + (1e-6 if dtype is F32 else 1e-3)
        assert distance(fused[name].cpu(), want) <= bound, name


def test_extreme_logits_stay_finite_and_exact(implementation):
    """Base +-60 saturates every gate and makes comb a near permutation."""
    case = make_case(17, 4, 16, F32)
    case["base"] = 60 * torch.sign(case["base"])
    exact = run(mhc, case, torch.float64, torch.float64)
    fused = run(mhc_fast, case, F32, F32)
    for name in ("u", "new", "post", "comb"):
        assert (fused[name].double() - exact[name]).abs().max() < 2e-5, name
    assert all(value.isfinite().all() for value in fused.values())


def test_nan_in_one_token_stays_in_that_token(implementation):
    case = make_case(20, 4, 16, F32)
    case["x"][0, 7, 2, 3] = float("nan")
    fused = run(mhc_fast, case, F32, F32)
    for name in ("u", "new", "post", "comb", "dx", "dy"):
        bad = fused[name][0].flatten(1).isnan().any(1)
        assert bad.nonzero().flatten().tolist() == [7], name
    assert fused["dfn"].isnan().any()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_token_does_not_depend_on_its_neighbours(dtype):
    """Bitwise: alone, in another tile, or among others; and for any number of threads."""
    case = make_case(50, 4, 40, dtype)
    names = ("u", "new", "post", "comb", "dx", "dy")
    whole = run(mhc_fast, case, dtype, F32)
    tokens = {"x", "y", "to_u", "to_new", "to_comb"}
    part = {k: v[:, 21:47] if k in tokens else v for k, v in case.items()}
    some = run(mhc_fast, part, dtype, F32)
    for name in names:
        assert torch.equal(some[name], whole[name][:, 21:47]), name


def test_equal_bits_twice_and_token_results_for_any_thread_count():
    case = make_case(90, 4, 24, F32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first, second = run(mhc_fast, case, F32, F32), run(mhc_fast, case, F32, F32)
        torch.set_num_threads(1)
        single = run(mhc_fast, case, F32, F32)
    finally:
        torch.set_num_threads(threads)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        if name in ("u", "new", "post", "comb", "dx", "dy"):
            assert torch.equal(value, single[name]), name
        else:
            assert distance(value, single[name].double()) < 1e-6, name


@pytest.mark.parametrize("used", ["u", "new", "post", "comb"])
def test_gradient_through_one_output_alone(used, implementation):
    case = make_case(9, 4, 16, F32)
    grads = []
    for module, dtype in ((mhc, torch.float64), (mhc, F32), (mhc_fast, F32)):
        x = case["x"].clone().to(dtype).requires_grad_()
        weights = [case[k].to(dtype) for k in ("fn", "base", "scale")]
        u, mix = module.mhc_pre(x, *weights, 20, 1e-6, 1e-6)
        out = {"u": u, "post": mix.post_BTS, "comb": mix.comb_BTSS}
        out["new"] = module.mhc_merge(case["y"].to(dtype), mix)
        (out[used] * torch.arange(out[used].numel()).sin().view_as(out[used])).sum().backward()
        grads.append(x.grad)
    exact, plain, fused = grads
    assert distance(fused, exact) <= 2 * distance(plain, exact) + 1e-6


def connections(kernels, gamma=False):
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=24, kernels=kernels, hc_gamma=gamma)
    modules = torch.nn.ModuleList([HyperConnection(config), HyperHead(config)])
    for p in modules.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return modules


@pytest.mark.parametrize("gamma", [False, True])
def test_modules_agree_between_kernels_and_under_checkpointing(gamma):
    """Two sublayers in a chain, so that gradients of streams accumulate through both uses."""
    x = torch.randn(2, 5, 4, 24)

    def sublayer(connection, x):
        u, mix = connection(x)
        return connection.merge(torch.tanh(u), mix)

    def grads(kernels, recompute):
        connection, head = modules = connections(kernels, gamma)
        streams = x.clone().requires_grad_()
        out = streams
        for _ in range(2):
            if recompute:
                out = checkpoint(sublayer, connection, out, use_reentrant=False)
            else:
                out = sublayer(connection, out)
        head(out).square().sum().backward()
        return [streams.grad, *(p.grad for p in modules.parameters())]

    plain, fused = grads(Kernels.reference, False), grads(Kernels.fast, False)
    for want, got in zip(plain, fused, strict=True):
        assert distance(got, want.double()) < 5e-6
    for want, got in zip(fused, grads(Kernels.fast, True), strict=True):
        assert torch.equal(want, got)


def test_operators_have_shapes_without_data():
    with FakeTensorMode():
        connection, head = connections(Kernels.fast)
        x = torch.randn(2, 5, 4, 24, dtype=BF16, requires_grad=True)
        u, mix = connection(x)
        y = head(connection.merge(u, mix))
        y.sum().backward()
        assert (y.shape, y.dtype) == ((2, 5, 24), BF16)
        assert x.grad.shape == x.shape


def test_no_tokens_at_all(implementation):
    fused = run(mhc_fast, make_case(0, 4, 16, F32), F32, F32)
    assert fused["new"].shape == (1, 0, 4, 16)
    assert fused["dfn"].abs().max() == 0


def test_dtypes_that_the_kernels_do_not_serve_are_refused():
    connection, head = connections(Kernels.fast)
    with pytest.raises(ValueError, match=r"float32 or bfloat16 streams, not torch\.float64"):
        connection(torch.randn(1, 2, 4, 24).double())
    _, mix = connection(torch.randn(1, 2, 4, 24).bfloat16())
    with pytest.raises(ValueError, match=r"output torch\.float32, streams torch\.bfloat16"):
        connection.merge(torch.randn(1, 2, 24), mix)
    with pytest.raises(ValueError, match="parameters must be fp32"):
        head.bfloat16()(torch.randn(1, 2, 4, 24))
