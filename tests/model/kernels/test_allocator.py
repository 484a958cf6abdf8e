"""keep_freed_memory: a large tensor allocated again touches no fresh pages.

It changes the whole process, so it runs in one of its own (without torch: 0.1 s).
"""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import ctypes, json, resource, sys
from model.kernels.allocator import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

default = [faults(64 << 20) for _ in range(3)][-1]
taken = keep_freed_memory()
kept = [faults(64 << 20) for _ in range(3)][-1]
print(json.dumps([default, taken, kept]))
"""


def test_freed_memory_is_reused_without_page_faults():
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=root, capture_output=True, text=True, check=True
    )
    default, taken, kept = json.loads(done.stdout)
    assert taken
    # Pages of 4 KiB, or of 2 MiB where the kernel hands out huge ones.
    assert default >= 32
    assert kept < default / 10
