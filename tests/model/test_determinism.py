"""Same seed, same bits, twice: initialisation, forward, backward; with 1 and with 2 threads.

Each thread count is compared with itself: another count may sum in another order.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.config import Kernels, LayerKind
from model.init import init_weights
from model.loss import Objective
from model.transformer import DeepSeekV4
from tests.parity.harness import Case, counts, make_batch
from tests.parity.models import tiny_config


def _one_step(kernels: Kernels, seed: int) -> dict[str, Tensor]:
    """Everything a step leaves, by name, from a model built anew."""
    config = tiny_config(
        num_hidden_layers=3,
        layer_kinds=[LayerKind.swa, LayerKind.hca, LayerKind.csa],
        compress_ratios=[0, 8, 4],
        num_nextn_predict_layers=1,
        hidden_size=64,
        hc_sinkhorn_iters=4,
        kernels=kernels,
    )
    # long enough that torch splits its loops over threads; experts with many rows
    case = Case("determinism", config, ((200, 70, -3, 33),))
    batch = make_batch(case)
    targets, tokens = counts(case, batch)
    model = DeepSeekV4(config)
    init_weights(model, seed)
    record: dict[str, Tensor] = {}
    objective = Objective(targets, tokens, monitors=True, record=record)
    output = model(batch.input_ids_BT, batch.document_ids_BT, batch.labels_BTK, objective)
    output.total.backward()
    result = {f"loss:{n}": v for n, v in output.losses.items()} | output.expert_load | record
    result |= {f"weight:{n}": p.detach() for n, p in model.named_parameters()}
    result |= {f"grad:{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return result | output.monitors


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kernels", [Kernels.reference, Kernels.fast])
def test_same_seed_gives_the_same_bits_twice(kernels: Kernels, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        one, two = (_one_step(kernels, 7) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    assert one.keys() == two.keys()
    assert sum(n.startswith("grad:") for n in one) > 60
    different = [n for n in one if not torch.equal(one[n], two[n])]
    assert not different, f"not the same bits twice: {different[:5]}"


def test_another_seed_gives_other_bits() -> None:
    one, other = (_one_step(Kernels.fast, seed) for seed in (7, 8))
    assert not torch.equal(one["weight:embed.weight"], other["weight:embed.weight"])
    assert not torch.equal(one["loss:loss"], other["loss:loss"])
