"""Keeps the C library from giving a step's memory back to the system, only to ask for it again.

By default glibc maps every tensor above 32 MiB afresh and trims the heap when its top is freed; the
kernel then zeroes each page at its first touch, which costs as much as the pass that fills it. A
training step allocates the same sizes each time, so the memory is kept instead: peak memory stays
as it is, resident memory stays near the peak between steps.
"""

from __future__ import annotations

import ctypes

# Parameters of mallopt(3), and the largest value its int argument holds, bytes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGEST = -1, -3, 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell this process's malloc to keep freed memory; call it once, before large allocations.

    Returns:
        Whether the C library took it: glibc does, others have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, _LARGEST))
