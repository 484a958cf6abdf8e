"""Routing, dispatch, balance: against loops over tokens in fp32 (1e-6) and exact counts."""

import pytest
import torch

from model.config import Kernels, ModelConfig, Router
from model.kernels.gather import gather_rows
from model.kernels.routing import balance_loss, expert_load
from model.kv_exchange import WholeRows
from model.linear import grouped_linear_op, grouped_linear_reference
from model.moe.balance import update_bias
from model.moe.dispatch import LocalDispatcher
from model.moe.router import Gate
from model.sequence_plan import build_sequence_plan

N, D, E, K = 40, 16, 6, 2


def gate(router=Router.learned):
    config = ModelConfig(
        n_routed_experts=E,
        num_experts_per_tok=K,
        hidden_size=D,
        vocab_size=30,
        routed_scaling_factor=2.5,
    )
    module = Gate(config, router)
    with torch.no_grad():
        module.weight.normal_(generator=torch.Generator().manual_seed(0))
        if router is Router.learned:
            module.bias.copy_(torch.linspace(-1, 1, E))
        else:
            module.tid2eid.copy_(torch.stack([torch.randperm(E)[:K] for _ in range(30)]))
    return module


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(N, D, generator=generator)
    ids = torch.randint(0, 30, (N,), generator=generator)
    return u, ids, torch.ones(N, dtype=torch.bool)


@pytest.mark.core
def test_learned_gate_chooses_by_biased_and_weighs_by_unbiased_scores():
    module, (u, ids, valid) = gate(), inputs()
    index, weight, _ = module(u, ids, valid)
    scores = torch.log1p((u.double() @ module.weight.double().T).exp()).sqrt()
    for n in range(N):
        biased = scores[n] + module.bias.double()
        chosen = sorted(range(E), key=lambda e: -biased[e].item())[:K]
        assert index[n].tolist() == chosen
        expected = scores[n, chosen] / scores[n, chosen].sum() * 2.5
        assert torch.allclose(weight[n].double(), expected, atol=1e-6)


def test_gate_ties_go_to_the_lower_expert():
    module = gate()
    with torch.no_grad():
        module.weight.zero_()
        module.bias.zero_()
    assert module(*inputs()).index_NK.tolist() == [[0, 1]] * N


def test_hash_gate_follows_the_table_and_trains_its_weight():
    module, (u, ids, valid) = gate(Router.hash), inputs()
    routing = module(u, ids, valid)
    assert torch.equal(routing.index_NK, module.tid2eid[ids].long())
    (routing.weight_NK[:, 0]).sum().backward()
    assert module.weight.grad.abs().sum() > 0


def test_fixed_choice_takes_weights_from_current_scores():
    module, (u, ids, valid) = gate(), inputs()
    fixed = torch.stack([torch.randperm(E)[:K] for _ in range(N)])
    index, weight, score = module(u, ids, valid, fixed)
    assert torch.equal(index, fixed)
    picked = score.gather(1, fixed)
    assert torch.allclose(weight, picked / picked.sum(-1, keepdim=True) * 2.5)


@pytest.mark.core
def test_dispatch_sends_each_token_exactly_topk_times_and_back():
    module, (u, ids, valid) = gate(), inputs()
    u.requires_grad_()
    index, weight, _ = module(u.detach(), ids, valid)
    weight = weight.detach().requires_grad_()
    dispatcher = LocalDispatcher(Kernels.fast)
    sent = dispatcher.dispatch(u, index, weight, E)
    assert (
        sent.offsets_E.tolist() == torch.bincount(index.flatten(), minlength=E).cumsum(0).tolist()
    )
    scale = torch.arange(1.0, E + 1)
    expert_of_row = torch.bucketize(torch.arange(N * K), sent.offsets_E, right=True)
    rows = sent.rows_RD * (scale[expert_of_row] * sent.weight_R)[:, None]
    out = dispatcher.combine(rows, sent, None, torch.float32)
    expected = sum(u * (scale[index[:, k]] * weight[:, k])[:, None] for k in range(K))
    assert torch.allclose(out, expected, atol=1e-6)
    seed = torch.randn(N, D)
    mine = torch.autograd.grad((out * seed).sum(), (u, weight))
    wanted = torch.autograd.grad((expected * seed).sum(), (u, weight))
    for a, b in zip(mine, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("op", [grouped_linear_op, grouped_linear_reference])
def test_grouped_linear_matches_loop_with_empty_experts(op):
    x, w = torch.randn(12, 8, requires_grad=True), torch.randn(4, 16, 8, requires_grad=True)
    offsets = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    expert = [1] * 5 + [3] * 7
    expected = torch.stack([w[e] @ x[n] for n, e in enumerate(expert)])
    out = op(x, w, offsets)
    assert torch.allclose(out, expected, atol=1e-5)
    seed = torch.randn_like(out)
    mine = torch.autograd.grad((out * seed).sum(), (x, w))
    wanted = torch.autograd.grad((expected * seed).sum(), (x, w))
    for a, b in zip(mine, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_gather_rows_backward_is_the_inverse():
    x = torch.randn(2, 5, 3, requires_grad=True)
    index = torch.tensor([[4, 1, 5], [5, 0, 2]])  # 5 = none
    inverse = torch.tensor([[3, 1, 3, 3, 0], [1, 3, 2, 3, 3]])
    out = gather_rows(x, index, inverse)
    padded = torch.cat((x, torch.zeros(2, 1, 3)), dim=1)
    expected = padded.gather(1, index[..., None].expand(-1, -1, 3))
    assert torch.equal(out, expected)
    seed = torch.randn_like(out)
    (mine,) = torch.autograd.grad((out * seed).sum(), x, retain_graph=True)
    (wanted,) = torch.autograd.grad((expected * seed).sum(), x)
    assert torch.equal(mine, wanted)


@pytest.mark.core
def test_balance_loss_is_per_document_and_ignores_padding():
    ids = torch.tensor([[0] * 7 + [1] * 9 + [-1] * 4, [3] * 20])
    plan = build_sequence_plan(ids, ())
    score = torch.rand(N, E, requires_grad=True)
    index = torch.stack([torch.randperm(E)[:K] for _ in range(N)])
    mine = balance_loss(index, score, plan, WholeRows())
    expected = torch.zeros(())
    for document in range(plan.num_documents):
        tokens = [
            n
            for n in range(N)
            if plan.document_BT.flatten()[n] == document and ids.flatten()[n] >= 0
        ]
        for e in range(E):
            f = E / (K * max(len(tokens), 1)) * sum((index[n] == e).sum() for n in tokens)
            p = sum(score[n, e] / score[n].sum() for n in tokens)
            expected = expected + f * p
    assert torch.allclose(mine, expected, atol=1e-4)
    (grad,) = torch.autograd.grad(mine, score)
    assert (grad[16:20] == 0).all()
    load = expert_load(index, plan.valid_BT.flatten(), E)
    assert load.sum() == K * int((ids >= 0).sum())


def test_bias_moves_against_the_load_by_the_speed():
    module = gate()
    before = module.bias.clone()
    update_bias(module, torch.tensor([1.0, 5.0, 3.0, 3.0, 0.0, 6.0]), 0.001)
    moved = torch.tensor([1.0, -1.0, 0.0, 0.0, 1.0, -1.0]) * 0.001
    assert torch.allclose(module.bias - before, moved, atol=1e-7)
