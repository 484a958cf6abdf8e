"""RoPE: golden frequencies of reference B.4, and rotation as complex multiplication in float64."""

import pytest
import torch

from model.config import ModelConfig, RopeScaling
from model.rope import apply_rope, rope_frequencies, rope_tables, yarn_frequencies

GOLDEN = {
    15: 3.635539e-3,
    16: 2.265625e-3,
    20: 2.969778e-4,
    24: 1.953125e-5,
    25: 5.372313e-6,
    31: 5.680529e-7,
}


@pytest.mark.core
def test_yarn_frequencies_match_golden_values():
    frequencies = yarn_frequencies(64, 160000.0, RopeScaling())
    for i, value in GOLDEN.items():
        assert frequencies[i].item() == pytest.approx(value, rel=1e-6)
    plain = yarn_frequencies(64, 160000.0, None)
    assert torch.equal(frequencies[:16], plain[:16])


def test_window_layers_have_their_own_base_and_no_yarn():
    config = ModelConfig(qk_rope_head_dim=16)
    window, compressed = (
        rope_frequencies(config, compressed=False),
        rope_frequencies(config, compressed=True),
    )
    exponents = torch.arange(0, 16, 2, dtype=torch.float64) / 16
    assert torch.allclose(window, 10000.0**-exponents)
    assert not torch.allclose(window, compressed)
    assert torch.allclose(
        rope_frequencies(config, compressed=True, yarn=False), 160000.0**-exponents
    )


@pytest.mark.core
def test_rotation_is_complex_multiplication_of_the_last_channels():
    positions = torch.tensor([[0, 3, 999_999]])
    frequencies = yarn_frequencies(8, 10000.0, None)
    cos, sin = rope_tables(positions, frequencies)
    x = torch.randn(1, 3, 2, 12)
    pairs = torch.view_as_complex(x[..., 4:].double().reshape(1, 3, 2, 4, 2))
    turn = torch.polar(torch.ones(1, 3, 4, dtype=torch.float64), positions[..., None] * frequencies)
    expected = torch.view_as_real(pairs * turn[:, :, None]).flatten(-2)
    out = apply_rope(x, cos, sin)
    assert torch.equal(out[..., :4], x[..., :4])
    assert torch.allclose(out[..., 4:].double(), expected, atol=1e-6)


def test_inverse_rotation_undoes_it():
    cos, sin = rope_tables(torch.arange(7)[None], yarn_frequencies(8, 10000.0, None))
    x = torch.randn(1, 7, 8)
    assert torch.allclose(apply_rope(apply_rope(x, cos, sin), cos, -sin), x, atol=1e-6)
