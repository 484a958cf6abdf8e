"""The build of the C++ kernels: one library per content, safe against races, loud when it fails."""

import ctypes
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from model.kernels import cpu_build, elementwise, elementwise_fast, mhc_ops
from model.kernels.cpu_build import KernelLibrary, kernel_library

SOURCE = """
#include "scale.h"
extern "C" void scale_f32(const float* x, long n, float* y, int threads) {
  for (long i = 0; i < n; ++i) y[i] = FACTOR * x[i] * threads;
}
extern "C" void scale_bf16(const float* x, long n, float* y, int threads) {}
"""


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """An own source folder and cache; no library loaded."""
    (tmp_path / "scale.cpp").write_text(SOURCE)
    (tmp_path / "scale.h").write_text("#pragma once\n")
    monkeypatch.setattr(cpu_build, "_SOURCES", tmp_path)
    monkeypatch.setattr(cpu_build, "_LIBRARIES", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def libraries(folder):
    return sorted((folder / "cache" / "v4_pretrain").glob("*.so"))


@pytest.mark.core
def test_build_runs_and_is_reused(sandbox, monkeypatch):
    library = kernel_library("scale.cpp", {"scale": "plpi"}, "FACTOR=3")
    x, y = torch.arange(4.0), torch.empty(4)
    library.call("scale", torch.float32, x, 4, y)
    assert torch.equal(y, 3 * x * torch.get_num_threads())
    monkeypatch.setattr(cpu_build, "_compile", None)  # a second build would fail
    assert kernel_library("scale.cpp", {"scale": "plpi"}, "FACTOR=3") is library
    cpu_build._LIBRARIES.clear()
    assert isinstance(kernel_library("scale.cpp", {"scale": "plpi"}, "FACTOR=3"), KernelLibrary)
    assert len(libraries(sandbox)) == 1


def test_anything_that_shapes_the_code_makes_a_new_library(sandbox):
    cpu_build._built("scale.cpp", ("FACTOR=3",))
    cpu_build._built("scale.cpp", ("FACTOR=4",))
    (sandbox / "scale.h").write_text("#pragma once\n// changed\n")
    cpu_build._built("scale.cpp", ("FACTOR=4",))
    assert len(libraries(sandbox)) == 3


def test_concurrent_builds_make_one_whole_library(sandbox, monkeypatch):
    built = []
    compile_once = cpu_build._compile
    monkeypatch.setattr(
        cpu_build, "_compile", lambda *a: (built.append(a), compile_once(*a)) and None
    )
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: cpu_build._built("scale.cpp", ("FACTOR=5",)), range(4)))
    assert len(set(paths)) == len(built) == 1
    ctypes.CDLL(str(paths[0]))
    assert not [p for p in paths[0].parent.iterdir() if p.is_dir()], "scratch folder left behind"


def test_compiler_errors_are_shown_and_leave_nothing(sandbox):
    (sandbox / "scale.cpp").write_text("int broken(")
    with pytest.raises(RuntimeError, match=r"(?s)g\+\+ .*failed:.*scale\.cpp:1"):
        kernel_library("scale.cpp", {"scale": "plpi"})
    assert libraries(sandbox) == []


def test_cache_falls_back_to_a_private_temporary_folder(sandbox, monkeypatch):
    (sandbox / "cache").write_text("a file where the folder should be")
    monkeypatch.setattr(cpu_build.tempfile, "gettempdir", lambda: str(sandbox))
    folder = cpu_build._cache_folder()
    assert folder.parent == sandbox
    assert folder.stat().st_mode & 0o077 == 0


def test_without_a_compiler_one_warning_and_torch(sandbox, monkeypatch, caplog):
    monkeypatch.setattr(cpu_build.shutil, "which", lambda name: None)
    cpu_build.compiler.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert kernel_library("scale.cpp", {"scale": "plpi"}) is None
            assert kernel_library("scale.cpp", {"scale": "plpi"}, "FACTOR=3") is None
            assert mhc_ops._compiled(4) is None
            x = torch.randn(3, 8)
            want = elementwise.rms_norm(x, None, 1e-6)
            assert torch.equal(elementwise_fast.rms_norm(x, None, 1e-6), want)
        assert len(caplog.records) == 1
        assert "g++ not found" in caplog.text
    finally:
        cpu_build.compiler.cache_clear()


def test_a_system_without_proc_runs_plain_torch(sandbox, monkeypatch, caplog):
    """As macOS does, where g++ may well be there."""
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(cpu_build, "_fingerprint", None)
    cpu_build.compiler.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert kernel_library("scale.cpp", {"scale": "plpi"}) is None
        assert "CPU kernels need Linux, not darwin" in caplog.text
    finally:
        cpu_build.compiler.cache_clear()


def test_kernels_share_the_openmp_pool_of_torch():
    assert mhc_ops._compiled(4) is not None
    maps = Path("/proc/self/maps").read_text().splitlines()
    runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libomp" in line}
    assert len(runtimes) == 1, runtimes
