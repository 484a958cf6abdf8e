"""Exchanges of context parallelism travel while local work goes on, forward and backward.

Proved by the order in which a rank starts exchanges, multiplies matrices or normalises, and waits;
no clock is read. The bits are those of exchanges that are waited for where they begin.
"""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import parallel.context_parallel as context_parallel
from model.kv_exchange import Here
from tests.helpers import run_distributed
from tests.parallel.ranks import alone, forward_backward, gradients, spread
from tests.parallel.test_context_layouts import packed_rows

WORK = ("mm", "bmm", "rsqrt", "mul")  # of projections, and of norms both ways
LENGTHS = ([43, 87, 31, 95], [256])


class Recorder(TorchDispatchMode):
    """What a rank does, in order: ``("start", n)``, ``("wait", n)`` and the names of local ops."""

    def __init__(self):
        super().__init__()
        self.events = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WORK:
            self.events.append(name)
        return func(*args, **(kwargs or {}))

    def watched(self, start):
        """A collective that is recorded, and its wait."""

        def begin(*args, **kwargs):
            work = start(*args, **kwargs)
            if work is None or "async_op" not in kwargs:
                return work
            number = sum(event[0] == "start" for event in self.events)
            self.events.append(("start", number))
            return Watched(work, lambda: self.events.append(("wait", number)))

        return begin

    def hidden(self):
        """By exchange in order: the local ops between its start and its wait."""
        begins = [i for i, e in enumerate(self.events) if e[0] == "start"]
        ends = {e[1]: i for i, e in enumerate(self.events) if e[0] == "wait"}
        assert len(ends) == len(begins), "all are waited for"
        return [
            [e for e in self.events[begin : ends[n]] if isinstance(e, str)]
            for n, begin in enumerate(begins)
        ]


class Watched:
    def __init__(self, work, on_wait):
        self.work, self.on_wait = work, on_wait

    def wait(self):
        self.on_wait()
        self.work.wait()


def one_step(engine, rows):
    """What each exchange of a step travels behind, and the gradients."""
    engine.optimizer.zero_grad()
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_to_all_single", "all_gather_single"):
            patch.setattr(dist, name, recorder.watched(getattr(dist, name)))
        with recorder:
            total = forward_backward(engine, rows, len(LENGTHS), 2).total
    return recorder.hidden(), total, gradients(engine)


class WaitsAtOnce:
    """An exchange that hides behind nothing."""

    def __init__(self, trip, *x):
        ticket = context_parallel._Depart.apply(trip, *x)
        self.came = Here(context_parallel._Arrive.apply(trip, ticket))

    def wait(self):
        return self.came.wait()


def compare_orders(rank, world, checkpoint):
    reference = alone(kernels="reference")
    rows = packed_rows(reference.model.config.vocab_size, LENGTHS)
    engine, _ = spread(reference, {"cp": world}, checkpoint=checkpoint)
    hidden, total, grads = one_step(engine, rows)
    # swa, csa, hca and MTP's swa: 4 windows; csa's two compressors and hca's: 3 halos, 3 gathers
    assert len(hidden) == 10 * (3 if checkpoint == "block" else 2)
    for number, ops in enumerate(hidden):
        assert ops, f"exchange {number} hides behind nothing: {hidden}"
    matmuls = Counter("mm" in ops for ops in hidden)
    assert matmuls[True] > matmuls[False], hidden  # the gathers of hca, behind a norm, excepted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(context_parallel, "_Brought", WaitsAtOnce)
        bare, same_total, same = one_step(engine, rows)
    assert len(bare) == len(hidden)
    assert not any(bare), "the measure sees what hides nothing"
    assert torch.equal(total, same_total)
    for name, grad in grads.items():
        assert torch.equal(grad, same[name]), name


@pytest.mark.parametrize("checkpoint", ["none", pytest.param("block", marks=pytest.mark.slow)])
def test_exchanges_travel_behind_local_work_and_change_no_bit(checkpoint):
    run_distributed(compare_orders, 2, checkpoint)
