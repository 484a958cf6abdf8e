"""A job whose rank is gone ends soon and says so.

A process that dies closes its connections, which the others notice at once. A host that cannot be
reached any more says nothing: the others wait for it in a collective. How long is
``parallel.timeout_seconds``, in force from the first step on. Before it, one rank may prepare data
for hours while the others wait.
"""

from __future__ import annotations

import datetime
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed import distributed_c10d

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
    try:
        yield
    except RuntimeError as error:
        if not (dist.is_initialized() and is_lost_rank(error)):
            raise
        what = " ".join(str(error).split())[:300]
        sys.stderr.write(
            f"error: rank {dist.get_rank()}: another rank is gone, or did not answer within"
            f" parallel.timeout_seconds={timeout_seconds:g}; the same command continues from the"
            f" newest checkpoint ({what})\n"
        )
        sys.stderr.flush()
        time.sleep(_PATIENCE)
        os._exit(1)


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error is that of communication with a rank that does not answer.

    gloo's are plain ones. A class of our own is none, whatever its text names.
    """
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and _GLOO.search(str(error)) is not None
    )
