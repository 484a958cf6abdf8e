"""However many threads OpenMP really gives, the kernels' bits are those of the number asked for.

``OMP_THREAD_LIMIT``, ``OMP_DYNAMIC`` and a call from inside another team all give fewer threads
than ``torch.get_num_threads()`` says; sums over a team that was not there once read memory that
nobody had written. Rows are long enough for three chunks of queries and two tiles of tokens.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.kernels import cpu_build
from tests.helpers import ROOT
from tests.model.kernels.op_cases import cases, fast, run

COMPILED = (
    "attention",
    "index_topk",
    "rms_norm",
    "swiglu",
    "rope",
    "mhc_pre",
    "mhc_merge",
    "mhc_head",
)


def everything() -> dict[str, torch.Tensor]:
    """Results and gradients of all that is compiled."""
    found = {}
    table = cases(copies=4)
    chosen = [(name, case) for name in COMPILED for case in table[name]]
    for n, (name, case) in enumerate([*chosen, ("indexer_loss", table["indexer_loss"][1])]):
        for dtype in (torch.float32, torch.bfloat16):
            rounded = {"q", "kv", "entries", "x", "y", "qi", "ki", "gate", "up"}
            inputs = {k: t.to(dtype) if k in rounded else t for k, t in case.inputs.items()}
            results = run(case, fast, inputs)
            found |= {f"{n} {name} {dtype} {k}": t for k, t in results.items()}
    return found


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.core
@pytest.mark.parametrize("count", [2, 3])
def test_a_team_of_one_gives_the_bits_of_the_team_asked_for(count, threads):
    """No region may be parallel at level 0, so every team has one thread, as in a nested call."""
    threads(count)
    openmp = ctypes.CDLL(cpu_build._openmp_library())
    levels = openmp.omp_get_max_active_levels()
    whole = everything()
    try:
        openmp.omp_set_max_active_levels(0)
        alone = everything()
    finally:
        openmp.omp_set_max_active_levels(levels)
    equal(whole, alone)


@pytest.mark.core
def test_other_numbers_of_threads_change_the_order_of_sums_only(threads):
    threads(1)
    one = everything()
    for count in (2, 3):
        threads(count)
        for name, tensor in everything().items():
            assert torch.allclose(
                tensor.double(), one[name].double(), rtol=2e-2 if "bf" in name else 1e-5, atol=1e-5
            ), name


@pytest.mark.core
def test_a_limited_and_dynamic_team_gives_the_bits_of_the_team_asked_for(tmp_path, threads):
    threads(2)
    whole = everything()
    code = (
        "import sys, tests.conftest, torch; from tests.model.kernels.test_teams import everything;"
        "assert torch.get_num_threads() == 2; torch.save(everything(), sys.argv[1])"
    )
    limits = {"OMP_THREAD_LIMIT": "1", "OMP_DYNAMIC": "true", "OMP_NUM_THREADS": "2"}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "limited.pt")],
        cwd=ROOT, env=os.environ | limits, check=True,
    )  # fmt: skip
    equal(whole, torch.load(tmp_path / "limited.pt"))


def test_no_kernel_asks_who_or_how_many_the_threads_are():
    """Work is split by the number asked for (``Parts`` in cpu/vector.h), never by the team."""
    for source in Path(cpu_build.__file__).parent.glob("cpu/*"):
        assert not re.search(r"omp_get|<omp\.h>|threadprivate|reduction\(", source.read_text()), (
            source
        )
