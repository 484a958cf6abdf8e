"""What blocks keep rests on the host: the same bits, few bytes on the device, copies in time.

Bits travel and nothing is computed otherwise, so equality is bitwise. On a CPU host and device are
one memory; what lies where is told by who made it: copies of :meth:`Transfers.take_down` lie on the
host, everything else on the device.
"""

import gc
import re
from contextlib import contextmanager

import pytest
import torch

from model.loss import Objective
from optim.offload import Transfers
from parallel.activation_offload import ActivationOffload, prepare_blocks
from parallel.errors import ConfigError
from tests.helpers import random_rows, small_model
from tests.optim.test_offload import LiveBytes
from train.config.command_line import compose_run

CPU = torch.device("cpu")
ROWS = random_rows(2, 48, 128, seed=1)


def small(mode="none", offload=None, **changes):
    model = small_model(**changes)
    prepare_blocks(model, mode, offload)
    return model


def forward(model):
    batch = ROWS.whole
    objective = Objective(tuple(map(float, ROWS.counts.targets_K)), float(ROWS.counts.tokens))
    return model(batch.input_ids_BT, batch.document_ids_BT, batch.labels_BTK, objective).total


@pytest.mark.parametrize("mode", ["none", "block", "selective"])
def test_offload_changes_no_bit_and_leaves_nothing_behind(mode):
    offload = ActivationOffload(Transfers(CPU), least_bytes=0)
    models = [small(mode), small(mode, offload)]
    for model in models:
        totals = [forward(model), forward(model)]  # of two microbatches at once, as a pipeline has
        for total in totals:
            total.backward()
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert one.grad is not None, name
        assert two.grad is not None, name
        assert torch.equal(one.grad, two.grad), name
    gc.collect()
    assert len(offload._parcels) == 0
    with torch.no_grad():
        assert torch.equal(forward(models[0]), forward(models[1]))


class Told(Transfers):
    """Copies, their order, and how many; what is made on the host is not the device's."""

    def __init__(self, live=None):
        super().__init__(CPU)
        self.events, self._live, self.down = [], live, 0

    @contextmanager
    def _on_host(self):
        if self._live is not None:
            self._live.paused = True
        yield
        if self._live is not None:
            self._live.paused = False

    def take_down(self, tensors):
        self.events.append("down")
        self.down += sum(t.nbytes for t in tensors)
        with self._on_host():
            return super().take_down(tensors)

    def fetch(self, tensors):
        self.events.append("up")
        return super().fetch(tensors)


class DeviceBytes(LiveBytes):
    paused = False

    def _count(self, tensor):
        if not self.paused:
            super()._count(tensor)


def most_bytes(layers, mode, offloads):
    """Bytes on the device at once in a forward and backward pass, the weights' gradients aside."""
    ratios = [(0, 4, 16, 4)[i % 4] for i in range(layers)]
    kinds = [{0: "swa", 4: "csa", 16: "hca"}[ratio] for ratio in ratios]
    changes = {
        "num_hidden_layers": layers, "compress_ratios": [*ratios, 0], "layer_kinds": kinds,
    }  # fmt: skip
    live = DeviceBytes()
    told = Told(live)
    model = small(mode, ActivationOffload(told) if offloads else None, **changes)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with live:
        forward(model).backward()
    return live.most, told.down


@pytest.mark.parametrize("mode", ["none", "block", "selective"])
def test_bytes_on_the_device_do_not_grow_with_depth(mode):
    """Of four blocks more the device keeps a tenth at most: what is smaller than 4 KiB."""
    plain = [most_bytes(layers, mode, False)[0] for layers in (4, 8)]
    away = [most_bytes(layers, mode, True) for layers in (4, 8)]
    assert away[1][0] < plain[1]
    assert away[1][0] - away[0][0] < 0.1 * (plain[1] - plain[0])
    assert away[1][1] - away[0][1] > 0.9 * (plain[1] - plain[0])  # they went to the host


def test_copies_begin_one_block_ahead():
    """Down behind each block but the last; up one block before the backward pass comes there.

    Of the two that follow "backward 3" the first brings tables that all blocks share.
    """
    told = Told()
    model = small("none", ActivationOffload(told, least_bytes=0))
    blocks = [*model.layers.values(), *model.mtp.values()]

    def said(number):
        def run(_, __, output):
            told.events.append(f"forward {number}")
            output[0].register_hook(lambda grad: told.events.append(f"backward {number}"))

        return run

    for number, block in enumerate(blocks):
        block.register_forward_hook(said(number))
    forward(model).backward()
    assert len(blocks) == 4
    assert told.events == [
        "down", "forward 0", "down", "forward 1", "down", "forward 2", "forward 3",
        "backward 3", "up", "up", "backward 2", "up", "backward 1", "up", "backward 0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["parallel.pp=2"], "parallel.offload_activations=true does not go with parallel.pp=2"),
        (["engine=deepspeed"], "parallel.offload_activations=true is the torch engine's"),
        (["model.num_hidden_layers=1", "model.num_nextn_predict_layers=0"],
         "parallel.offload_activations=true keeps the last block on the device"),
    ],
)  # fmt: skip
def test_where_it_would_not_act_it_is_refused(words, line):
    with pytest.raises((ConfigError, ValueError), match=re.escape(line)):
        compose_run(["model=v4_tiny", "parallel.offload_activations=true", *words])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offload_on_a_gpu_changes_no_bit_and_holds_less():
    device, grads, most = torch.device("cuda", 0), [], []
    for offload in (None, ActivationOffload(Transfers(device))):
        model = small("none", offload, num_hidden_layers=8, compress_ratios=[0] * 9).to(device)
        rows = random_rows(4, 1024, 128)
        objective = Objective(tuple(map(float, rows.counts.targets_K)), float(rows.counts.tokens))
        batch = rows.whole
        torch.cuda.reset_peak_memory_stats()
        inputs = batch.input_ids_BT.to(device), batch.document_ids_BT, batch.labels_BTK.to(device)
        model(*inputs, objective).total.backward()
        torch.cuda.synchronize()
        most.append(torch.cuda.max_memory_allocated())
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))
    assert most[1] < most[0]
