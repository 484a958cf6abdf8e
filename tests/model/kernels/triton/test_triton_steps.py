"""Two whole steps of a small model with every op in Triton are those of the reference.

fp32 sums in other orders: 1e-5 of a loss, of what the steps changed in all weights, and (a tensor
that hardly moves has lost digits) 1e-3 of each change.
"""

import torch

from model.config import IndexerPhase, Kernels
from model.kernels.select import active_kernels
from model.kernels.triton.launch import counted
from model.loss import Objective
from tests.helpers import random_rows, relative, small_model

RATE = 0.05
ONE_LAYER = {"num_hidden_layers": 1, "layer_kinds": ["csa"], "compress_ratios": [4, 0]}


def descent(phase, steps, kernels, **shape):
    """Totals and KLs of some steps of plain descent; what they changed, by name.

    Documents of 13 and 4 tokens: 3 entries, of which the indexer leaves one out, and 1.
    """
    model = small_model(kernels=kernels, index_topk=2, hc_sinkhorn_iters=3, **shape)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = random_rows(1, 17, 128, seed=4)
    objective = Objective(
        rows.counts.targets_K, rows.counts.tokens, indexer_weight=1.0, indexer_phase=phase
    )
    values = []
    for _ in range(steps):
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


def test_two_steps_are_those_of_the_reference():
    """Of every kind of layer; where the indexer meets all entries, a step of its layer alone."""
    for phase, steps, shape in ((IndexerPhase.sparse, 2, {}), (IndexerPhase.full, 1, ONE_LAYER)):
        want, moved = descent(phase, steps, Kernels.reference, **shape)
        with counted() as launches:
            got, ours = descent(phase, steps, Kernels.triton, **shape)
        assert want[1] > 0
        assert len(launches) >= 25  # kernels
        for a, b in zip(got, want, strict=True):
            assert abs(a - b) <= 1e-5 * abs(b)
        flat = [torch.cat([x.flatten() for x in changes.values()]) for changes in (ours, moved)]
        assert relative(*flat) < 1e-5
        for name, change in moved.items():
            slack = 1e-6 * flat[1].norm()
            assert (ours[name] - change).norm() < 1e-3 * change.norm() + slack, name


def test_a_step_whose_pairs_are_added_atomically_is_that_of_the_reference(monkeypatch):
    monkeypatch.setattr("model.kernels.triton.attention.masks_choice", lambda *_: False)
    want, moved = descent(IndexerPhase.sparse, 1, Kernels.reference, **ONE_LAYER)
    with counted() as launches:
        got, ours = descent(
            IndexerPhase.sparse, 1, Kernels.triton, deterministic=False, **ONE_LAYER
        )
    pairs = {name for name in launches if "pairs" in name}
    assert pairs == {"attention_grad_pairs_atomic", "list_grad_pairs_atomic"}
    assert "segment_sum" not in launches
    for a, b in zip(got, want, strict=True):
        assert abs(a - b) <= 1e-5 * abs(b)
    flat = [torch.cat([x.flatten() for x in changes.values()]) for changes in (ours, moved)]
    assert relative(*flat) < 1e-5


def test_every_op_has_its_kernel():
    cuda = torch.device("cuda")
    assert set(active_kernels(Kernels.triton, cuda).values()) == {"triton"}
    assert active_kernels(Kernels.auto, cuda) == active_kernels(Kernels.triton, cuda)
    assert set(active_kernels(Kernels.torch, cuda).values()) == {"torch"}
    assert "triton" not in active_kernels(Kernels.auto, torch.device("cpu")).values()
