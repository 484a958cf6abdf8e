"""The numeric tests as other CPUs run them: instruction sets of torch, oneDNN, MKL and our C++.

    python -m tests.cpu_levels --core          the core numeric tests under each level (make test)
    python -m tests.cpu_levels                 all of them, on 1 and 2 threads (make matrix)
    TEST_CPU_LEVEL=avx2 pytest tests/quant     one level by hand

``tests/conftest.py`` puts the level in ``TEST_CPU_LEVEL`` into effect before torch is imported, and
fails where torch did not take it. A level that this CPU does not have is told and left out.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

NUMERIC = ("tests/model", "tests/quant", "tests/optim", "tests/parity")
THREADS = (1, 2)


class Level(NamedTuple):
    """One kind of CPU.

    Attributes:
        march: target of our C++.
        capability: of torch's own kernels (``ATEN_CPU_CAPABILITY``).
        onednn: highest instruction set of oneDNN (bf16 matmuls).
        mkl: that of MKL (fp32 matmuls).
        needs: flags in /proc/cpuinfo.
    """

    march: str
    capability: str
    onednn: str
    mkl: str
    needs: tuple[str, ...]


_AVX512 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
# AMX, where there is any, is what runs without a level.
LEVELS = {
    "default": Level("x86-64-v2", "default", "SSE41", "SSE4_2", ("sse4_2",)),
    "avx2": Level("x86-64-v3", "avx2", "AVX2", "AVX2", ("avx2", "fma", "bmi2")),
    "avx512": Level("x86-64-v4", "avx512", "AVX512_CORE", "AVX512", _AVX512),
    "avx512_bf16": Level(
        "x86-64-v4", "avx512", "AVX512_CORE_BF16", "AVX512", (*_AVX512, "avx512_bf16")
    ),
}


def environment(name: str | None) -> dict[str, str]:
    """What has to be set for a level before torch is imported; nothing for None."""
    if name is None:
        return {}
    level = LEVELS[name]
    return {
        "ATEN_CPU_CAPABILITY": level.capability,
        "ONEDNN_MAX_CPU_ISA": level.onednn,
        "MKL_ENABLE_INSTRUCTIONS": level.mkl,
    }


def available(level: Level) -> bool:
    """Whether this CPU has what the level needs."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    return platform.machine() == "x86_64" and set(level.needs) <= set(flags)


def run(name: str, threads: int, arguments: list[str]) -> bool:
    """Run pytest under one level; True where it passed."""
    chosen = os.environ | {"TEST_CPU_LEVEL": name, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    start = time.perf_counter()
    passed = subprocess.run(command, env=chosen, check=False).returncode == 0
    seconds = time.perf_counter() - start
    _say(f"level {name}, {threads} thread(s): {'passed' if passed else 'FAILED'}, {seconds:.0f} s")
    return passed


def main() -> int:
    """Run the levels that this CPU has; 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--core", action="store_true", help="core tests only, one thread")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--threads", nargs="+", type=int, help=f"default: {THREADS}; --core: 1")
    parser.add_argument("--paths", nargs="+", default=NUMERIC, help=f"default: {NUMERIC}")
    given = parser.parse_args()
    marks = "core and not slow" if given.core else "not slow"
    failed = []
    for name in given.levels:
        if not available(LEVELS[name]):
            _say(f"level {name}: NOT RUN, this CPU lacks one of {LEVELS[name].needs}")
            continue
        for threads in given.threads or (THREADS[:1] if given.core else THREADS):
            if not run(name, threads, ["-m", marks, *given.paths]):
                failed.append(f"{name} on {threads} thread(s)")
    if failed:
        _say(f"failed: {', '.join(failed)}")
    return int(bool(failed))


def _say(text: str) -> None:
    sys.stdout.write(f"== {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
