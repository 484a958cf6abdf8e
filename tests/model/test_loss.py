"""Chunked cross-entropy against plain autograd, and the objective's arithmetic."""

import pytest
import torch
from torch.nn import functional as F

from model.loss import cross_entropy_sum


@pytest.mark.core
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunked_cross_entropy_matches_autograd(chunk):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 12, generator=generator).requires_grad_()
    w = torch.randn(33, 12, generator=generator).requires_grad_()
    labels = torch.randint(0, 33, (50,), generator=generator)
    labels[::5] = -1
    expected = F.cross_entropy(x @ w.T, labels, ignore_index=-1, reduction="sum")
    mine = cross_entropy_sum(x, w, labels, chunk)
    assert torch.allclose(mine, expected, rtol=1e-6)
    wanted = torch.autograd.grad(expected * 0.3, (x, w))
    got = torch.autograd.grad(mine * 0.3, (x, w))
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert (got[0][::5] == 0).all()


def test_cross_entropy_of_no_targets_is_zero():
    x, w = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    loss = cross_entropy_sum(x, w, torch.full((4,), -1), 2)
    loss.backward()
    assert loss == 0
    assert (x.grad == 0).all()
    assert (w.grad == 0).all()


def test_loss_needs_no_logits_tensor():
    """The largest temporary of the forward pass is one chunk of logits, not [N, V]."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    x, w = torch.randn(256, 4, requires_grad=True), torch.randn(100, 4, requires_grad=True)
    with Watch():
        cross_entropy_sum(x, w, torch.randint(0, 100, (256,)), 16).backward()
    assert max(sizes) == 16 * 100


def test_bf16_head_stays_close_to_fp32():
    """Operands rounded to bf16 (2^-9 each): the loss within 1e-3, gradients within 1e-2 of fp32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=generator).requires_grad_()
    w = (0.1 * torch.randn(50, 32, generator=generator)).requires_grad_()
    labels = torch.randint(0, 50, (64,), generator=generator)
    exact = cross_entropy_sum(x, w, labels, 16)
    rounded = cross_entropy_sum(x, w, labels, 16, torch.bfloat16)
    assert rounded != exact
    assert torch.allclose(rounded, exact, rtol=1e-3)
    wanted, got = (torch.autograd.grad(loss, (x, w)) for loss in (exact, rounded))
    for a, b in zip(got, wanted, strict=True):
        assert ((a - b).norm() / b.norm()) < 1e-2
