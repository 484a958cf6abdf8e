"""Symmetric products of which half is computed, alone and inside Newton-Schulz and Muon.

A product is held to the yardstick of ``checks.check``, Newton-Schulz, which amplifies rounding, to
the bound of ``tests/optim/test_newton_schulz.py``.
"""

import pytest
import torch

from model.config import Kernels
from model.kernels.select import select
from model.kernels.symmetric import symmetric_product as whole
from model.kernels.triton.launch import counted
from optim.config import MatmulDtype, MuonConfig
from optim.muon import Muon, MuonEntry, expand
from optim.newton_schulz import newton_schulz, newton_schulz_reference
from tests.helpers import relative
from tests.model.kernels.triton.checks import ROUNDING, distance, poisoned, shuffled

half = select("symmetric_product", Kernels.triton)


def stacked(count, rows, cols, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(count, rows, cols, generator=generator).to(dtype) * cols**-0.5


def products(form, batch):
    """x x^T (of the short side), then ``b g + c g g`` of it."""
    x = batch.mT if batch.shape[1] > batch.shape[2] else batch
    gram, poly = (x.new_empty(len(x), x.shape[1], x.shape[1]) for _ in range(2))
    form(x, x.mT, gram)
    kept = gram.clone()
    form(gram, gram, poly, gram, -4.775, 2.0315)
    assert torch.equal(gram, kept)
    return [gram, poly]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("count", "rows", "cols"), [(1, 1, 5), (3, 37, 21), (2, 21, 37), (2, 16, 40), (1, 33, 33)]
)
def test_products_are_those_of_float64_and_symmetric(count, rows, cols, dtype):
    batch = stacked(count, rows, cols, dtype)
    exact, plain = products(whole, batch.double()), products(whole, batch)
    runs = []
    for seed in (0, 1):
        with poisoned(), shuffled(seed):
            runs.append(products(half, batch))
    for ours, again, truth, eager in zip(*runs, exact, plain, strict=True):
        assert torch.equal(ours, again)
        assert torch.equal(ours, ours.mT)
        assert ours.dtype == dtype
        # poly is of a gram that was rounded itself
        assert distance(ours, truth) <= 2 * distance(eager, truth) + ROUNDING[dtype]


def test_what_is_not_finite_reaches_its_row_and_column_only():
    batch = stacked(1, 20, 24)
    batch[0, 18, 3] = float("nan")
    out = batch.new_empty(1, 20, 20)
    half(batch, batch.mT, out)
    out = out[0]
    assert out[18].isnan().all()
    assert out[:, 18].isnan().all()
    assert int(out.isnan().sum()) == 2 * 20 - 1


@pytest.mark.parametrize("shape", [(2, 18, 35), (2, 35, 18), (1, 20, 20)])
def test_newton_schulz_is_that_of_float64(shape):
    stages, batch = expand(MuonConfig()), stacked(*shape)
    exact = torch.stack([newton_schulz_reference(m, stages) for m in batch.double()])
    ours = newton_schulz(batch, stages, torch.float32, half)
    assert relative(ours, exact) < 5e-5
    # bf16 for its logic: the interpreter truncates
    logic = newton_schulz(batch, stages[-2:], torch.bfloat16, half)
    assert relative(logic, newton_schulz(batch, stages[-2:], torch.float32)) < 0.1


def test_muon_forms_its_products_by_the_table():
    """Stacked experts and a matrix of their shape; two launches an iteration for each bucket."""
    weights = [stacked(2, 12, 20), stacked(1, 12, 20)[0]]
    moved = {}
    for kernels in (Kernels.torch, Kernels.triton):
        parameters = [torch.nn.Parameter(w.clone()) for w in weights]
        for n, parameter in enumerate(parameters):
            parameter.grad = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(n)
            )
        entries = [MuonEntry(str(n), p, 0.1, num_matrices=2 - n) for n, p in enumerate(parameters)]
        product = select("symmetric_product", kernels)
        muon = Muon(entries, MuonConfig(dtype=MatmulDtype.fp32), torch.float32, product=product)
        with counted() as launches:
            muon.step(0.02, ["0", "1"])
        assert launches["symmetric_tiles"] == (20 if kernels is Kernels.triton else 0)
        moved[kernels] = torch.cat(
            [(p.detach() - w).flatten() for p, w in zip(parameters, weights, strict=True)]
        )
    assert relative(moved[Kernels.triton], moved[Kernels.torch]) < 1e-4  # as in test_newton_schulz
