"""Compiles a C++ source of ``model/kernels/cpu`` once per machine and loads it with ctypes.

The sources use a plain C interface and no torch headers, so a build takes 2-3 s. The library lies
in the user's cache folder under a hash of everything that shapes it: sources, flags, compiler, CPU
and OpenMP runtime. It is linked to the OpenMP runtime that torch has already loaded, so that one
pool of threads serves both.

The code is compiled for the CPU at hand (:data:`NATIVE`). :func:`set_target` names another one that
this CPU can run, say ``x86-64-v3`` (AVX2): that is how the tests run what other machines run
(``tests/cpu_levels.py``).
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from model.kernels.ran import started

logger = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent / "cpu"
_COMPILER = "g++"
NATIVE = "native"  # g++'s name of the CPU it runs on
# No -ffast-math: a NaN must stay a NaN, and sums keep the order in which they are written.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-mtune=generic",  # gcc 12 schedules 512-bit code badly for CPUs newer than itself
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
)


# Letters of a C signature; a pointer takes a contiguous tensor of the right dtype, or None.
_C_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_long, "f": ctypes.c_float}
_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


class KernelLibrary:
    """The exported functions of one library, each in a version per dtype of its main tensors.

    Args:
        library: the loaded file; exports ``<name>_f32`` and ``<name>_bf16``.
        signatures: name -> one letter per argument; the last one is the number of threads.
    """

    def __init__(self, library: ctypes.CDLL, signatures: Mapping[str, str]) -> None:
        self._functions = {}
        for name, letters in signatures.items():
            for dtype, suffix in _SUFFIX.items():
                function = library[f"{name}_{suffix}"]
                function.argtypes = [_C_TYPES[letter] for letter in letters]
                function.restype = None
                self._functions[name, dtype] = function

    def call(self, name: str, dtype: torch.dtype, *arguments: Tensor | float | None) -> None:
        """Run ``name`` on torch's number of threads; tensors go in by their address."""
        started(name)
        raw = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        self._functions[name, dtype](*raw, torch.get_num_threads())


_LIBRARIES: dict[tuple[str, ...], KernelLibrary | None] = {}
_target = NATIVE


def set_target(march: str = NATIVE) -> None:
    """Compile for ``march`` from the next call on.

    Args:
        march: a value of g++'s ``-march`` that this CPU can run.
    """
    global _target
    _target = march


def kernel_library(
    source: str, signatures: Mapping[str, str], *defines: str
) -> KernelLibrary | None:
    """Return the library of ``cpu/<source>`` built with ``-D<define>``; it stays loaded.

    None where there is no compiler, which is said once, as a warning.

    Raises:
        RuntimeError: the compiler failed; holds its output.
    """
    key = (_target, source, *defines)
    if key not in _LIBRARIES:
        path = _built(source, defines) if compiler() else None
        _LIBRARIES[key] = path and KernelLibrary(ctypes.CDLL(str(path)), signatures)
    return _LIBRARIES[key]


def _built(source: str, defines: tuple[str, ...]) -> Path:
    folder = _cache_folder()
    library = folder / f"{Path(source).stem}-{_fingerprint(source, defines)}.so"
    if not library.exists():
        with _lock(folder / f"{library.stem}.lock"):
            if not library.exists():
                _compile(source, defines, library)
    return library


@functools.cache
def compiler() -> str | None:
    """Path of the C++ compiler; None (and one warning) where there is none, or no Linux.

    What is compiled depends on the CPU and on torch's OpenMP runtime, which ``/proc`` tells.
    """
    if sys.platform != "linux":
        logger.warning("CPU kernels need Linux, not %s: plain torch runs, slower", sys.platform)
        return None
    path = shutil.which(_COMPILER)
    if path is None:
        logger.warning("%s not found: CPU kernels run in plain torch, which is slower", _COMPILER)
    return path


def _compile(source: str, defines: tuple[str, ...], library: Path) -> None:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built, objects = Path(scratch) / library.name, Path(scratch) / "kernel.o"
        switches = [f"-D{define}" for define in defines]
        _run([_COMPILER, *_flags(), *switches, "-c", str(_SOURCES / source), "-o", str(objects)])
        # Linking without -fopenmp keeps the system's runtime out beside torch's.
        _run([_COMPILER, "-shared", str(objects), "-o", str(built), _openmp_library() or "-lgomp"])
        os.replace(built, library)
    logger.info("built %s in %.1f s", library, time.perf_counter() - start)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")


def _flags() -> list[str]:
    return [*_FLAGS, f"-march={_target}"]


def _fingerprint(source: str, defines: tuple[str, ...]) -> str:
    version = subprocess.run(
        [_COMPILER, "-dumpfullversion", "-dumpmachine"], capture_output=True, text=True, check=True
    ).stdout
    parts = [source, *defines, *_flags(), version, _cpu(), str(_openmp_library())]
    parts += [path.read_text() for path in [*sorted(_SOURCES.glob("*.h")), _SOURCES / source]]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """What -march=native depends on: model and instruction sets of the first core."""
    names = ("model name", "flags", "cpu family", "model", "Features", "CPU part")
    core = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    return "\n".join(line for line in core.splitlines() if line.split("\t")[0].strip() in names)


def _openmp_library() -> str | None:
    """Path of the OpenMP runtime in this process (torch brings it), or None."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith("libgomp"):
            return path
    return None


def _cache_folder() -> Path:
    """A private folder: the user's cache, or one under the temporary folder if that is not ours."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    choices = (home / "v4_pretrain", Path(tempfile.gettempdir()) / f"v4_pretrain-{os.getuid()}")
    for folder in choices:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    raise RuntimeError(f"no writable folder of this user for compiled kernels: tried {choices}")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process build while the others wait; the kernel drops the lock of a dead process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
