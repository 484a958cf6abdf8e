"""Documents packed in one row do not touch each other (reference P.2).

Exactly 0 gradient from document B's loss to document A's embeddings; changing A leaves B's experts
and entries equal, B's outputs and gradients bitwise equal in reference mode and within 1e-6 in fast
mode (a grouped matmul's bits depend on how many rows an expert got).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.config import Kernels, LayerKind, Residual
from model.loss import Objective
from tests.parity.configs import tiny_config
from tests.parity.harness import Case, build_ours, gradients, make_batch, make_weights
from tests.parity.properties import check_isolation, check_no_gradient_across

BOTH = [Kernels.reference, Kernels.fast]
ALL_KINDS = tiny_config(
    num_hidden_layers=6,
    layer_kinds=[LayerKind(k) for k in ("swa", "hca", "csa", "dense", "hca", "csa")],
    compress_ratios=[0, 8, 4, 0, 5, 3],
    num_nextn_predict_layers=2,
)


@pytest.mark.core
@pytest.mark.parametrize("kernels", BOTH)
def test_changing_a_document_leaves_its_neighbour(kernels: Kernels) -> None:
    check_isolation(replace(ALL_KINDS, kernels=kernels), kernels is Kernels.reference)


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize("phase", ["full", "warmup"])
def test_isolation_holds_in_every_phase(phase: str, kernels: Kernels) -> None:
    check_isolation(replace(ALL_KINDS, kernels=kernels), kernels is Kernels.reference, phase)


@pytest.mark.parametrize("kernels", BOTH)
@pytest.mark.parametrize(
    ("kind", "ratio"), [("swa", 0), ("csa", 4), ("hca", 8), ("dense", 0), ("mha", 0)]
)
def test_each_kind_alone_is_isolated(kind: str, ratio: int, kernels: Kernels) -> None:
    config = tiny_config(
        num_hidden_layers=2,
        layer_kinds=[LayerKind(kind)] * 2,
        compress_ratios=[ratio] * 2,
        num_nextn_predict_layers=1,
        residual=Residual.plain if kind == "swa" else Residual.mhc,
        kernels=kernels,
    )
    check_isolation(config, kernels is Kernels.reference)
    check_no_gradient_across(config)


@pytest.mark.core
@pytest.mark.parametrize("kernels", BOTH)
def test_no_gradient_crosses_documents(kernels: Kernels) -> None:
    check_no_gradient_across(replace(ALL_KINDS, kernels=kernels))


@pytest.mark.parametrize("kernels", BOTH)
def test_token_ids_of_padding_do_not_matter(kernels: Kernels) -> None:
    """Losses, loads and gradients are those of any other padding id, whose embedding gets none."""
    case = Case("padding", replace(ALL_KINDS, kernels=kernels), ((-5, 20, -9),))
    weights, batch = make_weights(case), make_batch(case)
    seen = []
    for pad in (0, 61):
        ids = torch.where(batch.document_ids_BT < 0, pad, batch.input_ids_BT.clamp(max=60))
        ids = torch.where((ids == 0) & (batch.document_ids_BT >= 0), 1, ids)
        model = build_ours(case, weights)
        output = model(
            ids,
            batch.document_ids_BT,
            batch.labels_BTK.clamp(max=60),
            Objective((19.0, 18.0, 17.0), 20.0),
        )
        output.total.backward()
        seen.append((output, gradients(model)))
    (one, grads_one), (two, grads_two) = seen
    for name in one.losses:
        assert abs(float(one.losses[name] - two.losses[name])) < 1e-6
    for gate in one.expert_load:
        assert torch.equal(one.expert_load[gate], two.expert_load[gate])
        assert float(one.expert_load[gate].sum()) == 20 * case.config.num_experts_per_tok
    assert grads_one["embed.weight"][61].abs().max() == 0
    assert grads_two["embed.weight"][61].abs().max() == 0
    for name, grad in grads_one.items():
        assert torch.allclose(grad, grads_two[name], rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("kernels", BOTH)
def test_document_gets_the_same_outputs_alone_and_packed(kernels: Kernels) -> None:
    """Where a document stands in the row does not matter (up to the order of fp32 sums)."""
    case = Case("alone", replace(ALL_KINDS, kernels=kernels), ((11, 26, -3),))
    model, batch = build_ours(case, make_weights(case)), make_batch(case)
    with torch.no_grad():
        packed = model.logits(batch.input_ids_BT, batch.document_ids_BT)[:, 11:37]
        alone = model.logits(batch.input_ids_BT[:, 11:37])
    assert float((packed - alone).abs().max()) < 1e-5
