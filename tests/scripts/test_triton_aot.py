"""Ahead-of-time compilation: a few kernels for three kinds of GPU, and what counts as a fault."""

import os
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest

from model.kernels.triton.launch import tile_of
from scripts.benchmarks.triton_aot import (
    KERNELS,
    SHARED,
    Compiled,
    expected_mma,
    judge,
    markdown,
    replications,
    shipped_kernels,
    tile_text,
)
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
    words = ("--arch", "sm_86", "sm_90", "gfx942", "--kernel", "cross_entropy")
    done = run(*words, "--markdown", table)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 compiled, 0 with faults" in done.stdout
    assert table.read_text().count("| cross_entropy ") == 9


def test_types_and_shapes_of_every_shipped_kernel_pass_the_compiler():
    """The interpreter takes a variable that changes its type, for one; no GPU does."""
    done = run("--arch", "sm_90", "--parse")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert " parsed, 0 with faults" in done.stdout
    for module in MODULES:
        assert f"\n{module} " in "\n" + done.stdout


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
    ("found", "expected", "told"),
    [
        ({"shared": 101_377}, "", ["shared 101377 > 101376"]),
        ({"shared": 101_376}, "", []),
        ({"tmem": 513}, "", ["tmem 513 > 512"]),
        ({"spilled": 4}, "", ["spills 4 bytes without a stated reason"]),
        ({"replicated": 2, "mma": {"mma.sync": 1}}, "mma.sync",
         ["warps compute one product 2 times without a stated reason"]),
        ({}, "mma.sync", ["no mma.sync instruction"]),
        ({"mma": {"mma.sync": 1}}, "wgmma", ["no wgmma instruction"]),
        ({"replicated": 1, "mma": {"mma.sync": 1}}, "mma.sync", []),
    ],
)  # fmt: skip
def test_faults(found, expected, told):
    line = Compiled("m", "n", "sm_86", "", **found)
    judge(line, PLAIN, expected)
    assert line.faults == told


def test_what_has_a_stated_reason_passes_and_is_told():
    stated = SimpleNamespace(spills={"sm_86": "why"}, replicates={"sm_86": "because"})
    for arch, faulty in (("sm_86", 0), ("sm_89", 2)):
        line = Compiled("m", "n", arch, "", spilled=8, replicated=2)
        judge(line, stated)
        assert (len(line.faults), len(line.passed)) == (faulty, 2 - faulty)
        assert ("because" in markdown([line], "")) == (arch == "sm_86")


def test_the_instruction_that_is_expected_follows_the_rows_of_the_product():
    products = {
        rows: f"%a = tt.dot %b, %c, %d : tensor<{rows}x16xbf16> * tensor<16x64xbf16>"
        f" -> tensor<{rows}x64xf32>" for rows in (16, 64)
    }  # fmt: skip
    for arch, small, large in (
        ("sm_86", "mma.sync", "mma.sync"), ("sm_90", "mma.sync", "wgmma"),
        ("sm_100", "mma.sync", "tcgen05"), ("gfx942", "v_mfma", "v_mfma"),
    ):  # fmt: skip
        assert expected_mma(products[16], arch) == small
        assert expected_mma(products[64], arch) == large
    assert expected_mma("%a = tt.load %b", "sm_90") == ""


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


def test_the_committed_table_has_a_line_of_every_shipped_tile_and_a_reason_for_every_spill():
    """A tile, a kernel or an architecture that changed is missing until it was compiled anew."""
    text = (ROOT / "docs/bench/triton_aot.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines() if line.startswith("| ")][2:]  # fmt: skip
    wanted = {
        (f"{module} {shipped.name}", arch, tile_text(tile_of(shipped.tiles, arch)))
        for module, shipped in shipped_kernels([])
        for arch in SHARED
    }
    assert {tuple(row[:3]) for row in rows} == wanted
    assert len(rows) == len(wanted)
    spills = [row for row in rows if int(row[6])]
    assert all(f"spills {row[6]} bytes: " in row[-1] for row in spills)
    assert "without a stated reason" not in text
