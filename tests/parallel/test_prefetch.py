"""Microbatches read by a thread: the same in the same order, errors and early ends included."""

import threading
import time

import pytest
import torch

from data.batch import Batch
from parallel.prefetch import prefetched, read_ahead


def batches(count, read=None, fails_at=None):
    for i in range(count):
        if read is not None:
            read.append(i)
        if i == fails_at:
            raise ValueError(f"row {i} cannot be read")
        ids = torch.full((1, 4), i)
        yield Batch(ids, ids, ids[..., None])


def numbers(found):
    return [int(batch.input_ids_BT[0, 0]) for batch in found]


def readers():
    return [t for t in threading.enumerate() if t.name == "batches"]


def test_order_is_kept():
    assert numbers(read_ahead(batches(20), pin=False)) == list(range(20))
    assert numbers(read_ahead(batches(0), pin=False)) == []
    assert readers() == []


def test_reads_a_few_ahead_and_no_more():
    read = []
    found = read_ahead(batches(50, read), pin=False)
    next(found)
    deadline = time.monotonic() + 10
    while len(read) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert 2 <= len(read) <= 5
    found.close()
    assert readers() == []


def test_error_comes_where_its_batch_would_have():
    found = read_ahead(batches(9, fails_at=3), pin=False)
    assert numbers(next(found) for _ in range(3)) == [0, 1, 2]
    with pytest.raises(ValueError, match="row 3"):
        next(found)
    assert readers() == []


def test_on_a_cpu_nothing_is_read_before_it_is_needed():
    read = []
    found = prefetched(batches(5, read), torch.device("cpu"))
    next(found)
    assert read == [0]
    assert readers() == []
