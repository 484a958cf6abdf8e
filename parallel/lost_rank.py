"""A job whose rank is gone ends soon and says so.

A process that dies closes its connections, which the others notice at once. A host that cannot be
reached any more says nothing: the others wait for it in a collective. How long is
``parallel.timeout_seconds``, in force from the first step on. Before it, one rank may prepare data
for hours while the others wait.

A rank that meets an error which others may not meet, as when it runs out of memory, says so in the
store that all share: the first to do so tells its line, and the others leave without another. They
look there once a second, by a thread: some collectives, gloo's reduce-scatter among them, do not
notice that a partner was gone before they began. Without torchrun the store is in rank 0's process,
which stays until they looked.
"""

from __future__ import annotations

import datetime
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import torch.distributed as dist
from torch.distributed import distributed_c10d

from parallel.last_word import tell_launcher

_TELLER = "told by rank"  # in the store
_MET = "errors met"  # in the store: by any rank, those of earlier jobs of a sweep included
# Seconds between the first rank and the last that meet an error of all: rank 0 first closes the
# trackers, which may upload, and a rank with a save under way waits 10 s for it.
_TOGETHER = 30.0
_LOOK = 1.0  # seconds between two looks for it
_PATIENCE = 3.0  # seconds; torchrun looks after its ranks every 0.1 s unless told otherwise
# What gloo says of a rank that is gone; NCCL's and the store's errors have types of their own.
_GLOO = re.compile(
    r"gloo|connection (closed|reset)|timed out|timeout|broken pipe|no route to host", re.IGNORECASE
)


def all_ready(timeout_seconds: float) -> None:
    """Wait for every rank, with the patience of the start, then shorten it. Collective.

    Args:
        timeout_seconds: how long a collective may wait from now on.
    """
    if not dist.is_initialized():
        return
    dist.barrier()
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout_seconds), group)


@contextmanager
def lost_rank_ends_the_job(timeout_seconds: float) -> Iterator[None]:
    """Turn the error of a collective whose partner is gone into one line and exit code 1.

    It leaves a little later, so that the launcher meets the rank that died first and names that one
    as the cause; and without closing its groups, which with a partner missing may never close.
    """
    over, codes = threading.Event(), list[int]()
    watch = threading.Thread(target=_leave_with_another, args=(over, codes), daemon=True)
    watch.start()
    try:
        yield
    except RuntimeError as error:
        if not (dist.is_initialized() and is_lost_rank(error)):
            raise
        if code := codes[0] if codes else _code_of_another():
            time.sleep(_PATIENCE)
            os._exit(code)
        what = " ".join(str(error).split())[:300]
        sys.stderr.write(
            f"error: rank {dist.get_rank()}: another rank is gone, or did not answer within"
            f" parallel.timeout_seconds={timeout_seconds:g}; the same command continues from the"
            f" newest checkpoint ({what})\n"
        )
        sys.stderr.flush()
        time.sleep(_PATIENCE)
        os._exit(1)
    finally:
        over.set()
        watch.join(_LOOK + _PATIENCE)


def all_meet_an_error() -> bool:
    """Whether every rank has met an error, as where all refuse the same; waits a while for them."""
    world, counted = dist.get_world_size(), False
    try:
        store = distributed_c10d._get_default_store()
        all_of_them = -(-store.add(_MET, 1) // world) * world
        counted, end = True, time.monotonic() + _TOGETHER
        while time.monotonic() < end and store.add(_MET, 0) < all_of_them:
            time.sleep(0.1)
        return store.add(_MET, 0) >= all_of_them  # once more, behind the bound
    except RuntimeError:  # the store is gone, and with it the rank that held it: which left first
        return counted


def leave_by_own_error(lines: Sequence[str], code: int) -> NoReturn:
    """Tell an error that other ranks may not have, unless one has told its own, and leave.

    Groups stay open, as others may be waiting in a collective: closing them might never end.

    Args:
        lines: of the error.
        code: with which every rank leaves.
    """
    rank = dist.get_rank()
    mine = f"{rank} {code}"
    try:
        store = distributed_c10d._get_default_store()
        first = store.compare_set(_TELLER, "", mine) == mine.encode()
    except RuntimeError:  # the store is gone: whether another has told cannot be known
        first = True
    if first:
        text = "".join(f"error: rank {rank}: {line}\n" for line in lines)
        sys.stderr.write(text)
        sys.stderr.flush()
        tell_launcher(text)
    try:
        if rank == 0:  # the store may end with it
            time.sleep(2 * _LOOK)
    finally:  # a signal may end the wait
        os._exit(code)


def _leave_with_another(over: threading.Event, codes: list[int]) -> None:
    """Leave when a rank has told its error, whatever this one waits for.

    Args:
        over: ends the looking.
        codes: gets the code, which the store may no longer tell when a collective fails.
    """
    while not over.wait(_LOOK):
        if code := _code_of_another():
            codes.append(code)
            time.sleep(_PATIENCE)
            os._exit(code)


def _code_of_another() -> int:
    """With which code another rank left that has told its error; 0: none has."""
    try:
        store = distributed_c10d._get_default_store()
        if not store.check([_TELLER]):
            return 0
        rank, code = map(int, store.get(_TELLER).split())
        return code if rank != dist.get_rank() else 0
    except (RuntimeError, ValueError):  # the store is gone; there is no group yet, or any more
        return 0


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error is that of communication with a rank that does not answer.

    gloo's are plain ones. A class of our own is none, whatever its text names.
    """
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and _GLOO.search(str(error)) is not None
    )
