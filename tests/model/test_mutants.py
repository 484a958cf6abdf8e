"""Mutation test: each known bug of V4 models, planted alone, makes a behavioural check fail.

The bugs are those of reference G.2 and of its G that concern the model, and a few more
that a reader of section B could make. A plant replaces one function of the running model; no source
is touched. The checks are the very functions that the tests of parity, causality and isolation
call. ``python -m tests.model.test_mutants`` prints the table mutant -> checks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest

from model.config import LayerKind, ModelConfig
from tests.parity import mutants_forward as fwd
from tests.parity import mutants_training as trn
from tests.parity.configs import tiny_config
from tests.parity.harness import (
    Case,
    Ours,
    check_entries,
    check_experts,
    check_gradients,
    check_load,
    check_logits,
    check_losses,
    run_ours,
)
from tests.parity.properties import (
    check_bias_evens_the_load,
    check_causality,
    check_hash_table,
    check_isolation,
    check_no_gradient_across,
)

# Large eps and few Sinkhorn steps, so that the place of an eps and the number of steps show.
_CONFIG = tiny_config(
    num_hidden_layers=3,
    layer_kinds=[LayerKind.swa, LayerKind.csa, LayerKind.hca],
    compress_ratios=[0, 4, 8],
    num_nextn_predict_layers=2,
    rms_norm_eps=1e-2,
    hc_eps=1e-2,
    hc_sinkhorn_iters=3,
    index_topk=2,
    sliding_window=6,
)
MAIN = Case("mutants", _CONFIG, ((9, 17, -2, 8),), cut=True, share=2, seed=7)
FULL = replace(MAIN, phase="full")
GAMMA = replace(MAIN, name="gamma", config=replace(_CONFIG, hc_gamma=True))
CASES = {"main": MAIN, "full": FULL, "gamma": GAMMA}

AGAINST_ORACLE: dict[str, Callable[[Case, Ours], None]] = {
    "logits": check_logits,
    "losses": check_losses,
    "gradients": check_gradients,
    "experts": check_experts,
    "entries": check_entries,
    "load": check_load,
}
LEARNS = AGAINST_ORACLE.keys() - {"logits"}  # these look at a training step
PROPERTIES: dict[str, Callable[[ModelConfig], None]] = {
    "causality": lambda config: check_causality(config, True, (8, 17, 30)),
    "isolation": lambda config: check_isolation(config, True),
    "no gradient across": check_no_gradient_across,
    "hash table": check_hash_table,
    "bias evens the load": check_bias_evens_the_load,
}


@dataclass(frozen=True)
class Mutant:
    """A planted bug.

    Attributes:
        source: where the bug was met: G (other stacks), or the section of the reference that it
            breaks.
        plant: puts it into the running model.
        checks: each of these must fail.
        case: which case the oracle's checks run on.
    """

    source: str
    plant: fwd.Plant
    checks: tuple[str, ...]
    case: str = "main"


_L, _G, _LG = ("logits",), ("gradients",), ("losses", "gradients")
_PACKING = ("logits", "isolation", "no gradient across")
MUTANTS: dict[str, Mutant] = {
    # mHC
    "comb_not_transposed": Mutant("G", fwd.comb_not_transposed, _L),
    "post_one_sigmoid": Mutant("G", fwd.post_one_sigmoid, _L),
    "post_with_eps": Mutant("G", fwd.post_with_eps, _L),
    "pre_without_eps": Mutant("B.2", fwd.pre_without_eps, _L),
    "reads_one_stream": Mutant("G", fwd.reads_one_stream, _L),
    "mix_static": Mutant("G", fwd.mix_static, _L),
    "sinkhorn_softmax_over_sources": Mutant("G", fwd.sinkhorn_softmax_over_sources, _L),
    "sinkhorn_eps_inside_softmax": Mutant("G", fwd.sinkhorn_eps_inside_softmax, _L),
    "sinkhorn_ten_iterations": Mutant("G", fwd.sinkhorn_ten_iterations, _L),
    "sinkhorn_row_step_last": Mutant("B.2", fwd.sinkhorn_row_step_last, _L),
    "projection_eps_outside_root": Mutant("G", fwd.projection_eps_outside_root, _L),
    "norm_eps_outside_root": Mutant("G", fwd.norm_eps_outside_root, _L),
    "head_is_a_mean": Mutant("G", fwd.head_is_a_mean, _L),
    "gamma_ignored": Mutant("B.2", fwd.gamma_ignored, _L, "gamma"),
    "embedding_noise": Mutant("B.1", trn.embedding_noise, _L),
    # RoPE
    "rope_rotate_half": Mutant("G", fwd.rope_rotate_half, _L),
    "rope_first_channels": Mutant("B.3", fwd.rope_first_channels, _L),
    "rope_base_40000": Mutant("G", fwd.rope_base_40000, _L),
    "yarn_wrong_factor": Mutant("G", fwd.yarn_wrong_factor, _L),
    "yarn_missing": Mutant("B.4", fwd.yarn_missing, _L),
    "yarn_on_window_layers": Mutant("G", fwd.yarn_on_window_layers, _L),
    "mscale_applied": Mutant("G", fwd.mscale_applied, _L),
    "base_mixed_in_a_layer": Mutant("G", fwd.base_mixed_in_a_layer, _L),
    "partial_rotary_twice": Mutant("G", fwd.partial_rotary_twice, _L),
    "inverse_rope_missing": Mutant("G", fwd.inverse_rope_missing, _L),
    "inverse_rope_in_place": Mutant("G", fwd.inverse_rope_in_place, _G),
    "entry_at_pool_index": Mutant("G", fwd.entry_at_pool_index, _L),
    # attention, clamp
    "sink_missing": Mutant("B.3", fwd.sink_missing, _L),
    "window_one_short": Mutant("B.3", fwd.window_one_short, _L),
    "window_one_long": Mutant("B.3", fwd.window_one_long, _L),
    "query_norm_missing": Mutant("B.3", fwd.query_norm_missing, _L),
    "window_kv_norm_missing": Mutant("B.3", fwd.window_kv_norm_missing, _L),
    "output_groups_shifted": Mutant("B.3", fwd.output_groups_shifted, _L),
    "shared_clamp_missing": Mutant("G", fwd.shared_clamp_missing, _L),
    "routed_clamp_missing": Mutant("G", fwd.routed_clamp_missing, _L),
    "clamp_straight_through": Mutant("B.9", fwd.clamp_straight_through, _G),
    "gate_clamped_below": Mutant("B.9", fwd.gate_clamped_below, _L),
    # compressor, packing, visibility
    "overlap_halves_swapped": Mutant("B.5", fwd.overlap_halves_swapped, _L),
    "ape_missing": Mutant("B.5", fwd.ape_missing, _L),
    "entry_zero_reads_before_itself": Mutant("B.5", fwd.entry_zero_reads_before_itself, _L),
    "overlap_crosses_documents": Mutant(
        "G",
        fwd.overlap_crosses_documents,
        ("logits", "isolation", "no gradient across"),
    ),
    "compressor_ignores_documents": Mutant(
        "G",
        fwd.compressor_ignores_documents,
        ("logits", "isolation", "no gradient across"),
    ),
    "entries_of_other_documents_visible": Mutant(
        "G", fwd.entries_of_other_documents_visible, ("entries", "logits", "isolation")
    ),
    "window_ignores_documents": Mutant(
        "G",
        fwd.window_ignores_documents,
        ("logits", "isolation", "no gradient across"),
    ),
    "positions_run_on": Mutant("H", fwd.positions_run_on, ("experts", "logits")),
    "padding_is_a_document": Mutant("H", fwd.padding_is_a_document, ("load", "losses")),
    "block_seen_before_its_end": Mutant(
        "B.6", fwd.block_seen_before_its_end, ("causality", "logits")
    ),
    "block_seen_one_token_late": Mutant("B.3", fwd.block_seen_one_token_late, _L),
    # indexer
    "indexer_sees_the_future": Mutant(
        "G", trn.indexer_sees_the_future, ("causality", "entries", "logits")
    ),
    "indexer_choice_unscored": Mutant("G", trn.indexer_choice_unscored, ("entries", "logits")),
    "indexer_rope_rotate_half": Mutant("G", trn.indexer_rope_rotate_half, ("entries",)),
    "hadamard_on_q_only": Mutant("G", trn.hadamard_on_q_only, ("entries", "losses")),
    "indexer_temperature_lost": Mutant("B.7", trn.indexer_temperature_lost, _LG),
    "indexer_weights_positive": Mutant("B.7", trn.indexer_weights_positive, ("entries",)),
    "indexer_inputs_attached": Mutant("B.8", trn.indexer_inputs_attached, _G),
    "indexer_never_trained": Mutant("G", trn.indexer_never_trained, _G),
    "indexer_weight_dropped": Mutant("G", trn.indexer_weight_dropped, _LG),
    "teacher_over_entries_only": Mutant("G", trn.teacher_over_entries_only, _LG),
    "teacher_over_entries_only_full": Mutant("G", trn.teacher_over_entries_only, _LG, "full"),
    "sparse_loss_over_all_entries": Mutant("G", trn.sparse_loss_over_all_entries, _LG),
    "topk_in_every_phase": Mutant("C.2", trn.topk_in_every_phase, _LG, "full"),
    "sparse_phase_attends_all": Mutant("C.2", trn.sparse_phase_attends_all, _LG),
    # routing
    "hash_table_zero": Mutant("G", trn.hash_table_zero, ("hash table",)),
    "hash_table_constant_row": Mutant("G", trn.hash_table_constant_row, ("hash table",)),
    "hash_table_ignored": Mutant("B.9", trn.hash_table_ignored, ("experts", "logits")),
    "hash_weights_equal": Mutant("B.9", trn.hash_weights_equal, ("logits", "gradients")),
    "weights_from_biased_scores": Mutant("B.9", trn.weights_from_biased_scores, _L),
    "weights_not_renormalised": Mutant("G", trn.weights_not_renormalised, _L),
    "route_scale_missing": Mutant("A.1", trn.route_scale_missing, _L),
    "scores_are_sigmoids": Mutant("B.9", trn.scores_are_sigmoids, _L),
    "choice_without_bias": Mutant("B.9", trn.choice_without_bias, ("experts",)),
    "shared_expert_scaled": Mutant("B.9", trn.shared_expert_scaled, _L),
    "load_counts_padding": Mutant("H", trn.load_counts_padding, ("load",)),
    "bias_moves_the_wrong_way": Mutant(
        "B.10", trn.bias_moves_the_wrong_way, ("bias evens the load",)
    ),
    # MTP, losses
    "balance_silently_zero": Mutant("G", trn.balance_silently_zero, _LG),
    "balance_over_the_batch": Mutant("H", trn.balance_over_the_batch, ("losses", "isolation")),
    "mtp_loses_the_streams": Mutant("B.11", trn.mtp_loses_the_streams, ("logits", "losses")),
    "mtp_cut_from_the_trunk": Mutant("B.11", trn.mtp_cut_from_the_trunk, _G),
    "mtp_reads_its_own_token": Mutant("B.11", trn.mtp_reads_its_own_token, ("logits", "losses")),
    "mtp_loss_per_microbatch": Mutant("G", trn.mtp_loss_per_microbatch, _LG),
    "mtp_depths_summed": Mutant("H", trn.mtp_depths_summed, _LG),
    "normaliser_off_by_one": Mutant("P.2", trn.normaliser_off_by_one, _LG),
    "ignored_labels_counted": Mutant("B.11", trn.ignored_labels_counted, _LG),
    "labels_one_off": Mutant("B.11", trn.labels_one_off, _LG),
}

# Bugs of the two lists that are none of the model's: where they are proven instead.
ELSEWHERE = {
    "compressor and indexer in low precision": "tests/quant",
    "indexer gradients, MTP and RoPE offset under context parallelism": "tests/parallel",
    "mHC at the boundaries of an overlapped expert-parallel schedule": "no such schedule",
    "mixed-dtype parameter groups in optimizer state": "tests/optim",
    "eager CSA out of memory": "tests/model/test_memory_growth.py",
    "V4 on pipeline stages": "tests/parallel",
    "Muon, resume, loader, QAT export, checkpoint rows of G": "tests of their packages",
}


def _check(name: str, case: Case, ours: Ours) -> None:
    if name in AGAINST_ORACLE:
        AGAINST_ORACLE[name](case, ours)
    else:
        PROPERTIES[name](case.config)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    mutant.plant(monkeypatch)
    case = CASES[mutant.case]
    needs = set(mutant.checks)
    ours = run_ours(case, train=bool(needs & LEARNS), logits="logits" in needs)
    for check in mutant.checks:
        with pytest.raises(AssertionError):
            _check(check, case, ours)


@pytest.mark.parametrize("case", CASES)
def test_real_model_passes_what_catches_mutants(case: str) -> None:
    """The checks fail for the bug's sake, not anyway."""
    ours = run_ours(CASES[case])
    names = [*AGAINST_ORACLE, *(PROPERTIES if case == "main" else ())]
    for name in names:
        _check(name, CASES[case], ours)


def table() -> str:
    """Mutant, source and checks as aligned text."""
    rows = [(name, m.source, ", ".join(m.checks)) for name, m in MUTANTS.items()]
    rows += [(name, "not the model", where) for name, where in ELSEWHERE.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows)


def test_table_lists_every_mutant_and_every_plant() -> None:
    """No plant was written and then forgotten."""
    used = {id(m.plant) for m in MUTANTS.values()}
    helpers = {"op", "attribute", "after_init", "rotate_half"}
    for module in (fwd, trn):
        for name, value in vars(module).items():
            home = getattr(value, "__module__", "")
            if callable(value) and name[0] != "_" and home.startswith("tests.parity.mutants"):
                assert name in helpers or id(value) in used, f"{name} is in no row"
    assert all(name in table() for name in MUTANTS)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
