"""Ahead-of-time compilation: a few kernels for three kinds of GPU, and what counts as a fault."""

import os
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest

from scripts.benchmarks.triton_aot import KERNELS, Compiled, faults, replications
from train.errors import ROOT

MODULES = sorted(p.stem for p in KERNELS.glob("*.py") if "\nSHIPPED" in p.read_text())
PLAIN = SimpleNamespace(spills={}, replicates={})
# Of sm_90: 8 warps along rows of 64, where an instruction has 16: the product is computed twice.
TTGIR = """
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 64, 16]}>
%a = ttng.warp_group_dot %q, %k, %c : !ttg.memdesc<64x512xbf16, #s> * !ttg.memdesc<512x64xbf16, #s> -> tensor<64x64xf32, #mma>
%b = ttng.warp_group_dot %p, %v, %c : !ttg.memdesc<64x64xbf16, #s> * !ttg.memdesc<64x512xbf16, #s> -> tensor<128x512xf32, #mma>
"""  # noqa: E501


def run(*words, **more):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "scripts/bench.py", "triton_aot", *words],
        cwd=ROOT, env={**environment, **more}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_kernels_compile_for_three_kinds_of_gpu(tmp_path):
    table = tmp_path / "table.md"
    done = run("--arch", "sm_86", "sm_90", "gfx942", "--kernel", "swiglu", "--markdown", table)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 compiled, 0 with faults" in done.stdout
    assert table.read_text().count("| swiglu ") == 9


@pytest.mark.parametrize(
    ("words", "environment", "told"),
    [(["--kernel", "nope"], {}, "--kernel nope is none of"),
     ([], {"TRITON_INTERPRET": "1"}, "unset it")],
)  # fmt: skip
def test_what_cannot_be_compiled_is_one_line(words, environment, told):
    done = run(*words, **environment)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("found", "products", "told"),
    [
        ({"shared": 101_377}, False, ["shared 101377 > 101376"]),
        ({"shared": 101_376}, False, []),
        ({"tmem": 513}, False, ["tmem 513 > 512"]),
        ({"spilled": 4}, False, ["spills 4 bytes without a stated reason"]),
        ({"replicated": 2, "mma": {"mma.sync": 1}}, True, ["warps compute one product 2 times"]),
        ({}, True, ["no tensor core instruction"]),
        ({"replicated": 1, "mma": {"mma.sync": 1}}, True, []),
    ],
)
def test_faults(found, products, told):
    assert faults(Compiled("m", "n", "sm_86", "", **found), PLAIN, products) == told


def test_a_stated_reason_lets_a_spill_pass():
    stated = SimpleNamespace(spills={"sm_86": "why"}, replicates={"sm_86": "why"})
    line = Compiled("m", "n", "sm_86", "", spilled=8, replicated=2)
    assert faults(line, stated, False) == []
    line.arch = "sm_89"
    assert len(faults(line, stated, False)) == 2


def test_repeated_products_are_counted():
    assert replications(TTGIR) == [2, 1]


@pytest.mark.parametrize("module", MODULES)
def test_shipped_lines_name_every_argument(module):
    lines = import_module(f"model.kernels.triton.{module}").SHIPPED
    assert len({line.name for line in lines}) == len(lines)
    for line in lines:
        for tile in line.tiles.values():
            given = {**line.types, **line.constants, **tile.sizes}
            assert set(line.kernel.arg_names) <= set(given), line.name
