"""Which test shows what of which Triton operator, and that nothing is left out.

``COVERED`` names for every family of operators and every case a test: with the parameters it runs
with (``With``, read from what pytest makes its cases of), or an expression of its body (``Does``).
A test that loses its case, or is skipped, fails here, and so does an operator in no family. Where a
case cannot arise it says why.
"""

import ast
import importlib
import inspect
import itertools
import re
from typing import NamedTuple

import pytest
import torch

from model.kernels.triton import (  # noqa: F401  registered by their import
    attention,
    cross_entropy,
    fake_quant,
    grouped,
    indexer,
    mhc,
    norm_rope,
    pool,
    routing,
    swiglu,
    symmetric,
)
from model.kernels.triton.launch import IMPLEMENTATIONS
from tests.model.kernels.triton.attention_cases import ATOMIC

# Family -> beginnings of its operators' names.
FAMILIES = {
    "attention": ("attention", "pack_bits", "list_lengths"),
    "indexer_loss": ("indexer_loss",),
    # model.deterministic=false: of these two operators, sums over the pairs of lists.
    "attention, atomic": (),
    "indexer_loss, atomic": (),
    "index_topk": ("index_topk",),
    "mhc": ("mhc_",),
    "grouped": ("grouped", "blocks"),
    "moves": ("send", "row_sums"),
    "rms_norm": ("rms_norm",),
    "rope": ("rope",),
    "swiglu": ("swiglu",),
    "fake_quant": ("fake_quant",),
    "cross_entropy": ("cross_entropy",),
    "pool": ("pool",),
    "gate": ("gate",),
    "order": ("expert_order",),
    "balance": ("balance", "document_counts"),
    "symmetric": ("symmetric_product",),
}


class With(NamedTuple):
    """A test runs with these among its parameters."""

    test: str
    values: dict


class Does(NamedTuple):
    """A test evaluates these expressions."""

    test: str
    expressions: tuple


def with_(test, **values):
    return With(test, values)


def does(test, *expressions):
    return Does(test, expressions)


# NaN first and two shuffled orders, see checks.check
BY_CHECK, BY_HAND = ("check(...)",), ("poisoned()", "shuffled(...)")
TOKENS = "-- takes rows, and knows no documents"
MADE_FP32 = "-- its inputs are fp32 in every precision"
F16, BF16 = torch.float16, torch.bfloat16
ATTENTION, SHAPES = "test_attention_is_the_reference", "test_shapes"
NOTHING = "test_queries_that_choose_nothing"
BF16_KEYS = "test_bf16_keys_beside_an_fp32_sink_keep_their_dtypes"
BF16_LOSS = "test_bf16_beside_fp32_weights_keeps_its_dtypes"
LOSS, LOSS_SHAPES = "test_loss_is_the_reference", "test_loss_of_shapes"
CHOICE, MHC = "test_choice_is_the_reference", "test_mhc_is_the_reference"
GROUPED, MOVES = "test_grouped_linear_is_the_definition", "test_moves_are_the_references"
NORM, ROPE = "test_rms_norm_is_the_reference", "test_rope_is_the_reference"
SWIGLU, QUANT = "test_swiglu_is_the_reference", "test_every_format_and_ragged_shapes"
CROSS_ENTROPY = "test_loss_and_gradient_are_exact_to_their_rounding"
POOL, ONE_POOL = "test_pool_is_the_reference", "test_pool_of_one_token_and_of_tiny_values"
GATE, ORDER = "test_gate_is_the_reference", "test_order_is_the_reference"
BALANCE = "test_load_and_balance_are_the_references"
SYMMETRIC = "test_products_are_those_of_float64_and_symmetric"
COVERED = {
    "odd lengths": {
        "attention": with_(SHAPES, documents=(31, 40)),
        "indexer_loss": does(LOSS, "packed(4, 3, -1, ratio=2)"),
        "index_topk": does(CHOICE, "packed(11, 9, -2, ...)"),
        "mhc": with_(MHC, T=19, D=70),
        "grouped": with_(GROUPED, counts=[17, 0, 1, 15], outs=70),
        "moves": with_(MOVES, T=13, K=3),
        "rms_norm": with_(NORM, shape=(3, 70, 5)),
        "rope": with_(ROPE, lead=(2, 7)),
        "swiglu": with_(SWIGLU, rows=13) ,
        "fake_quant": with_(QUANT, shape=(2, 5, 31)),
        "cross_entropy": with_(CROSS_ENTROPY, N=5, V=1300),
        "pool": with_(POOL, ratio=29),
        "gate": with_(GATE, N=33),
        "order": with_(ORDER, N=37, E=5),
        "balance": does(BALANCE, "[0] * 31 + [1] * 50 + [-1] * 15"),
        "symmetric": with_(SYMMETRIC, rows=37, cols=21),
        "attention, atomic": with_(SHAPES, mode=ATOMIC, documents=(7, 5)),
        "indexer_loss, atomic": with_(LOSS_SHAPES, mode=ATOMIC, documents=(3, 2)),
    },
    "one token": {
        "attention": with_(SHAPES, documents=(1,)),
        "indexer_loss": with_(LOSS_SHAPES, documents=(1,)),
        "index_topk": does("test_choice_of_one_token", "packed(1, ratio=1)"),
        "mhc": with_(MHC, B=1, T=1),
        "grouped": with_(GROUPED, counts=[1]),
        "moves": with_(MOVES, T=1),
        "rms_norm": with_(NORM, shape=(1, 1)),
        "rope": with_(ROPE, lead=(1, 1)),
        "swiglu": with_(SWIGLU, rows=1),
        "fake_quant": with_(QUANT, shape=(4, 1, 1)),
        "cross_entropy": with_(CROSS_ENTROPY, N=1),
        "pool": does(ONE_POOL, "torch.tensor([[0]])"),
        "gate": with_(GATE, N=1),
        "order": with_(ORDER, N=1),
        "balance": does("test_balance_of_one_token", "torch.tensor([[0]])"),
        "symmetric": with_(SYMMETRIC, count=1, rows=1),
        "attention, atomic": with_(SHAPES, mode=ATOMIC, documents=(1,)),
        "indexer_loss, atomic": with_(LOSS_SHAPES, mode=ATOMIC, documents=(1,)),
    },
    "packed documents of odd lengths": {
        "attention": does(ATTENTION, "packed(3, 6, -1)"),
        "indexer_loss": does(LOSS, "packed(4, 3, -1, ratio=2)"),
        "index_topk": does(CHOICE, "packed(11, 9, -2, ...)"),
        "mhc": TOKENS,
        "grouped": TOKENS,
        "moves": TOKENS,
        "rms_norm": TOKENS,
        "rope": "-- takes positions",
        "swiglu": TOKENS,
        "fake_quant": TOKENS,
        "cross_entropy": TOKENS,
        "pool": does(POOL, "of(pool, ratio, overlap)"),  # 9, 3, 14, 29 tokens
        "gate": TOKENS,
        "order": TOKENS,
        "balance": does(BALANCE, "[2] * 95 + [3]"),
        "symmetric": "-- takes matrices",
        "attention, atomic": with_(ATTENTION, mode=ATOMIC),
        "indexer_loss, atomic": with_(LOSS, mode=ATOMIC),
    },
    "rows without entries": {
        "attention": with_(SHAPES, mode="none"),
        "indexer_loss": does("test_queries_without_entries_give_zero", "packed(4, -2, ratio=5)"),
        "index_topk": does(CHOICE, "packed(11, 9, -2, ...)"),  # first tokens, and padding
        "pool": does("test_tokens_that_serve_no_entry_have_no_gradient", "grad[0, 9:12]"),
        "attention, atomic": with_(NOTHING, mode=ATOMIC),
        "indexer_loss, atomic": with_("test_queries_without_entries_give_zero", mode=ATOMIC),
    },
    "-1 indices": {
        "attention": does("test_queries_that_choose_nothing", "rows.index_BTN.fill_(-1)"),
        "indexer_loss": with_(LOSS, mode="list"),
        "index_topk": does("test_scores_that_are_not_finite_are_ranked_as_by_the_reference",
                           "[0, 1, -1, -1, -1, -1]"),
        "cross_entropy": does(CROSS_ENTROPY, "torch.randint(-1, V, (N,))"),
        "attention, atomic": with_(NOTHING, mode=ATOMIC),
        "indexer_loss, atomic": with_(LOSS, mode=ATOMIC),
    },
    "top-k above and below the entries": {
        "attention": with_(SHAPES, documents=(2, 1), more={"batch": 2, "chosen": 5, "ratio": 1}),
        "indexer_loss": with_(LOSS_SHAPES, documents=(3,), more={"ratio": 1, "chosen": 5}),
        "index_topk": with_(CHOICE, topk=99),
        "attention, atomic": with_(SHAPES, mode=ATOMIC, more={"batch": 2, "chosen": 5, "ratio": 1}),
        "indexer_loss, atomic": with_(LOSS_SHAPES, mode=ATOMIC, more={"ratio": 1, "chosen": 5}),
    },
    "saturated clamp": {
        "swiglu": does("test_clamped_elements_have_no_gradient_and_nan_stays",
                       "torch.tensor([[11.0, 3.0, float('nan'), float('inf')]], ...)"),
        "fake_quant": does("test_every_magnitude_near_an_edge_of_the_scale", "fmt.largest"),
    },
    "head dim 32": {
        "attention": with_(SHAPES, K=32),
        "indexer_loss": with_(LOSS_SHAPES, L=32),
        "attention, atomic": with_(SHAPES, mode=ATOMIC, K=32),
        "indexer_loss, atomic": with_(LOSS_SHAPES, mode=ATOMIC, L=32),
    },
    "head dim 64": {
        "attention": with_(SHAPES, K=64),
        "indexer_loss": with_(LOSS_SHAPES, L=64),
        "rope": with_(ROPE, K=64),
        "attention, atomic": with_(SHAPES, mode=ATOMIC, K=64),
    },
    "head dim 128": {
        "attention": with_(SHAPES, K=128),
        "indexer_loss": with_(LOSS_SHAPES, L=128),
        "attention, atomic": with_(SHAPES, mode=ATOMIC, K=128),
        "indexer_loss, atomic": with_(LOSS_SHAPES, mode=ATOMIC, L=128),
    },
    "head dim 512": {
        "attention": with_(SHAPES, K=512),
        "indexer_loss": "-- the indexer's heads have 128 dims at most in V4",
        "rope": with_(ROPE, K=512),
        "attention, atomic": with_(SHAPES, mode=ATOMIC, K=512),
    },
    "one head": {
        "attention": with_(SHAPES, heads=1),
        "indexer_loss": with_(LOSS_SHAPES, J=1),
        "index_topk": does("test_equal_scores_go_to_the_lower_entry", "torch.ones(1, 8, 1, 16)"),
        "attention, atomic": with_(SHAPES, mode=ATOMIC, heads=1),
        "indexer_loss, atomic": with_(LOSS_SHAPES, mode=ATOMIC, J=1),
    },
    "128 heads": {
        "attention": with_(SHAPES, heads=128),
        "indexer_loss": with_(LOSS_SHAPES, J=128),
        "rope": with_(ROPE, lead=(1, 3, 128)),
        "attention, atomic": with_(SHAPES, mode=ATOMIC, heads=128),
        "indexer_loss, atomic": with_(LOSS_SHAPES, mode=ATOMIC, J=128),
    },
    "trained scale": {
        "attention": with_("test_small_and_large_activations", size=3.0),
        "indexer_loss": with_(LOSS_SHAPES, size=3.0),
        "mhc": with_(MHC, size=3.0),
        "grouped": with_(GROUPED, size=4.0),
        "rms_norm": with_(NORM, size=8.0),
        "swiglu": with_(SWIGLU, size=8.0),
        "cross_entropy": with_(CROSS_ENTROPY, size=30.0),
        "fake_quant": does(QUANT, "hard(shape)"),
        "pool": does(POOL, "torch.randn(2, 29, C) * 3"),
        "gate": does(GATE, "torch.randn(N, E) * 4"),
        "attention, atomic": with_("test_small_and_large_activations", mode=ATOMIC, size=3.0),
        "indexer_loss, atomic": with_(LOSS_SHAPES, mode=ATOMIC, size=3.0),
    },
    "tiny": {
        "attention": with_("test_small_and_large_activations", size=1e-4),
        "indexer_loss": with_(LOSS_SHAPES, size=1e-3),
        "mhc": with_(MHC, size=1e-3),
        "grouped": with_(GROUPED, size=1e-3),
        "rms_norm": with_(NORM, size=1e-4),
        "swiglu": with_(SWIGLU, size=1e-4),
        "cross_entropy": with_(CROSS_ENTROPY, size=1e-3),
        "fake_quant": does(QUANT, "hard(shape)"),
        "pool": does(ONE_POOL, "torch.randn(1, 1, 12) * 0.0001"),
        "attention, atomic": with_("test_small_and_large_activations", mode=ATOMIC, size=1e-4),
        "indexer_loss, atomic": with_(LOSS_SHAPES, mode=ATOMIC, size=1e-3),
    },
    "fp16": {
        "attention": with_(ATTENTION, dtype=F16),
        "indexer_loss": with_(LOSS, dtype=F16),
        "index_topk": does("test_choice_of_fp16_is_the_reference", "[q.half(), k.half(), w]"),
        "mhc": with_(MHC, dtype=F16),
        "grouped": with_(GROUPED, dtype=F16),
        "moves": with_(MOVES, dtype=F16),
        "rms_norm": with_(NORM, dtype=F16),
        "rope": with_(ROPE, dtype=F16),
        "swiglu": with_(SWIGLU, dtype=F16),
        "fake_quant": with_("test_dtypes", dtype=F16),
        "cross_entropy": with_(CROSS_ENTROPY, dtype=F16),
        "pool": "-- its inputs are fp32, and its output is rounded once",
        "gate": MADE_FP32,
        "order": "-- takes indices",
        "balance": MADE_FP32,
        "symmetric": with_(SYMMETRIC, dtype=F16),
        "attention, atomic": with_(ATTENTION, mode=ATOMIC, dtype=F16),
        "indexer_loss, atomic": with_(LOSS, mode=ATOMIC, dtype=F16),
    },
    "mixed dtype": {
        "attention": does(BF16_KEYS, "inputs(rows, 2, 16, torch.bfloat16)"),
        "indexer_loss": does(BF16_LOSS, "indexer_inputs(rows, 3, 16, torch.bfloat16)"),
        "mhc": does("test_bf16_streams_keep_their_dtype_and_the_fp32_of_parameters", "BF16"),
        "grouped": does("test_fp32_masters_get_gradients_that_are_rounded_once",
                        "torch.randn(17, 24).half()"),
        "moves": does(MOVES, "torch.randn(n, C).to(dtype)"),  # fp32 weights
        "rms_norm": does("test_bf16_keeps_its_dtype_and_fp32_that_of_the_weight",
                         "torch.randn(5, 8).bfloat16()"),
        "rope": does(ROPE, "torch.randn(*lead, K).to(dtype)"),  # fp32 tables
        "swiglu": does(SWIGLU, "[gate.to(dtype), up.to(dtype), weight, 10.0]"),
        "fake_quant": with_("test_dtypes", dtype=F16, out=torch.float32),
        "cross_entropy": with_(CROSS_ENTROPY, dtype=F16),
        "pool": does("test_bf16_is_rounded_once", "of(m, 4, True, torch.bfloat16)"),
        "index_topk": does("test_choice_of_fp16_is_the_reference", "[q.half(), k.half(), w]"),
        "gate": MADE_FP32,
        "order": "-- takes indices",
        "balance": MADE_FP32,
        "symmetric": "-- one operand, of one dtype",
        "attention, atomic": with_(BF16_KEYS, mode=ATOMIC),
        "indexer_loss, atomic": with_(BF16_LOSS, mode=ATOMIC),
    },
    "outputs that start as NaN, programs in any order": {
        "attention": does(ATTENTION, "hold(...)"),
        "indexer_loss": does(LOSS, "hold(...)"),
        "index_topk": does(CHOICE, *BY_HAND),
        "mhc": does(MHC, *BY_CHECK),
        "grouped": does(GROUPED, *BY_CHECK),
        "moves": does(MOVES, *BY_HAND),
        "rms_norm": does(NORM, *BY_CHECK),
        "rope": does(ROPE, *BY_CHECK),
        "swiglu": does(SWIGLU, *BY_CHECK),
        "fake_quant": does("assert_same", *BY_HAND),
        "cross_entropy": does(CROSS_ENTROPY, *BY_HAND),
        "pool": does(POOL, *BY_CHECK),
        "gate": does(GATE, *BY_CHECK),
        "order": does(ORDER, *BY_HAND),
        "balance": does(BALANCE, *BY_CHECK),
        "symmetric": does(SYMMETRIC, *BY_HAND),
        "attention, atomic": does(ATTENTION, "hold(...)"),
        "indexer_loss, atomic": does(LOSS, "hold(...)"),
    },
}  # fmt: skip
# Cases that every family meets, or says why it cannot; the others are of those that have them.
ALL = (
    "odd lengths", "one token", "packed documents of odd lengths", "fp16", "mixed dtype",
    "outputs that start as NaN, programs in any order",
)  # fmt: skip
FILES = {
    "attention, atomic": "attention", "indexer_loss, atomic": "indexer",
    "index_topk": "indexer", "indexer_loss": "indexer", "moves": "grouped", "rms_norm": "norm_rope",
    "rope": "norm_rope", "gate": "routing", "order": "routing", "balance": "routing",
}  # fmt: skip


def module_of(family):
    """What a family's test file holds."""
    return importlib.import_module(
        f"tests.model.kernels.triton.test_triton_{FILES.get(family, family)}"
    )


def runs_of(test):
    """The parameters of every run of a test, as pytest makes them of its marks."""
    choices = []
    for mark in getattr(test, "pytestmark", []):
        assert mark.name == "parametrize", f"{test.__name__} is {mark.name}"
        names, values = mark.args
        names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
        given = [v if len(names) > 1 else (v,) for v in values]
        choices.append([dict(zip(names, v, strict=True)) for v in given])
    return [{k: v for part in run for k, v in part.items()} for run in itertools.product(*choices)]


def expressions_of(test):
    """All that a test evaluates; of a call also its beginnings, as ``f(a, ...)``."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(test)).body[0]):
        if not isinstance(node, ast.expr):
            continue
        found.add(ast.unparse(node))
        if isinstance(node, ast.Call):
            parts = [ast.unparse(x) for x in node.args]
            for count in range(len(parts) + 1):
                begin = ", ".join([*parts[:count], "..."])
                found.add(f"{ast.unparse(node.func)}({begin})")
    return found


def missing_of(family, covered):
    """What a family's file lacks of a case; empty: nothing."""
    test = getattr(module_of(family), covered.test, None)
    if test is None:
        return f"no {covered.test}"
    if isinstance(covered, With):
        wanted = covered.values.items()
        runs = runs_of(test)
        held = any(all(k in run and run[k] == v for k, v in wanted) for run in runs)
        return "" if held else f"{covered.test} never runs with {covered.values}"
    lost = set(covered.expressions) - expressions_of(test)
    return f"{covered.test} has no {sorted(lost)}" if lost else ""


def test_every_operator_is_of_one_family():
    for name in IMPLEMENTATIONS:
        short = name.removeprefix("v4::triton_")
        found = [f for f, starts in FAMILIES.items() if short.startswith(starts)]
        assert len(found) == 1, f"{name}: {found}"


@pytest.mark.parametrize("case", COVERED)
def test_every_case_has_its_test(case):
    covered = COVERED[case]
    assert set(covered) <= set(FAMILIES)
    if case in ALL:
        assert not set(FAMILIES) - set(covered)
    for family, test in covered.items():
        if isinstance(test, str):
            assert re.match(r"-- \w+", test)
            continue
        assert not missing_of(family, test), family


def test_a_case_that_is_lost_is_found():
    assert "never runs with" in missing_of("attention", with_(SHAPES, heads=127))
    assert "never runs with" in missing_of("attention", with_(SHAPES, header=1))
    assert "has no" in missing_of("pool", does(POOL, "torch.randn(2, 29, C) * 4"))
    assert missing_of("pool", does("test_gone", "pool")) == "no test_gone"

    @pytest.mark.skip
    def skipped():
        pass

    with pytest.raises(AssertionError, match="skip"):
        runs_of(skipped)
