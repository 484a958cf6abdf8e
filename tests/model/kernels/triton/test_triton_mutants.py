"""Known bugs of V4 stacks, planted in the source of Triton kernels, are found by the tests' checks.

More of attention and the indexer are in their own files. Each problem passes as it is, and fails
with any of its plants. No plant leaves its tensors: the interpreter would read what lies there.
"""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from model.kernels import attention as plain_attention
from model.kernels import elementwise, mhc
from model.kernels import pool as plain_pool
from model.kernels import routing as plain_routing
from model.kernels.triton import (
    attention,
    attention_kernels,
    grouped,
    mhc_kernels,
    pool,
    routing,
    swiglu,
)
from model.kernels.triton import mhc as triton_mhc
from model.kv_exchange import WholeRows
from model.sequence_plan import build_sequence_plan
from tests.model.kernels.triton.attention_cases import packed
from tests.model.kernels.triton.checks import check


def swiglu_problem():
    """Half of the values beyond the clamp."""
    inputs = [torch.randn(4, 20) * 12, torch.randn(4, 20) * 12, torch.rand(4), 10.0]
    check(swiglu.swiglu, elementwise.swiglu, inputs, [torch.randn(4, 20)])


def mhc_problem():
    def of(module):
        def run(x, y, fn, base, scale):
            parameters = (fn, base, scale, 4, 1e-6, 1e-6)
            u, mix = module.mhc_pre(x, *parameters)
            v, mix = module.mhc_merge_pre(y, mix, *parameters)
            return u, module.mhc_merge(v, mix)

        return run

    S, D = 4, 12
    inputs = [
        torch.randn(1, 3, S, D), torch.randn(1, 3, D), torch.randn(24, S * D) * 0.2,
        torch.randn(24), torch.tensor([0.9, 1.3, 1.7]),
    ]  # fmt: skip
    check(of(triton_mhc), of(mhc), inputs, [torch.randn(1, 3, D), torch.randn(1, 3, S, D)])


def pool_problem():
    """A document that ends within a row: its last entry must not reach into the next."""
    plan = build_sequence_plan(torch.tensor([[0] * 9 + [1] * 8]), (4,)).compressed[4]

    def of(module):
        return lambda k, z, ape: module.pool_entries(
            k, z, ape, plan.overlapping, plan.has_previous_BL, True, k.dtype
        )

    inputs = [torch.randn(1, 17, 8), torch.randn(1, 17, 8), torch.randn(4, 8)]
    check(of(pool), of(plain_pool), inputs, [torch.randn(1, plan.has_previous_BL.shape[1], 4)])


def gate_problem():
    logits, bias, valid = torch.randn(6, 8), torch.randn(8) * 2, torch.arange(6) != 2

    def of(module):
        return lambda x: tuple(module.route(x, valid, bias, None, 3, 1.5)[1:])

    with torch.no_grad():
        ours, theirs = (
            m.route(logits, valid, bias, None, 3, 1.5) for m in (routing, plain_routing)
        )
    assert torch.equal(ours[0], theirs[0])
    check(of(routing), of(plain_routing), [logits], [torch.randn(6, 3), torch.randn(6, 8)])


def balance_problem():
    plan = build_sequence_plan(torch.tensor([[0] * 5 + [1] * 9 + [-1] * 2]), ())
    index, score = torch.rand(16, 6).argsort(1)[:, :2], torch.rand(16, 6)

    def of(module):
        return lambda s: module.load_and_balance(index, s, plan, WholeRows(), balance=True)

    load, want = (of(m)(score)[0] for m in (routing, plain_routing))
    assert torch.equal(load, want)
    check(
        lambda s: of(routing)(s)[1], lambda s: of(plain_routing)(s)[1], [score],
        [torch.tensor(0.7)],
    )  # fmt: skip


def order_problem():
    index = torch.rand(13, 5).argsort(1)[:, :2]
    pairs = zip(routing.expert_order(index, 5), plain_routing.expert_order(index, 5), strict=True)
    assert all(torch.equal(a.long(), b.long()) for a, b in pairs)


def grouped_problem():
    """An expert without rows, and one with more than a block."""
    ends = torch.tensor([17, 17, 22], dtype=torch.int32)

    def loop(x, w, _):
        return torch.cat([x[:17] @ w[0].mT, x[17:] @ w[2].mT])

    inputs = [torch.randn(22, 6), torch.randn(3, 5, 6), ends]
    check(grouped.grouped_linear, loop, inputs, [torch.randn(22, 5)])


def attention_problem(monkeypatch):
    """Two rows of other documents, a sink that matters, entries of the second row only."""
    monkeypatch.setattr(attention, "masks_choice", lambda *_: False)
    rows = packed(3, 2, ratio=2, batch=2)

    def of(implementation):
        return lambda q, kv, sink, table: implementation(
            q, kv, sink, rows.start_BT, 3, rows.entry_set(table, "list")
        )[0]

    inputs = [torch.randn(2, 5, 2, 16), torch.randn(2, 5, 16), torch.rand(2) + 1,
              torch.randn(2, rows.entries, 16)]  # fmt: skip
    ours, plain = of(attention.attention), of(plain_attention.attention_reference)
    check(ours, plain, inputs, [torch.randn(2, 5, 2, 16)], norms={2: torch.tensor(10.0)})


# (problem, module of the kernel, module that launches it, kernel, what stands there, the bug)
PLANTS = (
    (swiglu_problem, swiglu, "swiglu_forward", "tl.minimum(g, limit, ", "tl.minimum(g, 1e9, "),
    (swiglu_problem, swiglu, "swiglu_forward", "a = g / (1.0 + tl.exp(-g)) * u",
     "a = tl.minimum(tl.load(G + row * I + i, mask=ok, other=0.0), limit) * u"),
    (swiglu_problem, swiglu, "swiglu_backward", "tl.where(g0 > limit, ", "tl.where(g0 > 1e9, "),
    (mhc_problem, mhc_kernels, "mhc_merge_streams", "(n * S + j) * S + k", "(n * S + k) * S + j"),
    (mhc_problem, mhc_kernels, "mhc_merge_mix", "(m[None, :] * S + k) * D", "m[None, :] * S * D"),
    (mhc_problem, mhc_kernels, "mhc_streams_backward", "gy += weight[:, None] * written",
     "gy += written"),
    (pool_problem, pool, "pool_forward", "PREVIOUS + b * E + e) != 0", "PREVIOUS + b * E + e) < 0"),
    (pool_problem, pool, "pool_backward", "gx * (x - mean)", "gx * x"),
    (gate_problem, routing, "gate_choice", "tl.where(here, score, 0.0), 1)\n            index",
     "tl.where(here, biased, 0.0), 1)\n            index"),
    (gate_problem, routing, "gate_choice", "(tl.sum(picked, 1)", "(tl.sum(score, 1)"),
    (gate_problem, routing, "gate_choice", "scale * counted[:, None]", "scale"),
    (balance_problem, routing, "balance_rows", "share / length[:, None]", "share / N"),
    (balance_problem, routing, "document_counts", "mask=ok & valid", "mask=ok"),
    (order_problem, routing, "expert_places", "place, r // K", "place, r % K"),
    (grouped_problem, grouped, "grouped_product", "_expert_of(OFFSETS, tl.program_id(1)",
     "_expert_of(OFFSETS, 0 * tl.program_id(1)"),
    (grouped_problem, grouped, "grouped_weight_gradient", "OFFSETS + e - 1, mask=e > 0",
     "OFFSETS + e - 1, mask=e > 1"),
    (attention_problem, attention_kernels, "attention_forward", "tl.exp2(sink2 - top)", "0.0"),
    (attention_problem, attention_kernels, "attention_forward", "ENTRIES += b * E * K",
     "ENTRIES += 0 * b * E * K"),
    (attention_problem, attention_kernels, "attention_forward", "STOP + b * T + t0",
     "STOP + 0 * b * T + t0"),
    (attention_problem, attention_kernels, "attention_grad_queries", "START + b * T",
     "START + 0 * b * T"),
)  # fmt: skip
LAUNCHED_BY = {attention_kernels: attention, mhc_kernels: triton_mhc}
PROBLEMS = list(dict.fromkeys(plant[0] for plant in PLANTS))


def solve(problem, monkeypatch):
    torch.manual_seed(3)
    problem(monkeypatch) if problem is attention_problem else problem()


def planted(module, kernel, old, new, folder):
    """A kernel of a module, in whose source ``old`` is replaced; its operators stay as they are."""
    source = Path(module.__file__).read_text()
    begin = source.index(f"def {kernel}(")
    assert old in source[begin:], old
    source = source[:begin] + source[begin:].replace(old, new, 1)
    path = folder / "planted.py"
    path.write_text(re.sub(r"\bdefine\((?=\n|f?\")", "(lambda *_: None)(", source))
    spec = importlib.util.spec_from_file_location("planted", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return getattr(found, kernel)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_problem_passes_without_a_plant(monkeypatch, problem):
    solve(problem, monkeypatch)


@pytest.mark.parametrize(("problem", "module", "kernel", "old", "new"), PLANTS)
def test_a_plant_is_found(monkeypatch, tmp_path, problem, module, kernel, old, new):
    faulty = planted(module, kernel, old, new, tmp_path)
    monkeypatch.setattr(LAUNCHED_BY.get(module, module), kernel, faulty)
    with pytest.raises(AssertionError):
        solve(problem, monkeypatch)
