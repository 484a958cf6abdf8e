"""Every test runs on one thread and without a network; processes that tests start inherit both.

``OMP_NUM_THREADS`` asks for other threads, ``TEST_CPU_LEVEL`` for another kind of CPU
(``tests/cpu_levels.py``); both have to stand before torch is imported.
"""

import os

from tests.cpu_levels import LEVELS, environment

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TRITON_INTERPRET", "1")  # CPU tensors; before a kernel is imported
os.environ.update(environment(os.environ.get("TEST_CPU_LEVEL")))

import pytest
import torch

from model.kernels import cpu_build

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if "TEST_CPU_LEVEL" in os.environ:
    level = LEVELS[os.environ["TEST_CPU_LEVEL"]]
    assert torch.backends.cpu.get_cpu_capability().lower() == level.capability
    cpu_build.set_target(level.march)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
