"""A store of this start's own, also after torchrun has restarted the processes.

torchrun keeps one key-value store through all restarts, and its workers meet under the same keys
each time: one that starts early finds the addresses of the process that died, and cannot connect
("Gloo connectFullMesh failed ... Connection refused"; NCCL waits for the dead). No variable counts
the starts alike on every node, so the ranks agree on a new name themselves, by a handshake that old
keys cannot answer.
"""

from __future__ import annotations

import datetime
import time
import uuid

import torch.distributed as dist

_PAUSE = 0.02  # seconds between two looks into the store


def fresh_store(
    store: dist.Store, rank: int, world_size: int, timeout: datetime.timedelta
) -> dist.Store:
    """A view of ``store`` that no earlier start of these ranks has written to. Collective.

    Every rank writes a word that it has just made up. Rank 0 answers each with that word and the
    name of this start, again whenever a word changes, until all have confirmed the name; the
    others wait for an answer that repeats their word.

    Args:
        store: shared by all ranks; may hold keys of earlier starts.
        rank: of this process.
        world_size: number of ranks.
        timeout: how long to wait for the others.

    Raises:
        RuntimeError: they did not all come.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    word = uuid.uuid4().hex
    name = _gather(store, word, world_size, deadline) if rank == 0 else ""
    if rank:
        store.set(f"start/word/{rank}", word)
        while not name:
            _wait(deadline, rank, "rank 0")
            if store.check([f"start/answer/{rank}"]):
                heard, _, offered = store.get(f"start/answer/{rank}").decode().partition(" ")
                name = offered if heard == word else ""
        store.set(f"start/{name}/{rank}", "confirmed")
    return dist.PrefixStore(f"start/{name}", store)


def _gather(store: dist.Store, name: str, world_size: int, deadline: float) -> str:
    """Rank 0's part: offer the name until every rank has confirmed it."""
    answered: dict[int, str] = {}
    missing = set(range(1, world_size))
    while missing:
        _wait(deadline, 0, f"rank(s) {sorted(missing)[:8]}")
        for rank in missing:
            if not store.check([f"start/word/{rank}"]):
                continue
            word = store.get(f"start/word/{rank}").decode()
            if answered.get(rank) != word:
                store.set(f"start/answer/{rank}", f"{word} {name}")
                answered[rank] = word
        missing = {rank for rank in missing if not store.check([f"start/{name}/{rank}"])}
    return name


def _wait(deadline: float, rank: int, whom: str) -> None:
    if time.monotonic() > deadline:
        raise RuntimeError(f"rank {rank} waited in vain for {whom} to start")
    time.sleep(_PAUSE)
