"""Attention, choice and indexer loss, chunked and in C++, against their references.

All compute in fp32 and differ in summation order only: 2e-6 relative Frobenius, 1e-5 for the loss's
gradients, which are differences of probabilities. Documents, padding, odd lengths and chunk edges
are in every case; ``chunk`` forces many chunks, ``gather`` the gathered path, ``cpp`` forbids the
C++ kernels to fall back.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch

from model.kernels import attention_cpu, attention_fast, chunks, indexer_cpu
from model.kernels.attention import EntrySet, attention_reference
from model.kernels.indexer import index_scores, index_topk_reference, indexer_loss_reference
from model.sequence_plan import build_sequence_plan

H, K, J, L, WINDOW = 6, 80, 17, 16, 12


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


class Ops(NamedTuple):
    attention: Callable
    topk: Callable
    loss: Callable


CHUNKED = Ops(
    attention_fast.attention_chunked,
    attention_fast.index_topk_chunked,
    attention_fast.indexer_loss_chunked,
)
CPP = Ops(attention_cpu.attention_cpu, indexer_cpu.index_topk_cpu, indexer_cpu.indexer_loss_cpu)


@pytest.fixture(params=["whole", "chunk", "gather", "cpp 1 thread", "cpp 2 threads"])
def ops(request, monkeypatch):
    if request.param == "whole":
        return CHUNKED
    if request.param in ("chunk", "gather"):
        monkeypatch.setattr(chunks, "chunk_size", lambda like, rows, keys, tokens: 16)
        if request.param == "gather":
            monkeypatch.setattr(chunks, "MASK_UP_TO", 0)
        else:  # a mask is made for four or five chunks, and again for the rest
            monkeypatch.setitem(chunks._MASK_BYTES, "cpu", 4000)
        return CHUNKED
    monkeypatch.setattr(attention_cpu, "attention_chunked", None)
    monkeypatch.setattr(indexer_cpu, "index_topk_chunked", None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: int(request.param.split()[1]))
    return CPP


def problem(ratio, seed=0):
    generator = torch.Generator().manual_seed(seed)
    runs = [[(0, 37), (1, 50), (2, 3)], [(0, 70), (-1, 9), (3, 11)]]
    ids = torch.tensor([[d for d, n in row for _ in range(n)] for row in runs])
    plan = build_sequence_plan(ids, (ratio,))
    B, T = ids.shape
    E = plan.compressed[ratio].num_entries

    def leaf(*shape):
        return torch.randn(*shape, generator=generator).requires_grad_()

    tensors = {
        "q": leaf(B, T, H, K), "kv": leaf(B, T, K), "sink": leaf(H), "entries": leaf(B, E, K),
        "qi": leaf(B, T, J, L), "ki": leaf(B, E, L), "w": leaf(B, T, J),
    }  # fmt: skip
    return plan, plan.compressed[ratio], tensors


def entry_set(compressed, tensors, topk):
    index = None
    if topk:
        indexer = (tensors["qi"], tensors["ki"], tensors["w"])
        index = index_topk_reference(indexer, compressed.first_BT, compressed.stop_BT, topk)
    return EntrySet(tensors["entries"], compressed.first_BT, compressed.stop_BT, index)


@pytest.mark.core
@pytest.mark.parametrize(
    ("ratio", "topk", "window"), [(4, 0, 12), (4, 3, 12), (4, 99, 5), (16, 0, 12), (4, 3, 90)]
)
def test_chunked_attention_matches_reference(ops, ratio, topk, window):
    results = []
    for op in (attention_reference, ops.attention):
        plan, compressed, tensors = problem(ratio)
        result = op(
            tensors["q"],
            tensors["kv"],
            tensors["sink"],
            plan.start_BT,
            window,
            entry_set(compressed, tensors, topk),
        )
        weights = torch.randn(result.o_BTHK.shape, generator=torch.Generator().manual_seed(1))
        (result.o_BTHK * weights).sum().backward()
        grads = [tensors[name].grad for name in ("q", "kv", "sink", "entries")]
        results.append([result.o_BTHK, result.lse_BTH, *grads])
    for mine, expected in zip(results[1], results[0], strict=True):
        assert relative(mine, expected) < 2e-6


def test_window_only_attention_matches_reference(ops):
    plan, _, t = problem(4)
    expected = attention_reference(t["q"], t["kv"], t["sink"], plan.start_BT, WINDOW, None)
    mine = ops.attention(t["q"], t["kv"], t["sink"], plan.start_BT, WINDOW, None)
    assert relative(mine.o_BTHK, expected.o_BTHK) < 2e-6


@pytest.mark.core
@pytest.mark.parametrize(("topk", "window"), [(0, 12), (3, 5), (3, 90)])
def test_queries_of_shards_with_the_keys_before_match_whole_rows(ops, topk, window):
    results = []
    for cuts in ([0, 90], [0, 31, 40, 90]):
        op = attention_reference if len(cuts) == 2 else ops.attention
        plan, compressed, t = problem(4)
        entries = entry_set(compressed, t, topk)
        out = torch.cat([op(*shard_of(t, plan, entries, window, *cut)).o_BTHK
                         for cut in pairwise(cuts)], dim=1)  # fmt: skip
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        (out * weights).sum().backward()
        results.append([out, *(t[name].grad for name in ("q", "kv", "sink", "entries"))])
    for mine, expected in zip(results[1], results[0], strict=True):
        assert relative(mine, expected) < 2e-6


def shard_of(t, plan, entries, window, begin, end):
    """What attention gets of the tokens ``begin:end`` of rows."""
    here, first = slice(begin, end), max(0, begin - window + 1)
    index_BTN = None if entries.index_BTN is None else entries.index_BTN[:, here]
    some = EntrySet(entries.kv_BEK, entries.first_BT[:, here], entries.stop_BT[:, here], index_BTN)
    start_BT = (plan.start_BT[:, here] - first).clamp(min=0)
    return t["q"][:, here], t["kv"][:, first:end], t["sink"], start_BT, window, some


def test_padding_queries_get_zero(ops):
    plan, compressed, t = problem(4)
    result = ops.attention(
        t["q"], t["kv"], t["sink"], plan.start_BT, WINDOW, entry_set(compressed, t, 3)
    )
    assert (result.o_BTHK[~plan.valid_BT] == 0).all()
    assert result.o_BTHK[plan.valid_BT].abs().sum(-1).min() > 0


@pytest.mark.core
@pytest.mark.parametrize("topk", [1, 3, 8, 99])
def test_chunked_topk_matches_reference(ops, topk):
    _, compressed, t = problem(4)
    indexer = (t["qi"], t["ki"], t["w"])
    expected = index_topk_reference(indexer, compressed.first_BT, compressed.stop_BT, topk)
    mine = ops.topk(indexer, compressed.first_BT, compressed.stop_BT, topk)
    assert torch.equal(mine.sort(-1).values, expected.sort(-1).values)


def test_topk_takes_highest_visible_scores(ops):
    _, compressed, t = problem(4)
    indexer = (t["qi"], t["ki"], t["w"])
    scores = index_scores(*indexer)
    index = ops.topk(indexer, compressed.first_BT, compressed.stop_BT, 3)
    for b in range(index.shape[0]):
        for q in range(index.shape[1]):
            visible = range(int(compressed.first_BT[b, q]), int(compressed.stop_BT[b, q]))
            best = sorted(visible, key=lambda e: -scores[b, q, e].item())[:3]
            assert sorted(e for e in index[b, q].tolist() if e >= 0) == sorted(best)


@pytest.mark.core
@pytest.mark.parametrize("topk", [0, 3, 99])
def test_indexer_loss_matches_reference(ops, topk):
    results = []
    for op in (indexer_loss_reference, ops.loss):
        plan, compressed, t = problem(4)
        entries = entry_set(compressed, t, topk)
        found = ops.attention(t["q"], t["kv"], t["sink"], plan.start_BT, WINDOW, entries)
        lse = found.lse_BTH
        if found.mass_BTN is None:  # some queries' mass underflows: they teach nothing
            lse = lse.index_fill(1, torch.tensor([8, 20]), 300.0)
        loss = op((t["qi"], t["ki"], t["w"]), t["q"], lse, entries, found.mass_BTN)
        (3.0 * loss).backward()
        assert t["q"].grad is None  # the loss trains the indexer only
        assert t["entries"].grad is None
        results.append([loss.detach(), t["qi"].grad, t["ki"].grad, t["w"].grad])
    assert results[0][0] > 0
    for mine, expected in zip(results[1], results[0], strict=True):
        assert relative(mine, expected) < 1e-5


def test_cpp_mass_is_the_probability_of_chosen_entries(ops):
    plan, compressed, t = problem(4)
    entries = entry_set(compressed, t, 3)
    found = ops.attention(t["q"], t["kv"], t["sink"], plan.start_BT, WINDOW, entries)
    if found.mass_BTN is None:
        assert ops is CHUNKED
        return
    index = entries.index_BTN
    picked = t["entries"].gather(1, index.clamp(min=0).flatten(1)[..., None].expand(-1, -1, K))
    scores = torch.einsum("bthk,btnk->bthn", t["q"], picked.view(*index.shape, K)) * K**-0.5
    expected = (scores - found.lse_BTH[..., None]).exp().sum(2).masked_fill(index < 0, 0.0)
    assert torch.allclose(found.mass_BTN, expected, atol=1e-5)


def test_cpp_attention_in_bf16_is_closer_to_float64_than_the_reference(monkeypatch):
    """bf16 tensors, fp32 arithmetic: only the inputs and the output are rounded."""
    monkeypatch.setattr(attention_cpu, "attention_chunked", None)
    plan, compressed, t = problem(4)
    rounded = {name: tensor.detach().bfloat16() for name, tensor in t.items()}
    index = entry_set(compressed, t, 3).index_BTN

    def run(op, dtype):
        kv = EntrySet(rounded["entries"].to(dtype), compressed.first_BT, compressed.stop_BT, index)
        tensors = [rounded[name].to(dtype) for name in ("q", "kv")]
        return op(*tensors, t["sink"].detach(), plan.start_BT, WINDOW, kv).o_BTHK.double()

    exact = run(attention_reference, torch.float64)
    mine = relative(run(attention_cpu.attention_cpu, torch.bfloat16), exact)
    assert mine < 3e-3
    assert mine <= relative(run(attention_reference, torch.bfloat16), exact)
