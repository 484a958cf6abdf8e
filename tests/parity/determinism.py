"""One step twice from the same seed; as a program: `python -m tests.parity.determinism THREADS`.

The program prints what differs as JSON. It is a process of its own so that idle threads sleep
instead of spinning: on a busy machine the spinning makes two threads 40 times slower than one.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor

from model.config import Kernels, LayerKind
from model.init import init_weights
from model.loss import Objective
from model.transformer import DeepSeekV4
from tests.parity.configs import tiny_config
from tests.parity.harness import Case, counts, make_batch


def one_step(kernels: Kernels, seed: int) -> dict[str, Tensor]:
    """Everything that a step of a model built anew leaves, by name."""
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


def differences(kernels: Kernels) -> list[str]:
    """Names whose bits differ between two equal steps."""
    one, two = one_step(kernels, 7), one_step(kernels, 7)
    assert one.keys() == two.keys()
    assert sum(n.startswith("grad:") for n in one) > 60
    return [n for n in one if not torch.equal(one[n], two[n])]


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    here = [k for k in Kernels if k is not Kernels.triton]  # the interpreter has no threads
    found = {k.value: differences(k) for k in here}
    sys.stdout.write(json.dumps({"threads": torch.get_num_threads(), "differences": found}))
