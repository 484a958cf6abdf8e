"""Straight-through casts and the kept copy of a weight; exact, so every comparison is bitwise."""

import pytest
import torch
from torch import nn

from quant.fake_quant import WeightQuantiser, straight_through
from quant.formats import MXFP4, fake_quant
from quant.stored import read_as_master, read_as_stored


def test_straight_through_passes_the_gradient_unchanged():
    x = torch.randn(4, 64, requires_grad=True)
    y = straight_through(x, lambda t: fake_quant(t, MXFP4))
    grad = torch.randn(4, 64)
    y.backward(grad)
    assert torch.equal(y, fake_quant(x.detach(), MXFP4))
    assert torch.equal(x.grad, grad)


def step_in_place(w):
    with torch.no_grad():
        w.mul_(1.5)


def step_foreach(w):
    with torch.no_grad():
        torch._foreach_mul_([w], 1.5)


def step_adamw(w):
    w.grad = torch.ones_like(w)
    torch.optim.AdamW([w], lr=1.0).step()


def step_copy(w):
    with torch.no_grad():
        w.detach().copy_(w.detach() * 3)


@pytest.mark.parametrize("step", [step_in_place, step_foreach, step_adamw, step_copy])
def test_kept_copy_is_remade_after_every_kind_of_update(step):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(8, 64))
    quantiser = WeightQuantiser(MXFP4, keep=True)
    first = quantiser(w, torch.float32)
    assert quantiser(w, torch.float32) is first
    step(w)
    second = quantiser(w, torch.float32)
    assert not torch.equal(second, first)
    assert torch.equal(second, fake_quant(w.detach(), MXFP4))


def test_kept_copy_is_not_shared_between_weights_or_dtypes():
    torch.manual_seed(1)
    a, b = nn.Parameter(torch.randn(8, 64)), nn.Parameter(torch.randn(8, 64))
    quantiser = WeightQuantiser(MXFP4, keep=True)
    quantiser(a, torch.float32)
    assert torch.equal(quantiser(b, torch.float32), fake_quant(b.detach(), MXFP4))
    assert quantiser(b, torch.bfloat16).dtype == torch.bfloat16


def test_a_change_behind_the_version_counter_is_found_out():
    w = nn.Parameter(torch.randn(8, 64))
    quantiser = WeightQuantiser(MXFP4, keep=True)
    quantiser(w, torch.float32)
    w.data.mul_(2.0)  # as FSDP does when it gathers anew
    with pytest.raises(RuntimeError, match="behind its version counter"):
        quantiser(w, torch.float32)
    fresh = WeightQuantiser(MXFP4, keep=False)
    fresh(w, torch.float32)
    w.data.mul_(3.0)
    assert torch.equal(fresh(w, torch.float32), fake_quant(w.detach(), MXFP4))


class Probe:
    def __init__(self):
        self.seen = []

    def saw(self, name):
        self.seen.append(name)


def test_stored_weight_reads_as_bf16_and_trains_the_master():
    torch.manual_seed(2)
    module = nn.Embedding(8, 16)
    master = module.weight.detach().clone()
    read_as_stored(module, "embed", probe := Probe())
    out = module(torch.arange(8))
    assert torch.equal(out.detach(), master.bfloat16().float())
    assert not torch.equal(out.detach(), master)
    out.sum().backward()
    parameter = dict(module.named_parameters())["weight"]
    assert torch.equal(parameter.detach(), master)
    assert torch.equal(parameter.grad, torch.ones(8, 16))
    assert torch.equal(module.state_dict()["weight"], master)
    assert probe.seen == ["embed"]
    read_as_master(module)
    assert torch.equal(module(torch.arange(8)).detach(), master)
    read_as_stored(module, "embed", probe)
    assert torch.equal(module(torch.arange(8)).detach(), master.bfloat16().float())
