"""The official quantised layout: written, decoded by an independent reader, equal to what ran.

The decoder below is numpy on raw bytes, written from the published definition; it shares nothing
with ``quant``. All comparisons are bitwise.
"""

import numpy as np
import pytest
import torch

from model.state_dict import load_official, to_official
from quant import importing
from quant.apply import apply_quant
from quant.config import QuantConfig, Recipe
from quant.export import Stored, quantise_official, stored_as
from quant.linear import QuantOp
from quant.probe import QuantProbe
from tests.quant.quant_models import run_step, tiny_ids, tiny_model

DEPLOYED = QuantConfig(recipe=Recipe.deployed)
FP4_VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def values_of(stored):
    """Name -> value of official tensors, scales taken in."""
    tensors = dict(stored)
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith(".scale")}
    values = {}
    for name, codes in tensors.items():
        scale = scales.pop(f"{name.removesuffix('.weight')}.scale", None)
        values[name] = codes if scale is None else importing.decode(name, codes, scale)
    assert not scales
    return values


def trained_model():
    """A model whose weights have moved under QAT."""
    model = tiny_model()
    apply_quant(model, DEPLOYED, QuantProbe())
    run_step(model)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    return model


def decode(codes, scale):
    """Values from raw bytes, by numpy."""
    power = 2.0 ** (scale.view(torch.uint8).numpy().astype(np.float64) - 127)
    raw = codes.view(torch.uint8).numpy()
    if codes.dtype == torch.int8:
        nibbles = np.empty((raw.shape[0], 2 * raw.shape[1]), dtype=np.uint8)
        nibbles[:, 0::2], nibbles[:, 1::2] = raw & 15, raw >> 4
        values = np.array(FP4_VALUES)[nibbles & 7] * np.where(nibbles & 8, -1.0, 1.0)
        full = np.repeat(power, 32, axis=1)
    else:
        exponent, mantissa = (raw >> 3 & 15).astype(np.int64), (raw & 7).astype(np.float64)
        normal = np.ldexp(8 + mantissa, exponent - 10)  # (1 + m / 8) * 2 ** (e - 7)
        values = np.where(exponent == 0, mantissa * 2.0**-9, normal)
        values = values * np.where(raw & 128, -1.0, 1.0)
        full = np.repeat(np.repeat(power, 128, axis=0), 128, axis=1)
    return torch.from_numpy(values * full[: values.shape[0], : values.shape[1]]).float()


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@pytest.mark.core
def test_exported_weights_are_the_ones_that_the_forward_pass_uses():
    model = trained_model()
    stored = dict(quantise_official(to_official(model).items()))
    compared = 0
    for name, module in model.named_modules():
        if not isinstance(getattr(module, "op", None), QuantOp):
            continue
        # What the op multiplies by, in the pieces in which it is called.
        pieces = module.weight.chunk(getattr(module, "groups", 1))
        used = torch.cat([module.op.quantised_weight(w, torch.float32) for w in pieces])
        if used.dim() == 3:
            stem, leaf = name.rsplit(".", 1)
            names = [f"{stem}.{expert}.{leaf}" for expert in range(len(used))]
        else:
            names, used = [name], used[None]
        for official, values in zip(names, used, strict=True):
            decoded = decode(stored[f"{official}.weight"], stored[f"{official}.scale"])
            assert same_bits(decoded, values), official
            compared += 1
    assert compared == 4 * (4 * 3 + 3 + 5) + 1 + 2  # experts, shared, attention; indexer; MTP


def test_a_plain_model_on_the_decoded_experts_gives_the_same_logits():
    # The same claim from outside: no quantised op runs in the second model.
    config = QuantConfig(recipe=Recipe.fp4_qat, kv=False, indexer=False)
    model, plain = tiny_model(), tiny_model(seed=1)
    apply_quant(model, config, QuantProbe())
    official = to_official(model)
    stored = dict(quantise_official(official.items()))
    for name, codes in stored.items():
        if codes.dtype == torch.int8:
            official[name] = decode(codes, stored[name.removesuffix("weight") + "scale"])
    load_official(plain, official)
    assert torch.equal(plain.logits(tiny_ids()), model.logits(tiny_ids()))


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reimported_checkpoint_gives_the_same_logits_when_deployed(dtype):
    model, imported = trained_model(), tiny_model(seed=1)
    model.compute_dtype = imported.compute_dtype = dtype
    stored = quantise_official(to_official(model).items())
    load_official(imported, values_of(stored))
    apply_quant(imported, DEPLOYED, QuantProbe())
    ids = tiny_ids(3, 33, seed=5)
    assert torch.equal(imported.logits(ids), model.logits(ids))
    again = dict(quantise_official(to_official(imported).items()))
    values = values_of(again)
    for name, value in values_of(quantise_official(to_official(model).items())).items():
        assert torch.equal(value, values[name]), name


def test_indexer_queries_and_keys_are_equal_in_both():
    model, imported = trained_model(), tiny_model(seed=1)
    load_official(imported, values_of(quantise_official(to_official(model).items())))
    apply_quant(imported, DEPLOYED, QuantProbe())
    seen = []
    for one in (model, imported):
        kept = []
        for name in ("q_cast", "compressor.cast"):
            cast = one.get_submodule(f"layers.1.attn.indexer.{name}")
            cast.register_forward_hook(lambda m, i, o, kept=kept: kept.append(o.detach()))
        one.logits(tiny_ids())
        seen.append(kept)
    for ours, theirs in zip(*seen, strict=True):
        assert same_bits(ours, theirs)


@pytest.mark.core
def test_layout_is_the_released_one():
    stored = dict(quantise_official(to_official(tiny_model()).items()))
    expect = {
        "layers.1.ffn.experts.3.w1.weight": (torch.int8, (40, 24)),
        "layers.1.ffn.experts.3.w1.scale": (torch.float8_e8m0fnu, (40, 2)),
        "mtp.0.ffn.experts.0.w2.weight": (torch.int8, (48, 20)),
        "layers.0.attn.wo_a.weight": (torch.float8_e4m3fn, (192, 160)),
        "layers.0.attn.wo_a.scale": (torch.float8_e8m0fnu, (2, 2)),
        "mtp.0.e_proj.scale": (torch.float8_e8m0fnu, (1, 1)),
        "layers.1.attn.indexer.wq_b.weight": (torch.float8_e4m3fn, (512, 40)),
        "layers.1.attn.indexer.weights_proj.weight": (torch.bfloat16, (16, 48)),
        "layers.1.attn.compressor.ape": (torch.float32, (4, 160)),
        "layers.1.attn.compressor.norm.weight": (torch.bfloat16, (80,)),
        "embed.weight": (torch.bfloat16, (96, 48)),
        "hc_head_fn": (torch.float32, (4, 192)),
        "layers.0.ffn.gate.tid2eid": (torch.int64, (96, 2)),
        "layers.1.ffn.gate.bias": (torch.float32, (4,)),
    }
    for name, (dtype, shape) in expect.items():
        assert (stored[name].dtype, tuple(stored[name].shape)) == (dtype, shape), name
    count = {Stored.fp4: 2, Stored.fp8: 2}
    official = to_official(tiny_model())
    assert len(stored) == sum(count.get(stored_as(name), 1) for name in official)


def test_fp8_experts_as_in_the_base_releases_read_back_too():
    model = tiny_model()
    stored = dict(quantise_official(to_official(model).items(), Stored.fp8))
    name = "layers.0.ffn.experts.0.w1"
    assert stored[f"{name}.weight"].dtype == torch.float8_e4m3fn
    read = values_of(stored)
    assert same_bits(
        read[f"{name}.weight"], decode(stored[f"{name}.weight"], stored[f"{name}.scale"])
    )


def test_reader_agrees_with_the_independent_decoder_on_every_code():
    packed = torch.arange(256, dtype=torch.uint8).view(torch.int8).reshape(16, 16)
    scale4 = torch.arange(1, 17, dtype=torch.uint8)[:, None] * 15
    every8 = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    every8[every8 % 128 == 127] = 0
    stored = {
        "a.weight": packed,
        "a.scale": scale4.view(torch.float8_e8m0fnu),
        "b.scale": torch.tensor([[120]], dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "b.weight": every8.view(torch.float8_e4m3fn),
    }
    read = values_of(stored)
    for stem in ("a", "b"):
        assert same_bits(
            read[f"{stem}.weight"], decode(stored[f"{stem}.weight"], stored[f"{stem}.scale"])
        )


def test_what_does_not_fit_is_named():
    e8m0 = torch.ones(2, 1).to(torch.float8_e8m0fnu)
    codes = torch.zeros(2, 16, dtype=torch.int8)
    for weight, scale, says in (
        (
            torch.zeros(2, 16),
            e8m0,
            r"a\.weight has dtype torch.float32",
        ),
        (codes, e8m0.float(), r"a\.scale has dtype torch.float32"),
        (codes.to(torch.float8_e5m2), e8m0, r"has dtype .*e5m2"),
        (
            torch.zeros(3, 16, dtype=torch.int8),
            e8m0,
            r"a\.scale has shape .*needs \(3, 1\)",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            importing.decode("a", weight, scale)
    with pytest.raises(ValueError, match="matches 0 lines"):
        list(quantise_official([("layers.0.attn.wq.weight", torch.ones(2, 2))]))
    with pytest.raises(ValueError, match=r"wq_a\.weight holds NaN or Inf"):
        list(quantise_official([("layers.0.attn.wq_a.weight", torch.full((2, 2), torch.inf))]))
