"""Muon's whole update against the formula of algorithm 1 in float64, on every kind of matrix.

The oracle here is written again from the paper: a loop over matrices, parameters and steps, with a
singular value decomposition in place of Newton-Schulz where the claim is about the maths. fp32
bounds are those of test_newton_schulz.py.
"""

import math

import pytest
import torch
from torch.nn import Parameter

import optim.muon
from optim.config import MatmulDtype, MuonConfig, NewtonSchulzIterations, UpdateScale
from optim.muon import Muon, MuonEntry, expand, matmul_dtype
from optim.newton_schulz import newton_schulz, newton_schulz_reference
from tests.helpers import relative

LR, DECAY = 0.02, 0.1
KINDS = {
    # name: (shape, independent matrices)
    "tall": ((30, 12), 1),
    "wide": ((12, 30), 1),
    "square": ((16, 16), 1),
    "experts": ((5, 8, 20), 5),
    "experts_down": ((5, 20, 8), 5),
    "wo_a": ((24, 20), 3),
    "row": ((1, 16), 1),
}


def fp32_config(**kwargs):
    return MuonConfig(dtype=MatmulDtype.fp32, **kwargs)


def matrices(tensor, count):
    return tensor.reshape(count, -1, tensor.shape[-1])


def oracle_step(weight, momentum, grad, count, config, lr):
    """Algorithm 1 of section 2.4, float64, one matrix at a time; returns weight, momentum."""
    momentum = config.momentum * momentum + grad
    direction = config.momentum * momentum + grad if config.nesterov else momentum
    update = torch.stack(
        [
            newton_schulz_reference(m, expand(config)) * math.sqrt(max(m.shape)) * config.rms
            for m in matrices(direction, count)
        ]
    ).view(weight.shape)
    return weight * (1 - lr * DECAY) - lr * update, momentum


def make(kinds=KINDS, config=None, state_dtype=torch.float32):
    parameters = {name: Parameter(torch.randn(shape)) for name, (shape, _) in kinds.items()}
    entries = [
        MuonEntry(n, parameters[n], DECAY, num_matrices=count) for n, (_, count) in kinds.items()
    ]
    return parameters, Muon(entries, config or fp32_config(), state_dtype)


@pytest.mark.core
@pytest.mark.parametrize("kind", KINDS)
def test_first_update_is_the_polar_factor_of_the_gradient(kind):
    shape, count = KINDS[kind]
    parameters, muon = make({kind: KINDS[kind]})
    before = parameters[kind].detach().clone()
    grad = torch.randn(shape)
    parameters[kind].grad = grad.clone()
    muon.step(LR, [kind])
    update = (before * (1 - LR * DECAY) - parameters[kind].detach()) / LR
    u, _, vt = torch.linalg.svd(matrices(grad, count).double(), full_matrices=False)
    side = max(matrices(grad, count).shape[1:])
    assert relative(matrices(update, count), u @ vt * math.sqrt(side) * 0.18) < 1e-3


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "row"])
def test_update_has_the_root_mean_square_of_the_config(kind):
    # sqrt(max) U of a full-rank [n, m] has n m entries of mean square 1.
    parameters, muon = make({kind: KINDS[kind]})
    before = parameters[kind].detach().clone()
    parameters[kind].grad = torch.randn(KINDS[kind][0])
    muon.step(LR, [kind])
    update = (before * (1 - LR * DECAY) - parameters[kind].detach()) / LR
    assert update.square().mean().sqrt().item() == pytest.approx(0.18, rel=1e-3)


@pytest.mark.core
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("chunk_elements", [2**19, 500, 1])
def test_six_steps_match_float64(nesterov, chunk_elements, monkeypatch):
    # Small chunks cut stacks in the middle and mix parameters of one shape.
    monkeypatch.setitem(optim.muon.CHUNK_ELEMENTS, "cpu", chunk_elements)
    kinds = {**KINDS, "wide2": ((12, 30), 1), "experts2": ((3, 8, 20), 3)}
    config = fp32_config(nesterov=nesterov)
    parameters, muon = make(kinds, config)
    oracle = {n: (p.detach().double(), torch.zeros_like(p).double()) for n, p in parameters.items()}
    for step in range(6):
        lr = LR / (1 + step)
        for name, p in parameters.items():
            p.grad = torch.randn_like(p)
            oracle[name] = oracle_step(*oracle[name], p.grad.double(), kinds[name][1], config, lr)
        muon.step(lr, kinds)
    for name, (weight, momentum) in oracle.items():
        assert relative(parameters[name].detach(), weight) < 1e-5, name
        assert relative(muon.state[name]["momentum"], momentum) < 1e-6, name


def test_chunks_mix_parameters_of_a_shape_and_keep_to_their_size(monkeypatch):
    sizes = []

    def record(batch, *args):
        sizes.append(tuple(batch.shape))
        return newton_schulz(batch, *args)

    monkeypatch.setitem(optim.muon.CHUNK_ELEMENTS, "cpu", 3 * 8 * 20)
    monkeypatch.setattr(optim.muon, "newton_schulz", record)
    kinds = {"a": ((5, 8, 20), 5), "b": ((8, 20), 1), "c": ((2, 8, 20), 2), "d": ((20, 8), 1)}
    parameters, muon = make(kinds)
    muon.step(LR, kinds)
    assert sizes == [(3, 8, 20), (3, 8, 20), (2, 8, 20), (1, 20, 8)]


def test_experts_move_as_if_they_were_alone():
    parameters, muon = make({"experts": ((4, 8, 20), 4)})
    stack = parameters["experts"]
    alone = [Parameter(m.clone()) for m in stack.detach()]
    stack.grad = torch.randn_like(stack)
    stack.grad[2] = 0  # no token was routed to it
    muon.step(LR, ["experts"])
    for expert, parameter in enumerate(alone):
        single = Muon(
            [MuonEntry("x", parameter, DECAY, num_matrices=1)], fp32_config(), torch.float32
        )
        parameter.grad = stack.grad[expert].clone()
        single.step(LR, ["x"])
        assert relative(stack.detach()[expert], parameter.detach()) < 1e-6
    assert relative(stack.detach()[2], alone[2].detach()) == 0


def test_zero_gradient_only_decays():
    parameters, muon = make({"wide": KINDS["wide"]})
    before = parameters["wide"].detach().clone()
    parameters["wide"].grad = torch.zeros_like(before)
    muon.step(LR, ["wide"])
    assert torch.equal(parameters["wide"].detach(), before * (1 - LR * DECAY))


def test_missing_gradient_counts_as_zero():
    both = []
    for missing in (True, False):
        torch.manual_seed(1)
        parameters, muon = make({"wide": KINDS["wide"]})
        p = parameters["wide"]
        p.grad = torch.randn_like(p)
        muon.step(LR, ["wide"])
        p.grad = None if missing else torch.zeros_like(p)
        muon.step(LR, ["wide"])
        both.append((p.detach(), muon.state["wide"]["momentum"]))
    assert torch.equal(both[0][0], both[1][0])
    assert torch.equal(both[0][1], both[1][1])


def test_unnamed_parameters_stand_still():
    parameters, muon = make()
    for p in parameters.values():
        p.grad = torch.randn_like(p)
    muon.step(LR, KINDS)
    before = {n: p.detach().clone() for n, p in parameters.items()}
    momentum = {n: s["momentum"].clone() for n, s in muon.state.items()}
    assert muon.step(LR, ["tall", "experts"]) == ["tall", "experts"]
    for name, p in parameters.items():
        still = name not in ("tall", "experts")
        assert torch.equal(p.detach(), before[name]) == still
        assert torch.equal(muon.state[name]["momentum"], momentum[name]) == still


def test_gradient_in_another_memory_format_is_the_same_gradient():
    results = []
    for transposed in (False, True):
        torch.manual_seed(2)
        parameters, muon = make({"experts": KINDS["experts"]})
        p = parameters["experts"]
        grad = torch.randn_like(p)
        p.grad = grad.mT.contiguous().mT if transposed else grad
        muon.step(LR, ["experts"])
        results.append(p.detach())
    assert torch.equal(*results)


def test_bf16_momentum_is_rounded_only_in_storage():
    parameters, muon = make({"wide": KINDS["wide"]}, state_dtype=torch.bfloat16)
    reference, exact = make({"wide": KINDS["wide"]})
    reference["wide"].data.copy_(parameters["wide"].data)
    for _ in range(4):
        grad = torch.randn(KINDS["wide"][0])
        for p in (parameters["wide"], reference["wide"]):
            p.grad = grad.clone()
        muon.step(LR, ["wide"])
        exact.step(LR, ["wide"])
    assert muon.state["wide"]["momentum"].dtype == torch.bfloat16
    # Four roundings of 2^-9 relative each, amplified by the small singular values.
    assert relative(parameters["wide"].detach(), reference["wide"].detach()) < 1e-2
    first, second = muon.state["wide"]["momentum"], exact.state["wide"]["momentum"]
    assert relative(first, second) < 1e-2


def test_stages_come_from_the_config():
    config = fp32_config(newton_schulz=[NewtonSchulzIterations(1, 2.0, -1.5, 0.5)] * 2)
    assert expand(config) == [(2.0, -1.5, 0.5)] * 2
    parameters, muon = make({"square": KINDS["square"]}, config)
    p = parameters["square"]
    p.grad = torch.randn_like(p)
    weight, _ = oracle_step(
        p.detach().double(), torch.zeros_like(p).double(), p.grad.double(), 1, config, LR
    )
    muon.step(LR, ["square"])
    assert relative(p.detach(), weight) < 1e-6


def test_dtype_is_what_was_asked_or_what_the_device_multiplies():
    cpu = torch.device("cpu")
    assert matmul_dtype(MatmulDtype.fp32, cpu) == torch.float32
    assert matmul_dtype(MatmulDtype.bf16, cpu) == torch.bfloat16
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    assert matmul_dtype(MatmulDtype.auto, cpu) == (torch.bfloat16 if native else torch.float32)
    assert matmul_dtype(MatmulDtype.auto, torch.device("meta")) == torch.float32


@pytest.mark.core
@pytest.mark.parametrize(
    ("adjust_lr_fn", "own"),
    [("match_rms_adamw", {"rms": 0.2}), ("original", {"scale": UpdateScale.original})],
)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (16, 16)])
def test_config_of_torchs_muon_moves_as_torch_optim_muon(
    shape, nesterov, adjust_lr_fn, own, monkeypatch
):
    """Five classic iterations and either rule for the size of an update, over three steps.

    torch iterates in bf16; the cast is taken away, so that both compute in fp32: 1e-4 of the
    weight's own movement, since five of these iterations do not contract rounding errors.
    """
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    classic = [NewtonSchulzIterations(5, 3.4445, -4.7750, 2.0315)]
    config = fp32_config(nesterov=nesterov, newton_schulz=classic, **own)
    parameters, muon = make({"w": (shape, 1)}, config)
    start = parameters["w"].detach().clone()
    theirs = Parameter(start.clone())
    peer = torch.optim.Muon(
        [theirs], lr=LR, weight_decay=DECAY, momentum=config.momentum, nesterov=nesterov,
        adjust_lr_fn=adjust_lr_fn,
    )  # fmt: skip
    for _ in range(3):
        theirs.grad = torch.randn(shape)
        parameters["w"].grad = theirs.grad.clone()
        muon.step(LR, ["w"])
        peer.step()
    moved = theirs.detach() - start
    assert relative(parameters["w"].detach() - start, moved) < 1e-4
