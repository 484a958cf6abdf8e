"""Losses and monitors against float64 formulas written out here, and the laws that they obey.

Every normaliser is a count of the whole global batch, so shares add up over microbatches, and
neither padding nor the cut into microbatches changes a loss, a load or a gradient. The indexer
learns from its own loss only, the model never from that one.
"""

# Legend: B rows, T tokens, H heads, K head dim, E entries, J indexer heads, L indexer head dim
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data.batch import IGNORE
from model.config import IndexerPhase, Kernels
from model.kernels.attention import EntrySet
from model.kernels.select import select
from model.loss import ModelOutput, Objective
from model.transformer import DeepSeekV4
from tests.parity.configs import tiny_config
from tests.parity.harness import (
    Case,
    build_ours,
    counts,
    gradients,
    make_batch,
    make_weights,
    oracle,
    relative,
)
from tests.parity.oracle import sinkhorn
from tests.parity.properties import check_bias_evens_the_load, check_hash_table
from tests.parity.weights import Weights

BOTH = [Kernels.reference, Kernels.fast]
ROWS = ((9, 5, -2), (16,), (-4, 12), (3, 13))


def _case(kernels: Kernels = Kernels.reference, **settings: object) -> Case:
    config = tiny_config(num_nextn_predict_layers=2, kernels=kernels)
    return replace(Case("losses", config, ROWS, cut=True), **settings)  # type: ignore[arg-type]


def _step(model: DeepSeekV4, case: Case, rows: slice, objective: Objective) -> ModelOutput:
    batch = make_batch(case)
    output = model(
        batch.input_ids_BT[rows], batch.document_ids_BT[rows], batch.labels_BTK[rows], objective
    )
    output.total.backward()
    return output


# ---- laws ---------------------------------------------------------------------------------------
@pytest.mark.core
@pytest.mark.parametrize("kernels", BOTH)
def test_shares_add_up_over_microbatches(kernels: Kernels) -> None:
    case = _case(kernels)
    targets, tokens = counts(case, make_batch(case))
    objective = Objective(targets, tokens, 0.3, 0.5, 0.2, monitors=True)
    whole_model, parts_model = (build_ours(case, make_weights(case)) for _ in range(2))
    whole = _step(whole_model, case, slice(0, 4), objective)
    parts = [_step(parts_model, case, rows, objective) for rows in (slice(0, 1), slice(1, 4))]
    for name, value in whole.losses.items():
        assert abs(float(sum(p.losses[name] for p in parts)) - float(value)) < 2e-6, name
    assert abs(float(sum(p.total.detach() for p in parts) - whole.total.detach())) < 2e-6
    for gate, load in whole.expert_load.items():
        assert torch.equal(parts[0].expert_load[gate] + parts[1].expert_load[gate], load), gate
    for name in ("indexer_leaves_out.sum", "indexer_leaves_out.count", "clamped.sum"):
        assert float(sum(p.monitors[name] for p in parts)) == float(whole.monitors[name]), name
    assert_close(gradients(parts_model), gradients(whole_model))


def assert_close(got: Weights, want: Weights, bound: float = 1e-4) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert relative(got[name], want[name]) <= bound, name


@pytest.mark.parametrize("kernels", BOTH)
def test_padding_changes_nothing(kernels: Kernels) -> None:
    """The same documents in longer rows, and beside a row of nothing but padding."""
    tight = _case(kernels)
    loose = replace(tight, rows=tuple((*row, -7) for row in ROWS), cut=False, name="loose")
    tight = replace(tight, cut=False)
    results = []
    for case in (tight, loose):
        batch = make_batch(case)
        targets, tokens = counts(case, batch)
        model = build_ours(case, make_weights(case))
        output = _step(model, case, slice(0, 4), Objective(targets, tokens, 0.3, 0.5, 0.2))
        results.append((output, gradients(model)))
    (one, grads_one), (two, grads_two) = results
    for name in one.losses:
        assert abs(float(one.losses[name] - two.losses[name])) < 2e-6, name
    for gate in one.expert_load:
        assert torch.equal(one.expert_load[gate], two.expert_load[gate]), gate
    assert_close(grads_two, grads_one)


@pytest.mark.parametrize("kernels", BOTH)
def test_replayed_choices_give_the_same_bits(kernels: Kernels) -> None:
    """Recompute and the layout tests rest on this; other choices do change the outcome."""
    case = _case(kernels)
    targets, tokens = counts(case, make_batch(case))
    record: dict[str, Tensor] = {}
    plain = Objective(targets, tokens, 0.3, 0.5, 0.2)

    def run(objective: Objective) -> tuple[ModelOutput, Weights]:
        model = build_ours(case, make_weights(case))
        return _step(model, case, slice(0, 4), objective), gradients(model)

    one, grads_one = run(replace(plain, record=record))
    again, grads_again = run(replace(plain, replay=record))
    others = {n: i.roll(1, 0) for n, i in record.items() if n.endswith("gate")}
    moved, _ = run(replace(plain, replay=others))
    assert set(record) == set(one.expert_load) | {"layers.2.attn", "layers.4.attn"}
    assert torch.equal(one.total, again.total)
    assert all(torch.equal(grads_one[n], grads_again[n]) for n in grads_one)
    assert abs(float((moved.total - one.total).detach())) > 1e-3


def test_weights_scale_their_losses() -> None:
    case = _case()
    targets, tokens = counts(case, make_batch(case))

    def total(mtp: float, indexer: float, balance: float) -> tuple[float, dict[str, Tensor]]:
        model = build_ours(case, make_weights(case))
        output = _step(model, case, slice(0, 4), Objective(targets, tokens, mtp, indexer, balance))
        return float(output.total.detach()), output.losses

    value, losses = total(0.7, 0.9, 0.4)
    num_csa, num_learned = 2, 4 + 2  # layers 2 and 4; layers 1 to 4 and two MTP blocks
    want = (
        losses["loss"]
        + 0.7 * losses["loss_mtp"]
        + 0.9 * num_csa * losses["loss_indexer"]
        + 0.4 * num_learned * losses["loss_balance"]
    )
    assert value == pytest.approx(float(want), rel=1e-6)
    bare, _ = total(0.0, 0.0, 0.0)
    assert bare == pytest.approx(float(losses["loss"]), rel=1e-6)


@pytest.mark.parametrize("phase", ["full", "warmup", "sparse"])
@pytest.mark.parametrize("kernels", BOTH)
def test_indexer_learns_from_its_own_loss_only(kernels: Kernels, phase: str) -> None:
    case = _case(kernels)
    targets, tokens = counts(case, make_batch(case))
    batch = make_batch(case)
    no_labels = torch.full_like(batch.labels_BTK, IGNORE)
    for labels, weight, learns in ((no_labels, 1.0, "indexer"), (batch.labels_BTK, 0.0, "model")):
        model = build_ours(case, make_weights(case))
        objective = Objective(targets, tokens, 0.3, weight, 0.0, IndexerPhase(phase))
        model(batch.input_ids_BT, batch.document_ids_BT, labels, objective).total.backward()
        moved = {n for n, g in gradients(model).items() if g.abs().max() > 0}
        inside = {n for n in moved if ".indexer." in n}
        if learns == "indexer":
            assert moved == inside
            assert len(inside) == 2 * 6, "two CSA layers, six tensors each"
        else:
            assert moved
            assert not inside


# ---- the indexer's loss against a dense float64 teacher -----------------------------------------
def _teacher_and_kl(
    q_THK: Tensor, keys_TNK: list[Tensor], entries_EK: Tensor, sets: list[list[int]],
    sink_H: Tensor, index_scores: list[Tensor], per_head: bool,
) -> Tensor:  # fmt: skip
    """Sum of KL over queries; ``per_head``: the wrong teacher, renormalised head by head."""
    total = torch.zeros((), dtype=torch.float64)
    for t, chosen in enumerate(sets):
        if not chosen:
            continue
        keys = torch.cat([keys_TNK[t], entries_EK[chosen]])
        z = q_THK[t] @ keys.T * q_THK.shape[-1] ** -0.5
        p = torch.cat([z, sink_H[:, None]], dim=1).softmax(dim=1)[:, len(keys_TNK[t]) : -1]
        if per_head:
            p = p / p.sum(dim=1, keepdim=True)
        teacher = p.sum(dim=0) / p.sum()
        student = index_scores[t][chosen].log_softmax(dim=0)
        total = total + (teacher * (teacher.log() - student)).sum()
    return total


@pytest.mark.parametrize("topk", [None, 2])
@pytest.mark.parametrize("kernels", BOTH)
def test_indexer_loss_matches_dense_teacher(kernels: Kernels, topk: int | None) -> None:
    """Full denominator: window, sink and entries. The renormalised teacher is far from it."""
    T, H, K, J, L, ratio, window = 26, 4, 16, 16, 16, 4, 8
    E = T // ratio
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, kv, entry, sink = 2 * draw(1, T, H, K), draw(1, T, K), draw(1, E, K), draw(H)
    iq, ik, iw = draw(1, T, J, L), draw(1, E, L), draw(1, T, J)
    start = torch.zeros(1, T, dtype=torch.int64)
    stop = ((torch.arange(T) + 1) // ratio)[None]
    entries = EntrySet(entry, start, stop)
    if topk is not None:
        index = select("index_topk", kernels)((iq, ik, iw), start, stop, topk)
        entries = replace(entries, index_BTN=index)
    attention = select("attention", kernels)(q, kv, sink, start, window, entries)
    leaves = [x.clone().requires_grad_() for x in (iq, ik, iw)]
    loss_op = select("indexer_loss", kernels)
    got = loss_op(tuple(leaves), q, attention.lse_BTH, entries, attention.mass_BTN)
    got.backward()

    exact = [x.double().requires_grad_() for x in (iq, ik, iw)]
    dots = torch.einsum("tjl,el->tej", exact[0][0], exact[1][0]).relu()
    scores = torch.einsum("tej,tj->te", dots, exact[2][0])
    sets = []
    for t in range(T):
        visible = int(stop[0, t])
        best = scores[t, :visible].argsort(descending=True)
        sets.append(sorted(best[: topk or visible].tolist()))
    windows = [kv[0, max(0, t - window + 1) : t + 1].double() for t in range(T)]
    args = (q[0].double(), windows, entry[0].double(), sets, sink.double(), list(scores))
    want = _teacher_and_kl(*args, per_head=False)
    want.backward()
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-5)
    for mine, theirs in zip(leaves, exact, strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert relative(mine.grad, theirs.grad) < 1e-4
    wrong = float(_teacher_and_kl(*args, per_head=True).detach())
    assert abs(wrong - float(want.detach())) > 1e-2 * abs(float(want.detach()))


# ---- monitors -----------------------------------------------------------------------------------
def test_monitors_match_their_definitions() -> None:
    """Clamped share and the share of queries whose top-k leaves entries out, in one document."""
    case = Case("monitors", tiny_config(index_topk=2, n_shared_experts=0), ((31,),))
    result, _ = oracle(case)
    targets, tokens = counts(case, make_batch(case))
    model = build_ours(case, make_weights(case))
    output = _step(model, case, slice(0, 1), Objective(targets, tokens, monitors=True))
    monitors = {k: float(v) for k, v in output.monitors.items()}
    share = monitors["clamped.sum"] / monitors["clamped.count"]
    assert share == pytest.approx(result.clamped, abs=1e-6)
    visible = [(t + 1) // 4 for t in range(31)]
    layers = 2
    assert monitors["indexer_leaves_out.sum"] == layers * sum(v > 2 for v in visible)
    assert monitors["indexer_leaves_out.count"] == layers * sum(v > 0 for v in visible)
    assert 0 < monitors["indexer_captured_mass.sum"] < monitors["indexer_captured_mass.count"]
    assert 0 < monitors["indexer_recall.sum"] < monitors["indexer_recall.count"]


def test_load_counts_every_token_topk_times() -> None:
    case = _case()
    targets, tokens = counts(case, make_batch(case))
    model = build_ours(case, make_weights(case))
    output = _step(model, case, slice(0, 4), Objective(targets, tokens))
    assert len(output.expert_load) == 5 + 2
    for gate, load in output.expert_load.items():
        assert float(load.sum()) == tokens * case.config.num_experts_per_tok, gate


# ---- balance bias, hash table -------------------------------------------------------------------
def test_bias_lifts_idle_experts_until_the_load_is_even() -> None:
    check_bias_evens_the_load(tiny_config())


def test_initialisation_fills_the_hash_table() -> None:
    check_hash_table(tiny_config(num_hash_layers=2))


def test_oracles_agree_on_sinkhorn() -> None:
    """What the oracle calls Sinkhorn is doubly stochastic: its columns sum to 1 to 1e-5."""
    comb = sinkhorn(torch.randn(5, 4, 4, dtype=torch.float64), 20, 1e-6)
    assert torch.allclose(comb.sum(dim=-2), torch.ones(5, 4).double(), atol=1e-5)
