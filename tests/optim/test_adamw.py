"""AdamW against its formula in float64, step by step (reference C.1: betas 0.9/0.95, eps 1e-20)."""

import pytest
import torch
from torch.nn import Parameter

from optim.adamw import AdamW
from optim.config import AdamWConfig
from optim.owned import OwnedParameter

LR = 0.01


def oracle_steps(weight, grads, config, decay):
    """Loshchilov and Hutter's decoupled form, float64."""
    b1, b2 = config.betas
    m, v = torch.zeros_like(weight), torch.zeros_like(weight)
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
        weight = weight * (1 - LR * decay) - LR * m_hat / (v_hat.sqrt() + config.eps)
    return weight, m, v


def run(parameter, grads, decay=0.1, state_dtype=torch.float32, config=None):
    adamw = AdamW([OwnedParameter("w", parameter, decay)], config or AdamWConfig(), state_dtype)
    for grad in grads:
        parameter.grad = grad
        adamw.step(LR, ["w"])
    return adamw


@pytest.mark.core
@pytest.mark.parametrize("shape", [(37, 5), (1,), (64,)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_seven_steps_match_float64(shape, decay):
    parameter = Parameter(torch.randn(shape))
    grads = [torch.randn(shape) for _ in range(7)]
    wanted = oracle_steps(
        parameter.detach().double(), [g.double() for g in grads], AdamWConfig(), decay
    )
    adamw = run(parameter, grads, decay)
    state = adamw.state["w"]
    for ours, exact in zip((parameter, state["exp_avg"], state["exp_avg_sq"]), wanted, strict=True):
        torch.testing.assert_close(ours.detach().double(), exact, rtol=2e-6, atol=2e-7)
    assert state["step"].item() == 7


def test_tiny_gradients_still_move_by_the_learning_rate():
    # eps 1e-20 is far below them: the first step is lr in every entry (a usual 1e-8 would be 1e-6).
    parameter = Parameter(torch.zeros(8))
    run(parameter, [torch.full((8,), 1e-14)], decay=0.0)
    torch.testing.assert_close(parameter.detach(), torch.full((8,), -LR))


def test_entries_without_gradient_do_not_become_nan():
    parameter = Parameter(torch.ones(4))
    run(parameter, [torch.zeros(4), torch.zeros(4)], decay=0.1)
    torch.testing.assert_close(parameter.detach(), torch.full((4,), (1 - LR * 0.1) ** 2))


def test_missing_gradient_counts_as_zero():
    results = []
    for second in (None, torch.zeros(6)):
        torch.manual_seed(3)
        parameter = Parameter(torch.randn(6))
        adamw = run(parameter, [torch.randn(6), second])
        results.append([parameter.detach(), *adamw.state["w"].values()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_unnamed_parameters_stand_still():
    parameters = {n: Parameter(torch.randn(3)) for n in "ab"}
    adamw = AdamW(
        [OwnedParameter(n, p, 0.1) for n, p in parameters.items()], AdamWConfig(), torch.float32
    )
    for p in parameters.values():
        p.grad = torch.randn(3)
    before = parameters["b"].detach().clone()
    assert adamw.step(LR, ["a"]) == ["a"]
    assert torch.equal(parameters["b"].detach(), before)
    assert all(not t.any() for t in adamw.state["b"].values())
    assert adamw.state["a"]["step"].item() == 1


def test_bias_correction_counts_the_steps_of_the_parameter():
    # Thawed late, it starts like a fresh one.
    late, fresh = Parameter(torch.ones(5)), Parameter(torch.ones(5))
    other = Parameter(torch.ones(5))
    entries = [OwnedParameter("late", late, 0.1), OwnedParameter("other", other, 0.1)]
    adamw = AdamW(entries, AdamWConfig(), torch.float32)
    grad = torch.randn(5)
    for p in (late, other):
        p.grad = grad
    adamw.step(LR, ["other"])
    adamw.step(LR, ["other", "late"])
    run(fresh, [grad])
    assert torch.equal(late.detach(), fresh.detach())


def test_bf16_moments_are_rounded_only_in_storage():
    grads = [torch.randn(64) for _ in range(5)]
    half, full = Parameter(torch.ones(64)), Parameter(torch.ones(64))
    adamw = run(half, grads, state_dtype=torch.bfloat16)
    run(full, grads)
    assert adamw.state["w"]["exp_avg"].dtype == torch.bfloat16
    assert half.dtype == torch.float32
    # Each step moves by about lr; roundings of 2^-9 change that by well under two percent.
    assert (half - full).abs().max().item() < 5 * LR * 0.02
    assert not torch.equal(half.detach(), full.detach())
