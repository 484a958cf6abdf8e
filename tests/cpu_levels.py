"""The numeric tests as other CPUs run them: instruction sets of torch, oneDNN, MKL and our C++.

    python -m tests.cpu_levels --core        the most telling ones under three levels (make test)
    python -m tests.cpu_levels               all under every level, 1 and 2 threads (make matrix)
    TEST_CPU_LEVEL=avx2 pytest tests/quant   one level by hand

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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

NUMERIC = ("tests/model", "tests/quant", "tests/optim", "tests/parity")
# Of these, what `make test` has time for under every level: our C++, formats, and the whole model
# against its oracle.
CORE = (
    "tests/model/kernels",
    "tests/model/attention",
    "tests/model/test_generate.py::test_quantised_cache_matches_the_forward_with_its_casts",
    "tests/quant/test_formats.py",
    "tests/optim/test_newton_schulz.py",
    "tests/parity/test_oracle.py",
)
CORE_LEVELS = ("default", "avx2", "avx512")


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


def run(name: str, threads: int, arguments: Sequence[str]) -> bool:
    """Run pytest under one level; True where it passed."""
    chosen = os.environ | {"TEST_CPU_LEVEL": name, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "pytest", "-q", *arguments]
    start = time.perf_counter()
    done = subprocess.run(command, env=chosen, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        _say(done.stdout + done.stderr)
    verdict = "passed" if done.returncode == 0 else f"FAILED ({done.returncode})"
    last = (done.stdout.strip().splitlines() or [""])[-1]
    _say(f"== level {name}, {threads} thread(s): {verdict}, {last}, {seconds:.0f} s in all")
    return done.returncode == 0


def main() -> int:
    """Run the levels that this CPU has; 1 where a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--core", action="store_true", help="the most telling ones, on one thread")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, help="default: all; --core: three")
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1 and 2; --core: 1")
    parser.add_argument("--paths", nargs="+", help="default: all numeric tests")
    parser.add_argument("--jobs", type=int, default=2, help="at the same time")
    given = parser.parse_args()
    marks = "core and not slow" if given.core else "not slow"
    arguments = ["-m", marks, *(given.paths or (CORE if given.core else NUMERIC))]
    jobs = []
    for name in given.levels or (CORE_LEVELS if given.core else LEVELS):
        if available(LEVELS[name]):
            jobs += [(name, n) for n in given.threads or ((1,) if given.core else (1, 2))]
        else:
            _say(f"== level {name}: NOT RUN, this CPU lacks one of {LEVELS[name].needs}")
    with ThreadPoolExecutor(given.jobs) as pool:
        passed = list(pool.map(lambda job: run(*job, arguments), jobs))
    return int(not all(passed))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
