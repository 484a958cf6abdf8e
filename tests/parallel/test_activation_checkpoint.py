"""Recomputation changes no bit of a loss or gradient, and keeps less for the backward pass."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from model.loss import Objective
from parallel.activation_checkpoint import checkpoint_blocks
from tests.helpers import random_rows, small_model

ROWS = random_rows(2, 48, 128, seed=1)


def run(mode, **changes):
    """Gradients, losses, loads, and bytes that autograd kept."""
    model = small_model(**changes)
    assert checkpoint_blocks(model, mode) == (0 if mode == "none" else 4)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = ROWS.whole
    objective = Objective(tuple(map(float, ROWS.counts.targets_K)), float(ROWS.counts.tokens))
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(batch.input_ids_BT, batch.document_ids_BT, batch.labels_BTK, objective)
    output.total.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return grads, output, sum(kept.values())


@pytest.mark.parametrize("mode", ["block", "selective"])
@pytest.mark.parametrize("kernels", ["reference", "fast"])
def test_recomputation_changes_no_bit(mode, kernels):
    plain, whole, kept_whole = run("none", kernels=kernels)
    again, cut, kept = run(mode, kernels=kernels)
    assert torch.equal(cut.total, whole.total)
    assert [n for n in plain if not torch.equal(plain[n], again[n])] == []
    assert all(torch.equal(cut.expert_load[n], whole.expert_load[n]) for n in whole.expert_load)
    assert kept < 0.6 * kept_whole


def test_evaluation_is_untouched():
    model, plain = small_model(), small_model()
    checkpoint_blocks(model, "block")
    with torch.no_grad():
        ids = ROWS.whole.input_ids_BT
        assert torch.equal(model.logits(ids), plain.logits(ids))
