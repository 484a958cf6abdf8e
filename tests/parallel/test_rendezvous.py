"""Ranks that start again on the store of a dead start meet each other and not the dead."""

import datetime
import random
import threading
import time

import pytest
import torch.distributed as dist

from parallel.rendezvous import fresh_store

LONG, SHORT = datetime.timedelta(seconds=30), datetime.timedelta(seconds=0.2)


@pytest.fixture
def store():
    """As torchrun's agent keeps it: one server through all starts."""
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def start(store, ranks, world_size, timeout=LONG, seed=0):
    """Some ranks of one start, in any order; what each wrote and what it read of rank 0."""
    read = {}

    def join(rank, pause):
        time.sleep(pause)
        mine = fresh_store(store.clone(), rank, world_size, timeout)
        if rank == 0:
            mine.set("address", f"{seed}")
        read[rank] = mine.get("address").decode()

    pauses = random.Random(seed)
    threads = [threading.Thread(target=join, args=(rank, pauses.random() / 10)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return read


@pytest.mark.core
def test_every_start_reads_its_own_addresses(store):
    for seed in range(5):
        assert start(store, range(4), 4, seed=seed) == dict.fromkeys(range(4), f"{seed}")


@pytest.mark.core
def test_start_that_broke_off_leaves_nothing_that_the_next_could_read(store):
    """Without a handshake the late rank 0 is what fails: the others find the dead one's address."""
    assert start(store, range(3), 3, seed=1) == dict.fromkeys(range(3), "1")
    store.set("start/word/1", "of one that died before rank 0 answered")
    assert start(store, [2, 1, 0], 3, seed=2) == dict.fromkeys(range(3), "2")


@pytest.mark.core
@pytest.mark.parametrize(("rank", "missing"), [(0, r"rank\(s\) \[1\]"), (1, "rank 0")])
def test_rank_that_does_not_come_is_named(store, rank, missing):
    with pytest.raises(RuntimeError, match=f"rank {rank} waited in vain for {missing}"):
        fresh_store(store, rank, 2, SHORT)
