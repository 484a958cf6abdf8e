"""Ours, and the float64 oracle, against transformers' DeepseekV4 with the same weights.

Bounds (fp32 on both sides, logits of order 1): logits 1e-5 max abs, gradients 1e-4 relative
Frobenius a tensor; the indexer's choice is the same wherever its score gap exceeds 1e-6. There are
64 indexer heads: with few, many scores are exactly 0 and top-k breaks ties arbitrarily. The indexer
gets no gradient in transformers, which has no loss for it. transformers is a dev dependency: this
file fails without it. Seeds are such that no tensor's gradient cancels to far below its usual size
(three numbers of a mHC scale may); there fp32, theirs too, leaves 1e-4 of it uncertain.
"""

# Legend: B rows, T tokens, E entries
from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

from model.config import Kernels, LayerKind, ModelConfig
from model.loss import Objective
from model.rope import rope_frequencies, rope_tables
from model.state_dict import load_transformers, to_official, to_transformers
from model.transformer import DeepSeekV4
from tests.parity.configs import tiny_config
from tests.parity.harness import (
    Case,
    build_ours,
    counts,
    gradients,
    local_entries,
    make_batch,
    make_weights,
    relative,
    run_ours,
)
from tests.parity.models import build_hf, hf_index_scores
from tests.parity.oracle import OracleObjective, run_oracle
from tests.parity.weights import Weights, as_leaves, hf_view
from train.config.command_line import compose_run
from train.config.transformers_json import transformers_config

LOGITS, GRADIENT, GAP = 1e-5, 1e-4, 1e-6
LM_ONLY = (0.0, 0.0, 0.0)

_released = tiny_config(
    layer_kinds=[],
    compress_ratios=[0, 128, 4, 128, 4],
    sliding_window=16,
    index_topk=8,
    max_position_embeddings=1024,
    rope_scaling=replace(tiny_config().rope_scaling, original_max_position_embeddings=256),
)
CASES = [
    *(Case("topk below the entries", tiny_config(index_topk=3), seed=s) for s in (1, 2, 3)),
    *(Case("topk above the entries", tiny_config(index_topk=64), seed=s) for s in (1, 2, 3)),
    *(Case("clamp on most", tiny_config(swiglu_limit=0.3), seed=s) for s in (2, 3, 4)),
    Case("released ratios, long", _released, rows=((301,),), seed=3),
    Case("shorter than any block", tiny_config(), rows=((3,), (3,))),
    Case("one token", tiny_config(), rows=((1,),)),
]
KERNELS = [Kernels.reference, Kernels.fast]


@functools.cache
def hf_run(case: Case) -> tuple[Tensor, Weights, dict[str, Tensor], dict[str, Tensor]]:
    """(logits, gradients of the mean cross-entropy, index scores, chosen entries)."""
    model = build_hf(case.config, make_weights(case))
    scores, chosen = hf_index_scores(model)
    batch = make_batch(case)
    logits = model(batch.input_ids_BT).logits
    if batch.input_ids_BT.shape[1] > 1:
        labels = batch.labels_BTK[..., 0]
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads, scores, chosen


def assert_gradients(ours: Weights, theirs: Weights) -> None:
    """Each weight that both train; only the indexer may be missing on their side."""
    nothing = torch.zeros(())
    trained = 0
    for name in theirs.keys() | ours.keys():
        if ".indexer." in name:
            assert theirs.get(name, nothing).abs().max() == 0
            continue
        got, want = ours.get(name, nothing), theirs.get(name, nothing)
        if want.abs().max() == 0:
            assert got.abs().max() == 0, f"{name} has a gradient here and none there"
            continue
        trained += 1
        error = relative(got, want)
        assert error <= GRADIENT, f"gradient of {name} is off by {error:.1e}"
    assert trained > 20


def same_where_it_matters(ours: Tensor, theirs: Tensor, scores: Tensor, ratio: int, k: int) -> int:
    """Compare choices where the gap at the edge exceeds ``GAP``; return rows with an edge."""
    B, T, E = scores.shape
    visible = (torch.arange(T) + 1) // ratio
    masked = scores.masked_fill(torch.arange(E) >= visible[:, None], float("-inf"))
    zeros = torch.zeros(B, T, dtype=torch.int64)
    got, want = local_entries(ours, zeros), local_entries(theirs, zeros)
    edges = 0
    for b in range(B):
        for t in range(T):
            if int(visible[t]) > k:
                edges += 1
                best = masked[b, t].sort(descending=True).values
                if best[k - 1] - best[k] <= GAP:
                    continue
            assert got[b][t] == want[b][t], f"row {b} query {t}: {got[b][t]} != {want[b][t]}"
    return edges


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.name}-{c.seed}".replace(" ", "_"))
def test_model_matches_transformers(case: Case, kernels: Kernels) -> None:
    case = replace(case, weights=LM_ONLY)
    logits, grads, scores, chosen = hf_run(case)
    case = replace(case, config=replace(case.config, kernels=kernels))
    ours = run_ours(case)
    worst = float((ours.logits_BTV - logits).abs().max())
    assert worst <= LOGITS, f"logits differ by {worst:.1e}"
    assert 0.3 < float(logits.abs().mean()) < 3, "logits are of order 1"
    if grads:
        theirs = grads
        assert_gradients(hf_view(ours.grads), theirs)
    edges = 0
    for layer, index in chosen.items():
        ratio = case.config.ratio(int(layer.split(".")[1]))
        theirs_scores = scores[layer]
        edges += same_where_it_matters(
            ours.record[layer], index, theirs_scores, ratio, case.config.index_topk
        )
    longest = max(map(sum, case.rows))
    assert (edges > 0) == (case.config.index_topk < longest // 4), "top-k acts where it should"


@pytest.mark.core
@pytest.mark.parametrize(("seed", "topk"), [(1, 3), (2, 3), (3, 64)])
def test_oracle_matches_transformers(seed: int, topk: int) -> None:
    """Proves the oracle itself: B.1 to B.9, before anything of ours is involved."""
    case = Case("oracle", tiny_config(index_topk=topk), rows=((43,),), seed=seed, weights=LM_ONLY)
    logits, grads, scores, chosen = hf_run(case)
    leaves, batch = as_leaves(make_weights(case)), make_batch(case)
    targets, tokens = counts(case, batch)
    result = run_oracle(
        leaves, case.config, batch.input_ids_BT, batch.document_ids_BT, batch.labels_BTK,
        OracleObjective(targets, tokens, *LM_ONLY),
    )  # fmt: skip
    assert result.total is not None
    result.total.backward()
    assert float((result.logits_BTV - logits).abs().max()) <= LOGITS
    expected = {
        n: torch.zeros_like(w) if w.grad is None else w.grad  # an expert that nothing visits
        for n, w in leaves.items()
        if w.requires_grad and ".indexer." not in n
    }
    assert_gradients(hf_view(expected), grads)
    assert result.clamped > 0.05
    for layer, index in chosen.items():
        choices = result.selected[layer]
        T = index.shape[1]
        ours = torch.full_like(index, -1)
        for (row, t), picks in choices.items():
            ours[row, t, : len(picks)] = torch.tensor(picks)
        edges = same_where_it_matters(ours, index, scores[layer], 4, topk)
        assert (edges > 0) == (topk < T // 4)


def test_oracle_names_are_all_of_a_checkpoint() -> None:
    """The oracle reads every weight: each one trained gets a gradient."""
    config = tiny_config(num_nextn_predict_layers=1)
    case = Case("names", config, rows=((40,),))
    leaves, batch = as_leaves(make_weights(case)), make_batch(case)
    targets, tokens = counts(case, batch)
    result = run_oracle(
        leaves, config, batch.input_ids_BT, None, batch.labels_BTK,
        OracleObjective(targets, tokens, 1.0, 1.0, 1.0),
    )  # fmt: skip
    assert result.total is not None
    result.total.backward()
    silent = [n for n, w in leaves.items() if w.requires_grad and w.grad is None]
    assert all(".experts." in n for n in silent), silent


def test_names_match_transformers() -> None:
    """``to_transformers`` and ``load_transformers`` fit the real module, both ways, bit for bit."""
    config = tiny_config()
    weights = make_weights(Case("names", config, seed=5))
    ours = build_ours(Case("names", config, seed=5), weights)
    theirs = build_hf(config, weights).state_dict()
    exported = to_transformers(ours)
    assert exported.keys() == theirs.keys()
    assert all(torch.equal(exported[n].to(theirs[n].dtype), theirs[n]) for n in theirs)
    again = DeepSeekV4(config)
    load_transformers(again, theirs)
    official = to_official(again)
    assert official.keys() == weights.keys()
    assert all(torch.equal(official[n].to(weights[n].dtype), weights[n]) for n in weights)


@pytest.mark.parametrize("kind", ["swa", "csa", "hca"])
def test_single_kind_matches_transformers(kind: str) -> None:
    """A model of one kind alone, so that no kind hides behind another."""
    ratio = {"swa": 0, "csa": 4, "hca": 8}[kind]
    config: ModelConfig = tiny_config(
        num_hidden_layers=2, layer_kinds=[LayerKind(kind)] * 2, compress_ratios=[ratio] * 2
    )
    case = Case(kind, config, rows=((37,),), seed=4, weights=LM_ONLY)
    logits, grads, _, _ = hf_run(case)
    ours = run_ours(case)
    assert float((ours.logits_BTV - logits).abs().max()) <= LOGITS
    assert_gradients(hf_view(ours.grads), grads)


def test_loss_is_the_mean_over_targets() -> None:
    """Our reported loss equals transformers' mean cross-entropy on the same labels."""
    case = Case("loss", tiny_config(), rows=((43,),), weights=LM_ONLY)
    logits, _, _, _ = hf_run(case)
    model, batch = build_ours(case, make_weights(case)), make_batch(case)
    targets, tokens = counts(case, batch)
    output = model(
        batch.input_ids_BT, batch.document_ids_BT, batch.labels_BTK, Objective(targets, tokens)
    )
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.input_ids_BT[:, 1:].flatten())
    assert abs(float(output.losses["loss"]) - float(want)) < 1e-5
    output.total.backward()
    assert gradients(model)


@pytest.mark.parametrize("name", ["v4_flash", "v4_tiny"])
def test_exported_positions_are_ours_up_to_a_million(name: str) -> None:
    """The config that an export writes gives transformers our angles, far beyond 64K tokens.

    transformers holds frequencies and angles in fp32: a frequency is off by a few roundings, an
    angle by as many of its size.
    """
    config = compose_run([f"model={name}"]).model
    theirs = DeepseekV4RotaryEmbedding(DeepseekV4Config(**transformers_config(config)))
    assert theirs.max_seq_len_cached == config.max_position_embeddings
    positions = torch.tensor([[0, 1, 65_535, 65_536, 70_001, 262_144, 1_048_575]])
    for label, compressed in (("main", False), ("compress", True)):
        ours = rope_frequencies(config, compressed)
        cos, sin = theirs(torch.zeros(1), positions, layer_type=label)
        angles = positions[..., None] * ours
        for got, want in zip((cos, sin), rope_tables(positions, ours), strict=True):
            assert bool(((got - want).abs() <= 1e-6 + angles * 2**-21).all()), label
