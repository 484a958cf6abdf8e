"""Causality, isolation and routing rules as functions of a config.

The tests call them on the real model, ``test_mutants.py`` on models with a planted bug.
"""

# Legend: B rows, T tokens, K prediction depths, D hidden, N chosen
from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.batch import IGNORE, Batch
from model.config import IndexerPhase, ModelConfig, Router
from model.init import init_weights
from model.loss import Objective
from model.moe import balance
from model.moe.router import Gate
from model.transformer import DeepSeekV4
from tests.parity.harness import PAD, Case, build_ours, local_entries, make_batch, make_weights

# fp32 rounding: a row's bits may depend on how many rows its grouped matmul has.
CLOSE = 1e-6


def differs(got: Tensor, want: Tensor, bitwise: bool) -> str | None:
    """None where equal (bit for bit, or within ``CLOSE`` of values of order 1), else how far."""
    if bitwise and torch.equal(got, want):
        return None
    far = float((got - want).abs().max()) if got.numel() else 0.0
    if not bitwise and far <= CLOSE * max(1.0, float(want.abs().max()) if want.numel() else 1.0):
        return None
    return f"differs by {far:.1e}"


@contextmanager
def embeddings(model: DeepSeekV4) -> Any:
    """Collects the output of each call of the embedding, with gradients; the trunk's first."""
    taken: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> Tensor:
        output = output.detach().requires_grad_()
        taken.append(output)
        return output

    handle = model.embed.register_forward_hook(keep)
    try:
        yield taken
    finally:
        handle.remove()


# ---- causality ----------------------------------------------------------------------------------
def check_causality(
    config: ModelConfig, bitwise: bool, places: tuple[int, ...], rows: tuple[int, ...] = (45,)
) -> None:
    """Changing token t changes no output before t, and no gradient runs from before t to t.

    MTP depth k at position i reads tokens up to i + 1 + k. What is changed does show from t on, and
    beyond the window too, or nothing would have been proven.
    """
    case = Case("causality", config, (rows,))
    model, batch = build_ours(case, make_weights(case)), make_batch(case)
    ids, docs = batch.input_ids_BT, batch.document_ids_BT
    with torch.no_grad():
        base, base_ahead = model.logits(ids, docs), model.mtp_logits(ids, docs)
    for t in places:
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 7) % config.vocab_size
        with torch.no_grad():
            logits, ahead = model.logits(changed, docs), model.mtp_logits(changed, docs)
        for k, (got, want) in enumerate([(logits, base), *zip(ahead, base_ahead, strict=True)]):
            safe = max(0, t - k)  # k = 0 is the main head
            how = differs(got[:, :safe], want[:, :safe], bitwise)
            assert how is None, f"token {t} changes an output before it (depth {k}): {how}"
            assert not torch.equal(got[:, t], want[:, t]), f"token {t} does not change depth {k}"
    for t in places[::3]:
        with embeddings(model) as taken:
            model.logits(ids, docs)[:, :t].pow(2).sum().backward()
        grad = taken[0].grad
        assert grad is not None
        assert grad[:, t:].abs().max() == 0, f"outputs before {t} have a gradient to later tokens"


# ---- isolation ----------------------------------------------------------------------------------
@dataclass
class _Seen:
    """Of one run, the part that belongs to one document."""

    logits: Tensor
    ahead: list[Tensor]
    experts: dict[str, Tensor]
    entries: dict[str, list[tuple[int, ...]]]
    grad: Tensor


def _observe(
    model: DeepSeekV4, batch: Batch, config: ModelConfig, part: slice, phase: str
) -> _Seen:
    """Run row 0 of a batch; what the tokens ``part``, one document, get from it."""
    record: dict[str, Tensor] = {}
    objective = Objective(
        tuple(100.0 for _ in range(batch.labels_BTK.shape[2])), 100.0, 0.3, 1.0, 1.0,
        IndexerPhase(phase), record=record,
    )  # fmt: skip
    ids, docs = batch.input_ids_BT, batch.document_ids_BT
    with embeddings(model) as taken:
        model(ids, docs, batch.labels_BTK, objective).total.backward()
    with torch.no_grad():
        logits, ahead = model.logits(ids, docs), model.mtp_logits(ids, docs)
    experts = {n: r[part] for n, r in record.items() if n.endswith("gate")}
    entries = {}
    for name, index in record.items():
        if name.endswith("attn"):
            ratio = config.ratio(int(name.split(".")[1]))
            first = torch.full(ids.shape, _entries_before(batch, part.start, ratio))
            entries[name] = local_entries(index, first)[0][part]
    grad = taken[0].grad
    assert grad is not None
    # the last positions of a document look ahead into its neighbour there: they mean nothing
    inner = [h[0, part][: -1 - k] for k, h in enumerate(ahead)]
    return _Seen(logits[0, part], inner, experts, entries, grad[0, part])


def _entries_before(batch: Batch, start: int, ratio: int) -> int:
    docs = batch.document_ids_BT[0, :start].tolist()
    return sum(docs.count(d) // ratio for d in set(docs) - {PAD})


def check_isolation(config: ModelConfig, bitwise: bool, phase: str = "sparse") -> None:
    """A, B and C share a row. Changing A and C leaves all of B alone: outputs, choices, gradients.

    The gradient of the whole objective (balance and indexer losses included) with respect to B's
    embeddings does not change either, so no term of A or C reads B. The documents' lengths are no
    multiples of any ratio, and padding stands between B and C.
    """
    case = Case("isolation", config, ((14, 23, -2, 9),))
    model, batch = build_ours(case, make_weights(case)), make_batch(case)
    part = slice(14, 37)
    other = batch.input_ids_BT.clone()
    other[0, :14] = (other[0, :14] * 5 + 11) % config.vocab_size
    other[0, 37:] = (other[0, 37:] * 3 + 2) % config.vocab_size  # padding too
    labels = batch.labels_BTK.clone()
    outside = torch.ones(labels.shape[1], dtype=torch.bool)
    outside[part] = False
    moved = (labels * 3 + 1) % config.vocab_size
    labels[0, outside] = torch.where(labels[0, outside] == IGNORE, IGNORE, moved[0, outside])
    before = _observe(model, batch, config, part, phase)
    after = _observe(model, Batch(other, batch.document_ids_BT, labels), config, part, phase)
    for gate in before.experts:
        assert torch.equal(before.experts[gate], after.experts[gate]), f"{gate} of B moved"
    assert before.entries == after.entries, "B's chosen entries moved"
    pairs = [("logits", before.logits, after.logits), ("gradients", before.grad, after.grad)]
    pairs += [
        (f"MTP {k}", a, b) for k, (a, b) in enumerate(zip(before.ahead, after.ahead, strict=True))
    ]
    for what, one, two in pairs:
        how = differs(two, one, bitwise)
        assert how is None, f"changing A and C changes B's {what}: {how}"


def check_no_gradient_across(config: ModelConfig) -> None:
    """The gradient of B's loss with respect to A's embeddings is exactly 0, MTP included."""
    case = Case("gradient", config, ((14, 23, -3),))
    model, batch = build_ours(case, make_weights(case)), make_batch(case)
    labels = batch.labels_BTK.clone()
    labels[:, :14] = IGNORE
    targets = tuple(float(n) for n in (labels != IGNORE).sum(dim=(0, 1)))
    with embeddings(model) as taken:
        objective = Objective(targets, 40.0, 0.3, 0.0, 0.0)
        model(batch.input_ids_BT, batch.document_ids_BT, labels, objective).total.backward()
    for number, output in enumerate(taken):  # the trunk's, then one a MTP depth
        assert output.grad is not None
        grad = output.grad[0]
        assert grad[:14].abs().max() == 0, f"B's loss reaches A's embeddings (use {number})"
        assert grad[14:37].abs().max() > 0
        assert grad[37:].abs().max() == 0, "padding has a gradient"


# ---- routing rules ------------------------------------------------------------------------------
def check_bias_evens_the_load(config: ModelConfig) -> None:
    """The bias rule at work on skewed scores: the choice by bias alone evens the load out."""
    gate = Gate(config, Router.learned)
    generator = torch.Generator().manual_seed(0)
    gate.weight.data = 0.2 * torch.randn(gate.weight.shape, generator=generator)
    gate.bias.zero_()
    u = torch.randn(256, config.hidden_size, generator=generator) + 2.0 * gate.weight[0].detach()

    def load() -> Tensor:
        with torch.no_grad():
            index = gate(
                u, torch.zeros(256, dtype=torch.int64), torch.ones(256, dtype=torch.bool)
            ).index_NK
        return torch.bincount(index.flatten(), minlength=config.n_routed_experts).float()

    first = load()
    for _ in range(120):
        before, current = gate.bias.clone(), load()
        balance.update_bias(gate, current, 5e-3)
        step = 5e-3 * torch.sign(current.mean() - current)
        assert torch.allclose(gate.bias - before, step, atol=1e-6), "the step is not the rule's"
    assert float(load().std()) < 0.2 * float(first.std())


def check_hash_table(config: ModelConfig) -> None:
    """Initialisation fills the table: distinct experts a token, all used, nearly evenly."""
    model = DeepSeekV4(config)
    init_weights(model, seed=3)
    tables = {n: b for n, b in model.named_buffers() if n.endswith("tid2eid")}
    assert len(tables) == sum(
        config.router(n) is Router.hash for n in range(config.num_hidden_layers)
    )
    for name, table_VK in tables.items():
        assert all(len(set(row)) == len(row) for row in table_VK.tolist()), (
            f"{name}: twice the same"
        )
        load = torch.bincount(table_VK.flatten().long(), minlength=config.n_routed_experts)
        assert int(load.max()) - int(load.min()) <= 1, f"{name}: loads {load.tolist()}"
