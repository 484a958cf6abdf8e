"""Optimizer state in host memory: the same bits, few bytes on the device, copies beside the work.

Muon's arithmetic is the device's, so equality is bitwise. AdamW runs on the host: on a CPU that is
the same kernel over one parameter instead of many, bitwise too; on a GPU one rounding may differ.
"""

from unittest.mock import patch

import pytest
import torch

from optim import muon
from optim.build import build_optimizer
from optim.config import MatmulDtype, MuonConfig, OptimConfig, StateDtype
from optim.offload import Offload, Transfers
from tests.helpers import LiveBytes, small_model

CPU = torch.device("cpu")
STEPS = 3


def optimizer_of(model, offload, state_dtype=StateDtype.fp32):
    config = OptimConfig(muon=MuonConfig(dtype=MatmulDtype.fp32), state_dtype=state_dtype)
    counts = model.config.split_counts
    return build_optimizer(model.named_parameters(), config, None, counts, offload=offload)


def give_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("dtype", [StateDtype.fp32, StateDtype.bf16])
def test_offloaded_update_has_the_same_bits(dtype):
    models = [small_model(), small_model()]
    optimizers = [
        optimizer_of(model, offload, dtype)
        for model, offload in zip(models, (None, Offload(Transfers(CPU))), strict=True)
    ]
    for step in range(STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            give_gradients(model, step)
            optimizer.step(1e-2)
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two), name
    states = [optimizer.state_dict() for optimizer in optimizers]
    for name, state in states[0].items():
        for key, tensor in state.items():
            assert torch.equal(tensor, states[1][name][key]), (name, key)


def test_of_the_state_two_chunks_at_most_are_on_the_device():
    """Beside what the update itself needs, which it needs without offload as well."""
    chunk = 2**12  # elements; the model's largest matrix has fewer
    most = {}
    with patch.dict(muon.CHUNK_ELEMENTS, cpu=chunk):
        for offload in (None, Offload(Transfers(CPU))):
            model = small_model()
            optimizer = optimizer_of(model, offload)
            give_gradients(model, 0)
            engine = next(e for e in optimizer._engines.values() if e.algorithm == "muon")
            with LiveBytes() as live:
                engine.step(1e-2, list(engine.entries))
            most[offload is None] = live.most
        state = sum(s["momentum"].nbytes for s in engine.state.values())
    added = most[False] - most[True]
    assert 0 < added <= 2 * 4 * chunk
    assert added < state / 4  # what would rest on the device


def test_next_chunk_travels_while_one_is_orthogonalised():
    """The order in which copies and work are begun; that they overlap is a GPU's to show."""
    events = []

    class Recorded(Transfers):
        def fetch(self, tensors):
            events.append("fetch")
            return super().fetch(tensors)

        def send(self, sources, targets):
            events.append("send")
            super().send(sources, targets)

    model = small_model()
    optimizer = optimizer_of(model, Offload(Recorded(CPU)))
    engine = next(e for e in optimizer._engines.values() if e.algorithm == "muon")
    names = [f"layers.{i}.attn.wq_a.weight" for i in range(3)]
    give_gradients(model, 0)
    plain = muon.newton_schulz

    def work(*args):
        events.append("work")
        return plain(*args)

    with patch.dict(muon.CHUNK_ELEMENTS, cpu=1), patch.object(muon, "newton_schulz", work):
        engine.step(1e-2, names)
    assert events == ["fetch", "fetch", "work", "send", "fetch", "work", "send", "work", "send"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_run_beside_newton_schulz_on_a_gpu():
    """The offloaded step of large matrices takes less than copies and work one after the other."""
    device = torch.device("cuda")
    weights = [torch.nn.Parameter(torch.randn(4096, 4096, device=device)) for _ in range(8)]
    entries = [muon.MuonEntry(str(i), w, 0.1, num_matrices=1) for i, w in enumerate(weights)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    transfers = Transfers(device)
    seconds = {}
    for name, given in (("work", None), ("both", transfers)):
        engine = muon.Muon(entries, MuonConfig(), torch.float32, given)
        for _ in range(3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            engine.step(1e-3, [entry.name for entry in entries])
            torch.cuda.synchronize()
            end.record()
            end.synchronize()
            seconds[name] = start.elapsed_time(end)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for state in engine.state.values():
        here = transfers.fetch([state["momentum"]]).on_device()
        transfers.send(here, [state["momentum"]])
        transfers.finish()
    end.record()
    end.synchronize()
    assert seconds["both"] < seconds["work"] + 0.8 * start.elapsed_time(end)
