"""Plain multi-head attention against a loop in float64, and what its models cannot do.

fp32 against float64 on sums of up to 32 products: 1e-6 relative Frobenius is ten times what ordered
fp32 sums of that length lose.
"""

import math

import pytest
import torch

from model.attention.multi_head import MultiHeadAttention, visible
from model.config import LayerKind, Residual
from model.context import build_context
from model.errors import ConfigError
from model.generate import Decoder
from model.parameter_counts import parameter_shapes
from model.transformer import DeepSeekV4
from tests.parity.configs import tiny_config
from train.config.command_line import compose_run
from train.errors import UserError

pytestmark = pytest.mark.core
PLAIN = {
    "layer_kinds": [LayerKind.mha] * 2, "compress_ratios": [0, 0], "num_hidden_layers": 2,
    "residual": Residual.plain, "qk_rope_head_dim": 16, "num_hash_layers": 0,
}  # fmt: skip


def by_hand(layer, u_BTD, cos, sin, documents_BT):
    """Loops over rows, heads, tokens and earlier tokens; float64."""
    heads, dim = layer.heads, layer.head_dim
    wq, wk, wv, wo = (getattr(layer, n).weight.double() for n in ("wq", "wk", "wv", "wo"))
    u_BTD, out = u_BTD.double(), torch.zeros_like(u_BTD, dtype=torch.float64)

    def turned(x, b, t):
        """Pairs of neighbouring channels, the last ones of the head."""
        x, R = x.clone(), cos.shape[-1]
        real, imaginary = x[-2 * R :: 2].clone(), x[dim - 2 * R + 1 :: 2].clone()
        c, s = cos[b, t].double(), sin[b, t].double()
        x[-2 * R :: 2], x[dim - 2 * R + 1 :: 2] = real * c - imaginary * s, real * s + imaginary * c
        return x

    for b in range(u_BTD.shape[0]):
        for t in range(u_BTD.shape[1]):
            values = []
            for h in range(heads):
                part = slice(h * dim, (h + 1) * dim)
                query = turned(wq[part] @ u_BTD[b, t], b, t)
                seen = [j for j in range(t + 1) if documents_BT[b, j] == documents_BT[b, t]]
                scores = torch.stack(
                    [query @ turned(wk[part] @ u_BTD[b, j], b, j) / math.sqrt(dim) for j in seen]
                )
                v = torch.stack([wv[part] @ u_BTD[b, j] for j in seen])
                values.append(scores.softmax(0) @ v)
            out[b, t] = wo @ torch.cat(values)
    return out


def test_attention_equals_a_loop_in_float64():
    torch.manual_seed(0)
    config = tiny_config(**PLAIN)
    layer = MultiHeadAttention(config, LayerKind.mha, "layers.0.attn", 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    documents_BT = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    u_BTD = torch.randn(2, 12, config.hidden_size)
    context = build_context(config, documents_BT, yarn=False)
    with torch.no_grad():
        got, aux = layer(u_BTD, context)
        expected = by_hand(layer, u_BTD, *context.window_rope, documents_BT)
    assert float((got - expected).norm() / expected.norm()) < 1e-6
    assert aux == {}


def test_padding_sees_itself_alone():
    """So that no row of the softmax is empty."""
    start = torch.tensor([[0, 0, 3, 4]])  # two tokens, then padding: one past the token
    assert visible(start)[0].int().tolist() == [
        [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1],
    ]  # fmt: skip


def test_closed_form_of_the_parameters_is_what_is_built():
    config = tiny_config(**PLAIN)
    with torch.device("meta"):
        model = DeepSeekV4(config)
    built = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert built == parameter_shapes(config)


def test_text_is_refused_before_the_run_and_by_the_decoder():
    layers = [
        "model.layer_kinds=[mha,mha,swa,swa,swa,swa]",
        "model.compress_ratios=[0,0,0,0,0,0,0]",
    ]
    with pytest.raises(UserError, match=r"sample\.tokens=120 asks for text"):
        compose_run(layers)
    assert compose_run([*layers, "sample.tokens=0"]).model.kind(0) is LayerKind.mha
    with torch.device("meta"):
        model = DeepSeekV4(tiny_config(**PLAIN))
    with pytest.raises(ConfigError, match="layer kind mha has no cache"):
        Decoder(model, 1, 8)
