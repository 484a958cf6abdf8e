"""Chunked cross-entropy against plain autograd, and the objective's arithmetic."""

import pytest
import torch
from torch.nn import functional as F

from model.config import Kernels
from model.kernels.select import select
from model.loss import Objective, cross_entropy_sum
from model.precision import HEAD_PRECISIONS
from tests.helpers import random_rows, relative, small_model
from tests.model.kernels.op_cases import normal


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


@pytest.mark.parametrize("kernels", [Kernels.reference, Kernels.triton])
@pytest.mark.parametrize("head", ["fp32", "bf16"])
def test_head_precision_against_float64(head, kernels):
    """What rounding may do to a loss, from the formats, on any CPU.

    Operands move by u each (2^-9 in bf16), sums of K products by K 2^-24, and a CPU rounds bf16
    logits once more; a loss moves by at most twice its largest logit's change. The cross-entropy
    itself adds a few roundings of the logits and of its own value.
    """
    N, K, V = 40, 32, 50
    x, w = normal(N, K).requires_grad_(), (0.1 * normal(V, K, seed=1)).requires_grad_()
    labels = torch.randint(-1, V, (N,), generator=torch.Generator().manual_seed(0))
    dtype, tf32 = HEAD_PRECISIONS[head]
    op = select("cross_entropy", kernels)
    loss = cross_entropy_sum(x, w, labels, 16, dtype, op, tf32)
    exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, w))
    logits = exact_x @ exact_w.T
    exact = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    off = float((loss - exact).detach())
    u = 2.0**-9 if head == "bf16" else 0.0
    size = float((x.abs() @ w.abs().T).detach().max())
    moved = size * (2.02 * u + (K + 4) * 2.0**-24) + float(logits.detach().abs().max()) * (
        u + 2.0**-22
    )
    assert abs(off) <= 2 * moved * N + 1e-6 * float(exact.detach())
    assert head == "fp32" or off != 0
    got = torch.autograd.grad(loss, (x, w))
    want = torch.autograd.grad(exact, (exact_x, exact_w))
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < (3e-2 if head == "bf16" else 1e-5)


def test_tf32_is_in_force_for_the_products_of_the_head_alone():
    """On a GPU these flags choose the kernel: seen at every product of a step and of logits."""
    model, seen = small_model(), {True: set(), False: set()}
    model.head_tf32 = True
    vocabulary = model.config.vocab_size

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
                of_head = any(vocabulary in t.shape for t in args[:2])
                seen[of_head].add(torch.backends.cuda.matmul.fp32_precision)
            return func(*args, **(kwargs or {}))

    rows = random_rows(1, 22, vocabulary)
    objective = Objective(rows.counts.targets_K, rows.counts.tokens)
    batch = rows.whole
    with Watch():
        out = model(batch.input_ids_BT, batch.document_ids_BT, batch.labels_BTK, objective)
        out.total.backward()
        model.logits(batch.input_ids_BT)
    assert seen[True] == {"tf32"}
    assert seen[False]
    assert "tf32" not in seen[False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tf32_head_on_a_gpu():
    """Operands of 11 bits: 2^-11 of each, so gradients within 1e-2 and not those of fp32."""
    x, w = (normal(512, 256, seed=n).cuda().requires_grad_() for n in (0, 1))
    labels = torch.arange(512, device="cuda")
    losses = [cross_entropy_sum(x, w, labels, 128, tf32=tf32) for tf32 in (False, True)]
    (full, _), (rounded, _) = (torch.autograd.grad(loss, (x, w)) for loss in losses)
    assert 1e-6 < relative(rounded, full) < 1e-2
