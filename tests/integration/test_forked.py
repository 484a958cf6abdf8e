"""Forked ranks: one time limit for all, and none waits for long for one that has failed."""

import multiprocessing
import os
import time

import pytest

from tests.forked import run_ranks, wait_for


@pytest.mark.parametrize(
    ("seconds", "after", "told"),
    [(60, 0.1, "a rank failed and others went on, exit codes by rank {0: None, 1: 3}"),
     (0.1, 60, "beyond 0.1 s")],
)  # fmt: skip
def test_a_failure_or_the_time_ends_the_wait_for_all(seconds, after, told):
    context = multiprocessing.get_context("fork")
    code = 3 if told.startswith("a rank") else 0
    started = [
        context.Process(target=time.sleep, args=(60,), daemon=True),
        context.Process(target=os._exit, args=(code,), daemon=True),
    ]
    for process in started:
        process.start()
    begin = time.monotonic()
    assert wait_for(started, seconds, after) == told
    assert time.monotonic() - begin < 30
    for process in started:
        process.kill()
        process.join()


def test_ranks_beyond_their_time_fail_the_test_with_what_they_said():
    with pytest.raises(AssertionError, match=r"(?s)plan: beyond 0.0 s.*-- rank 0.*-- rank 1"):
        run_ranks(["plan"], 2, seconds=0.0)
