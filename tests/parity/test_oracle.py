"""Ours in fp32 against the per-token float64 oracle, where transformers has nothing to compare.

Packed documents with padding, odd lengths, MTP of depth 1 and 2, every loss in the indexer's three
phases, the ablation twins, other ratios than 4 and 128. Bounds: logits 1e-5 max abs, losses 2e-6
relative, gradients 1e-4 relative Frobenius a tensor (fp32 rounding is some 1e-6 to 1e-5 of that);
loads, experts and entries equal.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.config import Attention, Kernels, LayerKind, Residual, Router
from tests.parity.configs import tiny_config
from tests.parity.harness import (
    Case,
    build_ours,
    check_all,
    make_batch,
    make_weights,
    oracle,
    run_ours,
)
from tests.parity.oracle import run_oracle, sinkhorn
from tests.parity.weights import as_leaves

ROWS = ((17, 1, 12, -4), (34,))
_two = {"num_nextn_predict_layers": 2}
_one = {"num_nextn_predict_layers": 1}

_odd_ratios = tiny_config(
    num_hidden_layers=4,
    layer_kinds=[LayerKind(k) for k in ("csa", "hca", "csa", "dense")],
    compress_ratios=[3, 5, 2, 0],
    num_attention_heads=6,
    o_groups=3,
    hc_mult=2,
    hc_gamma=True,
    n_shared_experts=2,
    routers=[Router.learned, Router.hash, Router.learned, Router.hash],
    swiglu_limit=1.0,
    sliding_window=5,
    **_one,
)
_unit_ratio = tiny_config(
    num_hidden_layers=2,
    layer_kinds=[LayerKind.csa, LayerKind.hca],
    compress_ratios=[1, 1],
    sliding_window=1,
    n_shared_experts=0,
    num_hash_layers=0,
    num_experts_per_tok=8,
    hc_sinkhorn_iters=3,
)
_long = tiny_config(
    num_hidden_layers=2,
    layer_kinds=[LayerKind.csa, LayerKind.hca],
    compress_ratios=[2, 16],
    index_topk=6,
    num_attention_heads=2,
    o_groups=1,
    num_hash_layers=0,
)
CASES = [
    Case("packed", tiny_config(**_two), ROWS, cut=True, share=3),
    Case("packed", tiny_config(**_two), ROWS, cut=True, share=3, phase="full"),
    Case("many short documents", tiny_config(**_one), ((1, 2, 3, 4, 5, 6, 7), (-3, 8, 1, 9, -7))),
    Case("plain residual", tiny_config(residual=Residual.plain, **_one), ROWS),
    Case("other ratios, gamma, dense layer", _odd_ratios, ROWS, cut=True),
    Case("ratio one, all experts", _unit_ratio, ((13, 6), (19,))),
    *(
        Case(f"attention {kind}", tiny_config(attention=Attention(kind), **_one), ((19, -1, 10),))
        for kind in ("csa", "hca", "swa", "dense")
    ),
    Case("longer than a chunk", _long, ((290, 21),)),
    Case("no side losses", tiny_config(**_one), ((25,),), weights=(0.0, 0.0, 0.0)),
]


def _name(case: Case) -> str:
    return f"{case.name} {case.phase}".replace(" ", "_")


@pytest.mark.parametrize("kernels", [Kernels.reference, Kernels.fast])
@pytest.mark.parametrize("case", CASES, ids=_name)
def test_model_matches_oracle(case: Case, kernels: Kernels) -> None:
    check_all(replace(case, config=replace(case.config, kernels=kernels)))


def test_warmup_computes_what_full_does() -> None:
    """Who is frozen is the optimizer's business: same losses and gradients, bit for bit."""
    config = tiny_config(kernels=Kernels.fast)
    full, warmup = (run_ours(Case("p", config, ((30,),), phase=p)) for p in ("full", "warmup"))
    assert torch.equal(full.total, warmup.total)
    assert all(torch.equal(full.grads[n], warmup.grads[n]) for n in full.grads)


def test_packed_case_exercises_every_part() -> None:
    """The main case is worth something: clamps act, top-k leaves entries out, losses are not 0."""
    case = CASES[0]
    result, grads = oracle(case)
    assert 0.02 < result.clamped < 0.5
    most = max(len(v) for choices in result.selected.values() for v in choices.values())
    assert most == case.config.index_topk < 34 // 4
    assert all(float(v) > 1e-3 for v in result.losses.values())
    assert {g.split(".")[0] for g in result.expert_load} == {"layers", "mtp"}
    assert sum("indexer" in n for n in grads) == 2 * 6


def test_yarn_off_matches_oracle() -> None:
    """``model.yarn = False`` is plain RoPE of the compressed base; it does change the logits."""
    case = Case("no yarn", tiny_config(), ((40,),))
    model, batch = build_ours(case, make_weights(case)), make_batch(case)
    with torch.no_grad():
        with_yarn = model.logits(batch.input_ids_BT)
        model.yarn = False
        without = model.logits(batch.input_ids_BT)
    expected = run_oracle_plain(case)
    assert float((without.double() - expected).abs().max()) < 1e-5
    assert float((with_yarn - without).abs().max()) > 1e-2


def run_oracle_plain(case: Case) -> torch.Tensor:
    with torch.no_grad():
        return run_oracle(
            as_leaves(make_weights(case)), case.config, make_batch(case).input_ids_BT, yarn=False
        ).logits_BTV


@pytest.mark.core
def test_oracle_sinkhorn_gives_golden_values() -> None:
    """reference B.2's published numbers, a second leg for the oracle's mHC."""
    logits = torch.tensor(
        [[1, 2, 3, 4], [0, 1, 0, 1], [-1, 0, 2, 1], [0.5, 0.5, -0.5, -0.5]], dtype=torch.float64
    )
    golden = torch.tensor(
        [
            [0.090269, 0.138944, 0.234342, 0.536445],
            [0.270645, 0.416589, 0.095090, 0.217676],
            [0.084874, 0.130639, 0.598933, 0.185553],
            [0.554212, 0.313828, 0.071634, 0.060326],
        ],
        dtype=torch.float64,
    )
    assert torch.allclose(sinkhorn(logits, 20, 1e-6), golden, atol=1e-6, rtol=0)


@pytest.mark.core
def test_short_packed_row_matches_oracle() -> None:
    """The quickest whole-model check: one packed row, all losses, gradients."""
    case = Case("quick", tiny_config(kernels=Kernels.fast, **_one), ((9, 14, -2),), cut=True)
    check_all(case, run_ours(case))
