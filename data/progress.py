"""A map over work items with a progress bar, in this process or in several."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
T = TypeVar("T")


def progress_map(
    job: Callable[[Item], T],
    items: Sequence[Item],
    sizes: Sequence[int],
    workers: int,
    what: str,
) -> list[T]:
    """Results of a job over items, in order.

    Args:
        job: picklable where there are several workers, which are spawned, not forked (the threads
            of ``tokenizers`` do not survive a fork).
        items: its arguments.
        sizes: bytes of work of each, for the bar, which shows on terminals only.
        workers: processes; 1 = this one.
        what: text of the bar.
    """
    out: list[T] = []
    with tqdm(total=sum(sizes), desc=what, unit="B", unit_scale=True, disable=None) as bar:

        def collect(results: Iterable[T]) -> None:
            for size, result in zip(sizes, results, strict=True):
                out.append(result)
                bar.update(size)

        if workers == 1 or len(items) <= 1:
            collect(map(job, items))
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(
                min(workers, len(items)), mp_context=context, initializer=end_with_parent
            ) as pool:
                collect(pool.map(job, items))
    return out


def end_with_parent() -> None:
    """Leave as soon as the parent has ended, however it did: a pipe between the two then closes.

    A worker would wait for work for ever otherwise.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
