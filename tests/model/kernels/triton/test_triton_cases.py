"""Which test shows what of which Triton operator, and that nothing is left out.

``COVERED`` names for every family of operators and every case a test and a text that stands in it:
its parameters, or what it does. A test that loses its case fails here, and so does an operator in
no family. Where a case cannot arise it says why.
"""

import ast
import re
from pathlib import Path

import pytest

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

HERE = Path(__file__).parent
# Family -> beginnings of its operators' names.
FAMILIES = {
    "attention": ("attention", "pack_bits", "list_lengths"),
    "indexer_loss": ("indexer_loss",),
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
BY_CHECK = "check("  # NaN first and two shuffled orders, see checks.check
BY_HAND = "with poisoned(), shuffled("
TOKENS = "-- takes rows, and knows no documents"
MADE_FP32 = "-- its inputs are fp32 in every precision"
COVERED = {
    "odd lengths": {
        "attention": ("test_shapes", "(31, 40)"),
        "indexer_loss": ("test_loss_is_the_reference", "packed(4, 3, -1, ratio=2)"),
        "index_topk": ("test_choice_is_the_reference", "packed(11, 9, -2, ratio=2"),
        "mhc": ("test_mhc_is_the_reference", "(1, 19, 4, 70, F32"),
        "grouped": ("test_grouped_linear_is_the_definition", "[17, 0, 1, 15], 40, 70"),
        "moves": ("test_moves_are_the_references", "(13, 3, 40)"),
        "rms_norm": ("test_rms_norm_is_the_reference", "(3, 70, 5)"),
        "rope": ("test_rope_is_the_reference", "((2, 7), 80, 32)"),
        "swiglu": ("test_swiglu_is_the_reference", "(13, 48), (3, 1030)"),
        "fake_quant": ("test_every_format_and_ragged_shapes", "(2, 5, 31)"),
        "cross_entropy": ("test_loss_and_gradient_are_exact_to_their_rounding", "(5, 1300)"),
        "pool": ("test_pool_is_the_reference", "(6, 5, False)"),
        "gate": ("test_gate_is_the_reference", "(33, 6, 2, False)"),
        "order": ("test_order_is_the_reference", "(37, 5, 3)"),
        "balance": ("test_load_and_balance_are_the_references", "[0] * 31 + [1] * 50"),
        "symmetric": ("test_products_are_those_of_float64_and_symmetric", "(3, 37, 21)"),
    },
    "one token": {
        "attention": ("test_shapes", '("list", (1,), 1, 32'),
        "indexer_loss": ("test_loss_of_shapes", '("list", (1,), 1, 32'),
        "index_topk": ("test_choice_of_one_token", "packed(1, ratio=1)"),
        "mhc": ("test_mhc_is_the_reference", "(1, 1, 4, 37"),
        "grouped": ("test_grouped_linear_is_the_definition", "([1], 1, 1, 1.0)"),
        "moves": ("test_moves_are_the_references", "(1, 1, 1)"),
        "rms_norm": ("test_rms_norm_is_the_reference", "((1, 1), 1.0)"),
        "rope": ("test_rope_is_the_reference", "((1, 1), 64, 32)"),
        "swiglu": ("test_swiglu_is_the_reference", "(1, 1)"),
        "fake_quant": ("test_every_format_and_ragged_shapes", "(4, 1, 1)"),
        "cross_entropy": ("test_loss_and_gradient_are_exact_to_their_rounding", "(1, 1)"),
        "pool": ("test_pool_of_one_token_and_of_tiny_values", "[[0]]"),
        "gate": ("test_gate_is_the_reference", "(1, 1, 1, False)"),
        "order": ("test_order_is_the_reference", "(1, 1, 1)"),
        "balance": ("test_balance_of_one_token", "[[0]]"),
        "symmetric": ("test_products_are_those_of_float64_and_symmetric", "(1, 1, 5)"),
    },
    "packed documents of odd lengths": {
        "attention": ("test_attention_is_the_reference", "packed(3, 6, -1)"),
        "indexer_loss": ("test_loss_is_the_reference", "packed(4, 3, -1, ratio=2)"),
        "index_topk": ("test_choice_is_the_reference", "packed(11, 9, -2, ratio=2"),
        "mhc": TOKENS,
        "grouped": TOKENS,
        "moves": TOKENS,
        "rms_norm": TOKENS,
        "rope": "-- takes positions",
        "swiglu": TOKENS,
        "fake_quant": TOKENS,
        "cross_entropy": TOKENS,
        "pool": ("test_pool_is_the_reference", "of(pool, ratio, overlap)"),  # 9, 3, 14, 29 tokens
        "gate": TOKENS,
        "order": TOKENS,
        "balance": ("test_load_and_balance_are_the_references", "[2] * 95 + [3]"),
        "symmetric": "-- takes matrices",
    },
    "rows without entries": {
        "attention": ("test_shapes", '("none", (31, 40)'),
        "indexer_loss": ("test_queries_without_entries_give_zero", "packed(4, -2, ratio=5)"),
        "index_topk": ("test_choice_is_the_reference", "packed(11, 9, -2, ratio=2"),
        "pool": ("test_tokens_that_serve_no_entry_have_no_gradient", "a document too short"),
    },
    "-1 indices": {
        "attention": ("test_queries_that_choose_nothing", "index_BTN.fill_(-1)"),
        "indexer_loss": ("test_loss_is_the_reference", '("list", torch.float16)'),
        "index_topk": ("test_scores_that_are_not_finite_are_ranked_as_by_the_reference", "-1, -1"),
        "cross_entropy": ("test_loss_and_gradient_are_exact_to_their_rounding", "randint(-1, V"),
    },
    "top-k above and below the entries": {
        "attention": ("test_shapes", '"chosen": 5, "ratio": 1'),
        "indexer_loss": ("test_loss_of_shapes", '{"ratio": 1, "chosen": 5}'),
        "index_topk": ("test_choice_is_the_reference", "[1, 3, 99]"),
    },
    "saturated clamp": {
        "swiglu": ("test_clamped_elements_have_no_gradient_and_nan_stays", "[[11.0, 3.0"),
        "fake_quant": ("test_every_magnitude_near_an_edge_of_the_scale", "fmt.largest"),
    },
    "head dim 32": {
        "attention": ("test_shapes", "(1,), 1, 32"),
        "indexer_loss": ("test_loss_of_shapes", "(1,), 1, 32"),
    },
    "head dim 64": {
        "attention": ("test_shapes", "(3, 2), 12, 64"),
        "indexer_loss": ("test_loss_of_shapes", "(3, 2), 16, 64"),
        "rope": ("test_rope_is_the_reference", "((1, 1), 64, 32)"),
    },
    "head dim 128": {
        "attention": ("test_shapes", '("range", (9,), 4, 128'),
        "indexer_loss": ("test_loss_of_shapes", "(3,), 64, 128"),
    },
    "head dim 512": {
        "attention": ("test_shapes", '("list", (4,), 2, 512'),
        "indexer_loss": "-- the indexer's heads have 128 dims at most in V4",
        "rope": ("test_rope_is_the_reference", "((1, 2, 1), 512, 32)"),
    },
    "one head": {
        "attention": ("test_shapes", '("bits", (1,), 1, 32'),
        "indexer_loss": ("test_loss_of_shapes", '("range", (1,), 1, 32'),
        "index_topk": ("test_equal_scores_go_to_the_lower_entry", "torch.ones(1, 8, 1, 16)"),
    },
    "128 heads": {
        "attention": ("test_shapes", '("bits", (2, 1), 128, 32'),
        "indexer_loss": ("test_loss_of_shapes", '("list", (2,), 128, 16'),
        "rope": ("test_rope_is_the_reference", "((1, 3, 128), 12, 3)"),
    },
    "trained scale": {
        "attention": ("test_small_and_large_activations", '("list", 3.0), ("bits", 3.0)'),
        "indexer_loss": ("test_loss_of_shapes", "16, 64, 3.0"),
        "mhc": ("test_mhc_is_the_reference", "37, F32, 3.0, 20"),
        "grouped": ("test_grouped_linear_is_the_definition", "16, 16, 4.0"),
        "rms_norm": ("test_rms_norm_is_the_reference", "((33, 130), 8.0)"),
        "swiglu": ("test_swiglu_is_the_reference", "[1e-4, 1.0, 8.0]"),
        "cross_entropy": (
            "test_loss_and_gradient_are_exact_to_their_rounding",
            "[1e-3, 1.0, 30.0]",
        ),
        "fake_quant": ("test_every_format_and_ragged_shapes", "hard(shape)"),
        "pool": ("test_pool_is_the_reference", "torch.randn(2, 29, C) * 3"),
        "gate": ("test_gate_is_the_reference", "torch.randn(N, E) * 4"),
    },
    "tiny": {
        "attention": ("test_small_and_large_activations", '("range", 1e-4)'),
        "indexer_loss": ("test_loss_of_shapes", "16, 20, 1e-3"),
        "mhc": ("test_mhc_is_the_reference", "70, F32, 1e-3, 4"),
        "grouped": ("test_grouped_linear_is_the_definition", "33, 7, 1e-3"),
        "rms_norm": ("test_rms_norm_is_the_reference", "((3, 70, 5), 1e-4)"),
        "swiglu": ("test_swiglu_is_the_reference", "[1e-4, 1.0, 8.0]"),
        "cross_entropy": (
            "test_loss_and_gradient_are_exact_to_their_rounding",
            "[1e-3, 1.0, 30.0]",
        ),
        "fake_quant": ("test_every_format_and_ragged_shapes", "hard(shape)"),
        "pool": ("test_pool_of_one_token_and_of_tiny_values", "1e-4"),
    },
    "mixed dtype": {
        "attention": ("test_bf16_keys_beside_an_fp32_sink_keep_their_dtypes", "torch.bfloat16"),
        "indexer_loss": ("test_bf16_beside_fp32_weights_keeps_its_dtypes", "torch.bfloat16"),
        "index_topk": (
            "test_a_trace_has_the_shapes_and_launches_of_a_run",
            "indexer_inputs(rows, 2, 16, torch.float16)",
        ),
        "mhc": ("test_bf16_streams_keep_their_dtype_and_the_fp32_of_parameters", "BF16"),
        "grouped": ("test_fp32_masters_get_gradients_that_are_rounded_once", ".half()"),
        "moves": ("test_moves_are_the_references", ".to(dtype) for n in"),  # fp32 weights
        "rms_norm": ("test_bf16_keeps_its_dtype_and_fp32_that_of_the_weight", ".bfloat16()"),
        "rope": ("test_rope_is_the_reference", ".to(dtype)"),  # fp32 tables
        "swiglu": ("test_swiglu_is_the_reference", "up.to(dtype), weight"),
        "fake_quant": ("test_dtypes", "(F16, torch.float32)"),
        "cross_entropy": ("test_loss_and_gradient_are_exact_to_their_rounding", "[F32, F16]"),
        "pool": ("test_bf16_is_rounded_once", "torch.bfloat16"),
        "gate": MADE_FP32,
        "order": "-- takes indices",
        "balance": MADE_FP32,
        "symmetric": "-- one operand, of one dtype",
    },
    "outputs that start as NaN, programs in any order": {
        "attention": ("test_attention_is_the_reference", "hold("),
        "indexer_loss": ("test_loss_is_the_reference", "hold("),
        "index_topk": ("test_choice_is_the_reference", BY_HAND),
        "mhc": ("test_mhc_is_the_reference", BY_CHECK),
        "grouped": ("test_grouped_linear_is_the_definition", BY_CHECK),
        "moves": ("test_moves_are_the_references", BY_HAND),
        "rms_norm": ("test_rms_norm_is_the_reference", BY_CHECK),
        "rope": ("test_rope_is_the_reference", BY_CHECK),
        "swiglu": ("test_swiglu_is_the_reference", BY_CHECK),
        "fake_quant": ("assert_same", BY_HAND),
        "cross_entropy": ("test_loss_and_gradient_are_exact_to_their_rounding", BY_HAND),
        "pool": ("test_pool_is_the_reference", BY_CHECK),
        "gate": ("test_gate_is_the_reference", BY_CHECK),
        "order": ("test_order_is_the_reference", BY_HAND),
        "balance": ("test_load_and_balance_are_the_references", BY_CHECK),
        "symmetric": ("test_products_are_those_of_float64_and_symmetric", BY_HAND),
    },
}
# Cases that every family meets, or says why it cannot; the others are of those that have them.
ALL = (
    "odd lengths", "one token", "packed documents of odd lengths", "mixed dtype",
    "outputs that start as NaN, programs in any order",
)  # fmt: skip
FILES = {
    "index_topk": "indexer", "indexer_loss": "indexer", "moves": "grouped", "rms_norm": "norm_rope",
    "rope": "norm_rope", "gate": "routing", "order": "routing", "balance": "routing",
}  # fmt: skip


def first(node):
    return min([node.lineno, *(d.lineno for d in node.decorator_list)])


def functions(family):
    """Source of each function of a family's test file, decorators included."""
    text = (HERE / f"test_triton_{FILES.get(family, family)}.py").read_text()
    lines = text.splitlines()
    return {
        node.name: "\n".join(
            lines[
                min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1 : node.end_lineno
            ]
        )
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
    }


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
        missing = (
            set(FAMILIES) - set(covered) - ({"index_topk"} if case == "mixed dtype" else set())
        )
        assert not missing
    for family, test in covered.items():
        if isinstance(test, str):
            assert re.match(r"-- \w+", test)
            continue
        name, text = test
        found = functions(family)
        assert name in found, f"{family}: {name}"
        assert text in found[name], f"{family}: {name} has no {text}"
