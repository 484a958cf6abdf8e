"""Pooling of tokens to entries in Triton against float64, in the interpreter."""

import pytest
import torch

from model.kernels import pool as plain
from model.kernels.triton import pool
from model.sequence_plan import SequenceShard, build_sequence_plan
from tests.model.kernels.triton.checks import check, gradients

IDS = torch.tensor([[0] * 9 + [1] * 3 + [2] * 14 + [-1] * 3, [3] * 29])


def of(module, ratio, overlap, dtype=torch.float32):
    plan = build_sequence_plan(IDS, (ratio,)).compressed[ratio]
    blocks = plan.overlapping if overlap else plan.disjoint

    def run(k, z, ape):
        # the reference in float64 keeps it
        rounded = k.dtype if k.dtype == torch.float64 else dtype
        return module.pool_entries(k, z, ape, blocks, plan.has_previous_BL, overlap, rounded)

    return run, plan.has_previous_BL.shape[1]


@pytest.mark.parametrize(
    ("ratio", "K", "overlap"),
    [(4, 6, True), (4, 300, True), (6, 5, False), (16, 40, False), (29, 3, True), (1, 8, True)],
)
def test_pool_is_the_reference(ratio, K, overlap):
    C = K * (1 + overlap)
    inputs = [torch.randn(2, 29, C), torch.randn(2, 29, C) * 3, torch.randn(ratio, C)]
    ours, entries = of(pool, ratio, overlap)
    grads = [torch.randn(2, entries, K)]
    check(ours, of(plain, ratio, overlap)[0], inputs, grads)


def test_pool_of_one_token_and_of_tiny_values():
    plan = build_sequence_plan(torch.tensor([[0]]), (1,)).compressed[1]

    def run(module):
        return lambda k, z, ape: module.pool_entries(
            k, z, ape, plan.overlapping, plan.has_previous_BL, True, k.dtype
        )

    inputs = [torch.randn(1, 1, 12) * 1e-4, torch.randn(1, 1, 12) * 1e-4, torch.randn(1, 12)]
    check(run(pool), run(plain), inputs, [torch.randn(1, 1, 6)])


def test_tokens_that_serve_no_entry_have_no_gradient():
    inputs = [torch.randn(2, 29, 8), torch.randn(2, 29, 8), torch.randn(4, 8)]
    _, (grad, *_) = gradients(of(pool, 4, True)[0], inputs, [torch.randn(2, 7, 4)])
    assert (grad[0, 8] == 0).all()  # the ninth of a document of nine
    assert (grad[0, 9:12] == 0).all()  # a document too short
    assert (grad[0, 4:8, :4] == 0).all()  # no entry comes after it in its document
    assert (grad[0, :8, 4:] != 0).all()


def test_bf16_is_rounded_once():
    inputs = [torch.randn(2, 29, 8), torch.randn(2, 29, 8), torch.randn(4, 8)]
    ours, theirs = (of(m, 4, True, torch.bfloat16)[0](*inputs) for m in (pool, plain))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.01)


def test_a_shard_reads_the_block_before_it():
    ids = torch.tensor([[0] * 30 + [1] * 2])
    shard = SequenceShard(1, 2)
    plan = build_sequence_plan(ids, (4,), shard=shard).compressed[4]
    assert plan.overlapping.lead == 1
    tokens = plan.overlapping.slot_BU.shape[1]
    inputs = [torch.randn(1, tokens, 8), torch.randn(1, tokens, 8), torch.randn(4, 8)]

    def run(module):
        return lambda k, z, ape: module.pool_entries(
            k, z, ape, plan.overlapping, plan.has_previous_BL, True, k.dtype
        )

    check(run(pool), run(plain), inputs, [torch.randn(1, plan.has_previous_BL.shape[1], 4)])
