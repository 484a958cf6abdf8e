"""One case (config, weights, packed batch, objective), run by ours and by the oracle, compared.

The checks raise AssertionError. The tests call them on the real model, ``test_mutants.py`` calls
the same ones on a model with a planted bug and wants them to fail.
"""

# Legend: B rows, T tokens, K prediction depths, N chosen
from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from data.batch import IGNORE, Batch
from model.config import IndexerPhase, Kernels, ModelConfig
from model.loss import Objective
from model.state_dict import load_official
from model.transformer import DeepSeekV4
from tests.parity.oracle import OracleObjective, OracleResult, documents, run_oracle
from tests.parity.weights import Weights, as_leaves, official_view, random_weights

PAD = -1


@dataclass(frozen=True)
class Case:
    """Everything that fixes a comparison.

    Attributes:
        name: shown in failures.
        config: the model.
        rows: lengths of the documents of each row; negative: that many tokens of padding.
        cut: the last document of each row goes on beyond the row, so its last labels are known.
        seed: of weights and tokens.
        phase: of the indexer.
        weights: (mtp, indexer, balance); far above the defaults, so that each part shows.
        share: this batch is one part in ``share`` of the global batch.
    """

    name: str
    config: ModelConfig
    rows: tuple[tuple[int, ...], ...] = ((43,), (43,))
    cut: bool = False
    seed: int = 0
    phase: str = "sparse"
    weights: tuple[float, float, float] = (0.3, 0.5, 0.2)
    share: int = 1

    def __hash__(self) -> int:
        return hash((self.name, self.seed, self.phase))


@dataclass
class Ours:
    """What our model gave, in the oracle's terms (see :class:`OracleResult`).

    Logits are there after :func:`run_ours` with ``logits``, the rest after one with ``train``.
    """

    logits_BTV: Tensor = field(default_factory=lambda: torch.empty(0))
    mtp_logits: list[Tensor] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)
    total: Tensor = field(default_factory=lambda: torch.empty(0))
    grads: Weights = field(default_factory=dict)
    expert_load: dict[str, Tensor] = field(default_factory=dict)
    record: dict[str, Tensor] = field(default_factory=dict)


def make_batch(case: Case) -> Batch:
    """Random tokens, packed as the case says."""
    generator = torch.Generator().manual_seed(1000 + case.seed)
    depths = 1 + case.config.num_nextn_predict_layers
    T = sum(abs(n) for n in case.rows[0])
    ids = torch.zeros(len(case.rows), T, dtype=torch.int64)
    docs = torch.full_like(ids, PAD)
    labels = torch.full((*ids.shape, depths), IGNORE)
    for row, lengths in enumerate(case.rows):
        start = 0
        for number, length in enumerate(lengths):
            stop = start + abs(length)
            if length > 0:
                beyond = depths if case.cut and stop == T else 0
                text = torch.randint(
                    1, case.config.vocab_size, (length + beyond,), generator=generator
                )
                ids[row, start:stop] = text[:length]
                docs[row, start:stop] = number
                for k in range(depths):
                    ahead = text[1 + k :][:length]
                    labels[row, start : start + len(ahead), k] = ahead
            start = stop
        assert start == T, "rows of a batch are equally long"
    return Batch(ids, docs, labels)


def counts(case: Case, batch: Batch) -> tuple[tuple[float, ...], float]:
    """(targets_K, tokens) of the global batch of which this one is a share."""
    targets = (batch.labels_BTK != IGNORE).sum(dim=(0, 1)).tolist()
    tokens = int((batch.document_ids_BT != PAD).sum())
    return tuple(float(n * case.share) for n in targets), float(tokens * case.share)


def build_ours(case: Case, weights: Weights) -> DeepSeekV4:
    """Our model with these official weights."""
    model = DeepSeekV4(case.config)
    load_official(model, {k: v for k, v in weights.items() if not k.endswith("_gamma")})
    for name, parameter in model.named_parameters():
        if name.endswith(".gamma"):
            official = next(iter(official_view({name: parameter})))
            parameter.data.copy_(weights[official])
    return model


def make_weights(case: Case) -> Weights:
    """Random official weights; with ``hc_gamma`` a gamma for every fn."""
    weights = random_weights(case.config, case.seed)
    if case.config.hc_gamma:
        generator = torch.Generator().manual_seed(77 + case.seed)
        for name in [n for n in weights if n.endswith("_fn")]:
            size = weights[name].shape[1]
            weights[name[:-2] + "gamma"] = 1 + 0.3 * torch.randn(size, generator=generator)
    return weights


def run_ours(case: Case, train: bool = True, logits: bool = True) -> Ours:
    """Forward and backward of our model (``train``), and its logits (``logits``)."""
    model, batch, ours = build_ours(case, make_weights(case)), make_batch(case), Ours()
    if train:
        targets, tokens = counts(case, batch)
        phase = IndexerPhase(case.phase)
        objective = Objective(targets, tokens, *case.weights, phase, record=ours.record)
        output = model(batch.input_ids_BT, batch.document_ids_BT, batch.labels_BTK, objective)
        output.total.backward()
        ours.losses, ours.expert_load = output.losses, output.expert_load
        ours.total, ours.grads = output.total.detach(), gradients(model)
    if logits:
        with torch.no_grad():
            ours.logits_BTV = model.logits(batch.input_ids_BT, batch.document_ids_BT)
            ours.mtp_logits = model.mtp_logits(batch.input_ids_BT, batch.document_ids_BT)
    return ours


def gradients(model: nn.Module) -> Weights:
    """Gradients by official name; a parameter without one is left out."""
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return official_view(grads)


def oracle(case: Case) -> tuple[OracleResult, Weights]:
    """The oracle's result and gradients; logits of the sparse phase, as ``model.logits`` gives."""
    return _oracle(replace(case, config=replace(case.config, kernels=Kernels.reference)))


@functools.cache
def _oracle(case: Case) -> tuple[OracleResult, Weights]:
    weights = as_leaves(make_weights(case))
    batch = make_batch(case)
    targets, tokens = counts(case, batch)
    objective = OracleObjective(targets, tokens, *case.weights, case.phase)
    args = (weights, case.config, batch.input_ids_BT, batch.document_ids_BT)
    result = run_oracle(*args, batch.labels_BTK, objective)
    assert result.total is not None
    result.total.backward()
    grads = {n: w.grad for n, w in weights.items() if w.grad is not None}
    if case.phase != "sparse":
        with torch.no_grad():
            sparse = run_oracle(*args, batch.labels_BTK, replace(objective, indexer_phase="sparse"))
        result.logits_BTV, result.mtp_logits = sparse.logits_BTV, sparse.mtp_logits
    margin = min(result.route_margin, result.index_margin)
    if margin < 2e-5:  # no AssertionError: a mutant must not be "caught" by a bad seed
        raise ValueError(f"case {case.name}: a choice hangs on {margin:.1e}, take another seed")
    return result, grads


# ---- checks -------------------------------------------------------------------------------------
def relative(ours: Tensor, expected: Tensor) -> float:
    """Frobenius distance relative to the expected norm (absolute where that is 0)."""
    expected = expected.double()
    norm = float(expected.norm())
    return float((ours.double() - expected).norm()) / (norm if norm > 0 else 1.0)


def check_logits(case: Case, ours: Ours, bound: float = 1e-5) -> None:
    """Main and MTP logits of real positions, max abs."""
    expected, _ = oracle(case)
    batch = make_batch(case)
    real = batch.document_ids_BT != PAD
    worst = float((ours.logits_BTV.double() - expected.logits_BTV)[real].abs().max())
    assert worst <= bound, f"{case.name}: logits differ by {worst:.2e} > {bound}"
    assert len(ours.mtp_logits) == len(expected.mtp_logits)
    T = real.shape[1]
    for k, (got, want) in enumerate(zip(ours.mtp_logits, expected.mtp_logits, strict=True)):
        # mtp_logits knows no token beyond the row, the oracle does from the labels
        known = (batch.labels_BTK[..., k + 1] != IGNORE) & (torch.arange(T) + 1 + k < T)
        worst = float((got.double() - want)[known].abs().max())
        assert worst <= bound, (
            f"{case.name}: logits of MTP depth {k} differ by {worst:.2e} > {bound}"
        )


def check_losses(case: Case, ours: Ours, bound: float = 2e-6) -> None:
    """Every loss and the total, relative to the value (or to 1 where it is smaller)."""
    expected, _ = oracle(case)
    assert expected.total is not None
    off = {
        "loss_mtp": case.weights[0] == 0,
        "loss_indexer": case.weights[1] == 0,
        "loss_balance": case.weights[2] == 0,
    }
    for name, want in [*expected.losses.items(), ("total", expected.total)]:
        got, want_value = float(ours.losses.get(name, ours.total)), float(want.detach())
        if off.get(name):  # a loss that is switched off is not computed
            want_value = 0.0
        error = abs(got - want_value) / max(abs(want_value), 0.1)
        assert error <= bound, f"{case.name}: {name} is {got:.8f}, not {want_value:.8f}"


def check_gradients(case: Case, ours: Ours, bound: float = 1e-4) -> None:
    """Gradient of every weight, relative Frobenius; the same weights have one."""
    _, expected = oracle(case)
    got = {n: g for n, g in ours.grads.items() if g.abs().max() > 0}
    want = {n: g for n, g in expected.items() if g.abs().max() > 0}
    assert got.keys() == want.keys(), f"{case.name}: gradients differ in {got.keys() ^ want.keys()}"
    errors = {n: relative(got[n], want[n]) for n in want}
    name = max(errors, key=lambda n: errors[n])
    assert errors[name] <= bound, f"{case.name}: gradient of {name} is off by {errors[name]:.2e}"


def left_out(case: Case, gate: str) -> bool:
    """Whether a gate belongs to an MTP block whose loss has no weight, which does not run."""
    return gate.startswith("mtp.") and case.weights[0] == 0


def check_load(case: Case, ours: Ours) -> None:
    """Tokens per expert of every gate."""
    expected, _ = oracle(case)
    loads = {gate: n for gate, n in expected.expert_load.items() if not left_out(case, gate)}
    assert ours.expert_load.keys() == loads.keys()
    for gate, load in loads.items():
        assert torch.equal(ours.expert_load[gate].double(), load), f"{case.name}: load of {gate}"


def check_experts(case: Case, ours: Ours) -> None:
    """The experts of every token at every gate."""
    expected, _ = oracle(case)
    T = make_batch(case).input_ids_BT.shape[1]
    for gate, choices in expected.experts.items():
        if left_out(case, gate):
            assert gate not in ours.record
            continue
        index_NK = ours.record[gate]
        for (row, t), want in choices.items():
            got = tuple(sorted(index_NK[row * T + t].tolist()))
            assert got == want, f"{case.name}: {gate} sends token {row, t} to {got}, not {want}"


def check_entries(case: Case, ours: Ours) -> None:
    """The entries that each CSA query chose; in the full phases nothing is chosen."""
    expected, _ = oracle(case)
    batch = make_batch(case)
    if case.phase != "sparse":
        assert not any(name.endswith("attn") for name in ours.record)
        return
    for layer, choices in expected.selected.items():
        assert layer in ours.record, f"{case.name}: {layer} chose nothing"
        got_all = local_entries(ours.record[layer], first_entries(case, layer, batch))
        for (row, t), want in choices.items():
            got = got_all[row][t]
            assert got == want, f"{case.name}: {layer} query {row, t} takes {got}, not {want}"


def first_entries(case: Case, layer: str, batch: Batch) -> Tensor:
    """Number in its row of each token's document's first entry [B, T]."""
    ratio = case.config.ratio(int(layer.split(".")[1]))
    first = torch.zeros_like(batch.input_ids_BT)
    for row in range(first.shape[0]):
        before = 0
        for start, stop in documents(batch.document_ids_BT[row]):
            first[row, start:stop] = before
            before += (stop - start) // ratio
    return first


def local_entries(index_BTN: Tensor, first_BT: Tensor) -> list[list[tuple[int, ...]]]:
    """Chosen entries of every query, numbered inside its document, ascending."""
    return [
        [
            tuple(sorted(i - int(first) for i in picks if i >= 0))
            for picks, first in zip(row.tolist(), firsts, strict=True)
        ]
        for row, firsts in zip(index_BTN, first_BT, strict=True)
    ]


def check_all(case: Case, ours: Ours | None = None) -> None:
    """Everything against the oracle."""
    ours = run_ours(case) if ours is None else ours
    check_experts(case, ours)
    check_entries(case, ours)
    check_load(case, ours)
    check_logits(case, ours)
    check_losses(case, ours)
    check_gradients(case, ours)
