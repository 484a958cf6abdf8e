"""Two whole steps of a small model with attention and the indexer in Triton are the reference's.

All else is the reference in both. fp32 sums in other orders: 1e-5 of a loss, of what the steps
changed in all weights, and (a tensor that hardly moves has lost digits) 1e-3 of each change.
"""

import torch

from model.config import IndexerPhase, Kernels
from model.kernels import select
from model.kernels.triton import attention, indexer
from model.loss import Objective
from tests.helpers import random_rows, relative, small_model

OURS = {
    "attention": attention.attention,
    "index_topk": indexer.index_topk,
    "indexer_loss": indexer.indexer_loss,
}
RATE = 0.05


def two_steps(phase):
    """Totals and KLs of two steps of plain descent on packed rows; what they changed, by name."""
    model = small_model(kernels=Kernels.fast)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = random_rows(1, 22, 128)
    objective = Objective(
        rows.counts.targets_K, rows.counts.tokens, indexer_weight=1.0, indexer_phase=phase
    )
    values = []
    for _ in range(2):
        batch = rows.whole
        out = model(batch.input_ids_BT, batch.document_ids_BT, batch.labels_BTK, objective)
        model.zero_grad()
        out.total.backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= RATE * p.grad
        values += [out.total.detach(), out.losses["loss_indexer"]]
    return values, {name: p.detach() - before[name] for name, p in model.named_parameters()}


def test_two_steps_are_those_of_the_reference(monkeypatch):
    for name, (plain, *_) in list(select._OPS.items()):
        monkeypatch.setitem(select._OPS, name, (plain, plain))
    phases = (IndexerPhase.sparse, IndexerPhase.full)
    expected = {phase: two_steps(phase) for phase in phases}
    for name, ours in OURS.items():
        monkeypatch.setitem(select._OPS, name, (None, ours))
    for phase in phases:
        (want, moved), (got, ours) = expected[phase], two_steps(phase)
        assert want[1] > 0
        for a, b in zip(got, want, strict=True):
            assert abs(a - b) <= 1e-5 * abs(b)
        flat = [torch.cat([x.flatten() for x in changes.values()]) for changes in (ours, moved)]
        assert relative(*flat) < 1e-5
        for name, change in moved.items():
            slack = 1e-6 * flat[1].norm()
            assert (ours[name] - change).norm() < 1e-3 * change.norm() + slack, name
