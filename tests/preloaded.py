"""Imports of a run, made once: ranks of tests are forked from a process that has only these.

Each would take five seconds of CPU time to import them, longer than most of what ranks are tested
for. Nothing may be imported here that starts threads or looks for a device.
"""

import gc

import train.build  # noqa: F401  all that a rank needs

gc.freeze()  # ranks share these pages
