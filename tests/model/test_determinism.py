"""Same seed, same bits, twice: initialisation, forward, backward; with 1 and with 2 threads.

Each thread count is compared with itself: another count may sum in another order.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.config import Kernels
from tests.parity.determinism import differences, one_step

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kernels", [Kernels.reference, Kernels.fast])
def test_same_seed_gives_the_same_bits_twice(kernels: Kernels) -> None:
    assert differences(kernels) == []


def test_two_threads_give_the_same_bits_twice() -> None:
    """Threads must not decide the order in which anything is summed."""
    env = os.environ | {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "0", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "tests.parity.determinism", "2"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kinds = [k.value for k in Kernels if k is not Kernels.triton]
    assert json.loads(done.stdout) == {"threads": 2, "differences": {key: [] for key in kinds}}


def test_another_seed_gives_other_bits() -> None:
    one, other = (one_step(Kernels.fast, seed) for seed in (7, 8))
    assert not torch.equal(one["weight:embed.weight"], other["weight:embed.weight"])
    assert not torch.equal(one["loss:loss"], other["loss:loss"])
