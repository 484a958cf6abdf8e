"""The next microbatch is read and pinned by a thread while this one trains."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator

import torch

from data.batch import Batch

_AHEAD = 2  # microbatches that wait


def prefetched(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same microbatches in the same order, in pinned memory where ``device`` can use it.

    On a CPU they are read when they are needed: the cores are busy with the step itself.

    Args:
        batches: read by one thread, from first to last.
        device: that trains.

    Raises:
        Exception: whatever reading raised, where the failing microbatch would have come.
    """
    return iter(batches) if device.type == "cpu" else read_ahead(batches, pin=True)


def read_ahead(batches: Iterable[Batch], pin: bool) -> Iterator[Batch]:
    """Reads in a thread, at most some microbatches ahead; leaving early ends the thread.

    Args:
        batches: see :func:`prefetched`.
        pin: in memory that a device copies from by itself.
    """
    waiting: queue.Queue[Batch | BaseException | None] = queue.Queue(_AHEAD)
    left = threading.Event()

    def hand_over(item: Batch | BaseException | None) -> None:
        while not left.is_set():
            try:
                return waiting.put(item, timeout=0.1)
            except queue.Full:
                continue

    def read() -> None:
        try:
            for batch in batches:
                hand_over(batch.pinned() if pin else batch)
                if left.is_set():
                    return
            hand_over(None)
        except BaseException as error:
            hand_over(error)

    thread = threading.Thread(target=read, name="batches", daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        left.set()
        thread.join()
