"""Imports of a run, made once: ranks of tests are forked from a process that has only these.

Each would take five seconds of CPU time to import them, longer than most of what ranks are tested
for. Nothing may be imported here that starts threads or looks for a device. What a run measures at
its start, the machine's rate, is measured once too (0.3 s); tests about it measure again.
"""

import gc

import torch

import train.build
import train.pretrain  # noqa: F401  and a command
from train.preflight.matmul_rate import measured_matmul_rate

measured_matmul_rate(torch.device("cpu"), torch.float32)  # on one thread, which stays the only one
gc.freeze()  # ranks share these pages
