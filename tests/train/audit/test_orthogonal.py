"""The largest singular value tells five steps of one triple from the paper's eight and two."""

import pytest
import torch

from optim.config import MuonConfig, NewtonSchulzIterations
from optim.muon import expand
from optim.newton_schulz import newton_schulz
from train.audit.orthogonal import largest_singular_value, most_asked_for
from train.audit.updates import _LOUD

FIVE = MuonConfig(newton_schulz=[NewtonSchulzIterations(5, 3.4445, -4.7750, 2.0315)])


def test_largest_singular_value_is_that_of_the_decomposition():
    matrix = torch.randn(48, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = float(torch.linalg.svdvals(matrix)[0])
    for update in (matrix, matrix.T):
        assert expected * 0.99 < largest_singular_value(update) <= expected * (1 + 1e-12)
    assert largest_singular_value(torch.zeros(3, 5)) == 0


def test_most_is_what_the_iterations_give():
    assert most_asked_for(MuonConfig()) == pytest.approx(1.002, abs=1e-3)
    assert most_asked_for(FIVE) == pytest.approx(1.202, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (16, 128), (128, 12)])
def test_five_steps_are_told_from_ten_of_any_spectrum(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    for falls in (0.0, 1.0, 3.0):
        fall = torch.arange(1, shape[1] + 1) ** -falls
        matrices = torch.randn(20, *shape, generator=generator) * fall
        most = {
            name: [
                largest_singular_value(update.float())
                for update in newton_schulz(matrices.clone(), expand(config), dtype)
            ]
            for name, config in (("ten", MuonConfig()), ("five", FIVE))
        }
        assert max(most["ten"]) < most_asked_for(MuonConfig()) + _LOUD / 2
        if falls < 3:  # else one singular value has all of the norm, and most come out small
            assert max(most["five"]) > most_asked_for(MuonConfig()) + _LOUD
