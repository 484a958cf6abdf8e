"""Imports of a run, made once: ranks of tests are forked from a process that has only these.

Each would take five seconds of CPU time to import them, longer than most of what ranks are tested
for. Nothing may be imported here that starts threads or looks for a device.
"""

import gc

import train.build
import train.pretrain  # noqa: F401  with the line above all that a rank or a command needs

gc.freeze()  # ranks share these pages
