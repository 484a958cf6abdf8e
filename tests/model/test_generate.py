"""Decoding from the cache against the plain forward pass of the whole text.

Bounds: fp32 logits of order 1 within 1e-5 (only the order of sums differs). With quantised rows the
cache must hold exactly what the casts of the forward pass gave, so the same bound holds. There are
64 indexer heads, or equal scores would make top-k ambiguous (tests/parity). A greedy text is the
same iff each token is the argmax of one forward pass over the finished text.
"""

import collections
import itertools
import math
from dataclasses import replace

import pytest
import torch

from model.cache import CacheFormats, PlainRows
from model.config import LayerKind
from model.decoding_costs import kv_cache_bytes
from model.generate import Decoder, Sampling, choose, generate
from model.state_dict import load_official
from model.transformer import DeepSeekV4
from quant import formats
from quant.apply import apply_quant
from quant.cache_rows import FP4Rows, FP8Rows, released_formats
from quant.config import QuantConfig
from quant.formats import FP8_KV, MXFP4, fake_quant
from quant.probe import QuantProbe
from tests.parity.configs import tiny_config
from tests.parity.weights import random_weights

CLOSE = {"rtol": 0, "atol": 1e-5}
KINDS = {
    "all kinds": {},
    "window only": {"layer_kinds": [LayerKind.swa] * 2, "compress_ratios": [0, 0]},
    "dense": {"layer_kinds": [LayerKind.dense, LayerKind.csa], "compress_ratios": [0, 4]},
    "equal ratios": {"layer_kinds": [LayerKind.csa, LayerKind.hca], "compress_ratios": [4, 4]},
    "long blocks": {"layer_kinds": [LayerKind.csa, LayerKind.hca], "compress_ratios": [16, 32]},
    "plain residual": {"residual": "plain"},
}


def build(seed=1, **overrides):
    if "layer_kinds" in overrides:
        overrides["num_hidden_layers"] = len(overrides["layer_kinds"])
    config = tiny_config(**overrides)
    model = DeepSeekV4(config)
    load_official(model, random_weights(config, seed))
    return model.requires_grad_(False)


def draw(rows, tokens, vocab=64, seed=0):
    return torch.randint(0, vocab, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def stepwise(model, ids, prompt, formats=None, chunk=None):
    """Logits of every position: the prompt in chunks, then token by token."""
    decoder = Decoder(model, len(ids), ids.shape[1], formats)
    chunk = chunk or prompt
    cuts = [*range(0, prompt, chunk), *range(prompt, ids.shape[1]), ids.shape[1]]
    parts = [decoder.logits(ids[:, a:b]) for a, b in itertools.pairwise(cuts)]
    return torch.cat(parts, dim=1), decoder


@pytest.mark.core
@pytest.mark.parametrize("kernels", ["reference", "fast"])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_matches_the_full_forward(kind, kernels):
    model = build(kernels=kernels, **KINDS[kind])
    ids = draw(2, 75)
    whole = model.logits(ids)
    assert 0.3 < whole.abs().mean() < 3
    got, _ = stepwise(model, ids, prompt=13)
    torch.testing.assert_close(got, whole, **CLOSE)


def test_prompt_of_any_length_matches_the_full_forward():
    """Every length up to several windows (8) and blocks (4, 8), then two tokens one by one."""
    model, ids = build(kernels="fast"), draw(1, 42, seed=5)
    whole = model.logits(ids)  # causal, so the same for every cut
    for prompt in range(1, 41):
        got, _ = stepwise(model, ids[:, : prompt + 2], prompt)
        torch.testing.assert_close(got, whole[:, : prompt + 2], **CLOSE)


@pytest.mark.parametrize("chunk", [1, 5, 8, 11])
def test_prompt_in_chunks_matches_the_full_forward(chunk):
    model, ids = build(), draw(2, 45)
    torch.testing.assert_close(stepwise(model, ids, 40, chunk=chunk)[0], model.logits(ids), **CLOSE)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_text_beyond_64k_matches_the_full_forward():
    """A prompt of 66,000 tokens in chunks, then one by one, far beyond position 65,536.

    The indexer chooses all entries. With 64 of thousands, the last one chosen is within a rounding
    of the next about once in 50,000 choices; the two orders of sums then choose differently, each
    rightly, and what reads that token moves too.
    """
    model = build(kernels="fast", max_position_embeddings=131_072, index_topk=20_000)
    ids, prompt = draw(1, 66_030), 66_000
    got, decoder = stepwise(model, ids, prompt, chunk=4096)
    whole = model.logits(ids)
    torch.testing.assert_close(got, whole, **CLOSE)
    assert row_bytes(decoder.cache) == kv_cache_bytes(model.config, 66_030, 4)


def test_unequal_prompts_match_each_alone():
    model, lengths = build(), [1, 30, 12]
    ids = draw(3, 50)
    decoder = Decoder(model, 3, 50)
    got = [[] for _ in lengths]
    counts = lengths
    place = [0, 0, 0]
    for _ in range(6):  # the longest text advances alone now and then
        width = max(counts)
        rows = [ids[b, place[b] : place[b] + width] for b in range(3)]
        padded = torch.stack([torch.nn.functional.pad(r, (0, width - len(r))) for r in rows])
        logits = decoder.logits(padded, counts)
        for b, count in enumerate(counts):
            got[b].append(logits[b, :count])
            place[b] += count
        counts = [7, 0, 1] if counts[1] else [1, 3, 5]
    for b in range(3):
        alone = model.logits(ids[b : b + 1, : place[b]])[0]
        torch.testing.assert_close(torch.cat(got[b]), alone, **CLOSE)


@pytest.mark.parametrize("tail", [1, 2, 9])
def test_uncommitted_tokens_leave_no_trace(tail):
    """Drafts that are refused, over every edge: window 8, blocks of 4 and 8."""
    model, ids = build(), draw(1, 40)
    decoder, parts = Decoder(model, 1, 60), []
    wrong = (ids + 1) % 64
    for t in range(40):
        row = torch.cat((ids[:, t : t + 1], wrong[:, t : t + 1].repeat(1, tail)), dim=1)
        parts.append(decoder.project(decoder.read(row, [1 + tail]))[:, :1])
        decoder.commit([1])
    torch.testing.assert_close(torch.cat(parts, dim=1), model.logits(ids), **CLOSE)


def test_greedy_texts_are_those_of_the_full_forward():
    """300 tokens cross window, CSA and HCA edges many times; prompts of three lengths at once."""
    model = build(kernels="fast", seed=2, hc_sinkhorn_iters=5, max_position_embeddings=400)
    prompts = [draw(1, n, seed=n)[0].tolist() for n in (1, 9, 37)]
    texts = generate(model, prompts, Sampling(max_new_tokens=300, chunk_tokens=16))
    for prompt, text in zip(prompts, texts, strict=True):
        assert len(text) == 300
        whole = model.logits(torch.tensor([prompt + text]))[0]
        assert whole[len(prompt) - 1 : -1].argmax(-1).tolist() == text
    assert len(set(texts[2])) > 3, "not one token for ever"


# ---- bytes and formats --------------------------------------------------------------------------
def row_bytes(cache):
    """Bytes of window rows, entries and indexer keys."""
    layers = cache.layers.values()
    parts = [part for layer in layers for part in (layer.core, layer.keys) if part]
    stores = [*(layer.ring for layer in layers), *(part.entries for part in parts)]
    return sum(store.rows_BSX.nbytes for store in stores)


def open_bytes(cache):
    """Bytes of the open blocks."""
    parts = [c for layer in cache.layers.values() for c in (layer.core, layer.keys) if c]
    return sum(part.open_k_BRC.nbytes + part.open_z_BRC.nbytes for part in parts)


@pytest.mark.parametrize("context", [3, 8, 31, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_cache_bytes_equal_the_closed_form(kind, context):
    model = build(**KINDS[kind])
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        plain = PlainRows(dtype)
        decoder = Decoder(model, 2, context, CacheFormats(plain, plain))
        assert row_bytes(decoder.cache) == 2 * kv_cache_bytes(model.config, context, size)
    decoder = Decoder(model, 2, context, released_formats(model.config))
    assert row_bytes(decoder.cache) == 2 * kv_cache_bytes(model.config, context)


def test_open_blocks_do_not_grow():
    model = build()
    sizes = {open_bytes(Decoder(model, 1, n).cache) for n in (10, 1000)}
    # k and z in fp32: two hca layers of 8 x 16, two csa of 2 x 4 x 32, and so for the indexer
    assert sizes == {2 * 4 * 2 * (8 * 16 + 8 * 32 + 8 * 32)}


@pytest.fixture
def float64(monkeypatch):
    """Models compute in float64; the formats still get fp32, and their values come back widened."""
    to_fp32, as_rows, restore = torch.Tensor.float, formats._as_rows, formats._restore
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(
        torch.Tensor, "float", lambda x: x if x.dtype is torch.float64 else to_fp32(x)
    )
    monkeypatch.setattr(formats, "_as_rows", lambda x, fmt: as_rows(x.to(torch.float32), fmt))

    def widened(*arguments):
        out = restore(*arguments)
        return out.double() if out.dtype is torch.float32 else out

    monkeypatch.setattr(formats, "_restore", widened)
    yield
    torch.set_default_dtype(default)


@pytest.mark.core
def test_quantised_cache_matches_the_forward_with_its_casts(float64):
    """head_dim 80 = one block of 64 and a short one; the choice of entries runs on FP4 keys.

    The two add up in other orders. A value that lies within their difference of the edge between
    two codes may get either code, and every number behind it moves: in fp32 (1e-7 of the 0.06
    between edges) that is one of some 60,000 values, on one CPU or the other. In float64 (1e-16)
    it happens once in 10,000 machines, so all numbers have to agree to that precision.
    """
    model = build(head_dim=80, index_head_dim=64)
    model.compute_dtype = model.head_dtype = torch.float64
    ids = draw(2, 60)
    plain = model.logits(ids)
    apply_quant(model, QuantConfig(kv=True, indexer=True), QuantProbe())
    got, decoder = stepwise(model, ids, 10, released_formats(model.config))
    forward = model.logits(ids)
    assert got.dtype is torch.float64
    torch.testing.assert_close(got, forward, rtol=0, atol=1e-11)
    assert row_bytes(decoder.cache) == 2 * kv_cache_bytes(model.config, 60)
    assert ((plain - forward).abs() < 1e-5).double().mean() < 0.1, "the casts act"


def test_rows_hold_what_the_casts_give():
    x = torch.randn(7, 584, generator=torch.Generator().manual_seed(1)) * 3
    rows = FP8Rows(8)
    back = rows.decode(rows.encode(x), 584, torch.float32)
    assert torch.equal(back[:, :576], fake_quant(x[:, :576], FP8_KV))
    assert torch.equal(back[:, 576:], x[:, 576:].bfloat16().float())
    keys = FP4Rows()
    assert torch.equal(keys.decode(keys.encode(x), 584, torch.float32), fake_quant(x, MXFP4))
    assert rows.encode(x).shape[1] == rows.width(584) == 576 + 16 + 16
    assert keys.encode(x).shape[1] == keys.width(584) == 292 + 19
    assert FP8Rows(64).width(512) == 584
    assert FP4Rows().width(128) == 68


# ---- drafts --------------------------------------------------------------------------------------
class Passes:
    """Counts the passes over new tokens."""

    def __init__(self, monkeypatch):
        self.count = 0
        real = Decoder.read

        def read(decoder, *args):
            self.count += 1
            return real(decoder, *args)

        monkeypatch.setattr(Decoder, "read", read)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_change_no_text_and_save_passes(temperature, monkeypatch):
    """With two tokens in the vocabulary a draft is often right by chance."""
    model = build(vocab_size=2, num_nextn_predict_layers=1, seed=1, kernels="fast")
    prompts = [draw(1, n, 2, n)[0].tolist() for n in (1, 6, 21)]
    passes = Passes(monkeypatch)
    sampling = Sampling(max_new_tokens=60, temperature=temperature, chunk_tokens=8, seed=5)
    plain, without = generate(model, prompts, sampling), passes.count
    drafted = generate(model, prompts, replace(sampling, speculative=True))
    assert drafted == plain
    assert all(len(set(text)) == 2 for text in plain)
    assert passes.count - without < 0.9 * without


def test_drafts_are_those_of_the_whole_forward():
    """The MTP block's cache: its logits, read in pieces, equal those over the whole text."""
    model = build(num_nextn_predict_layers=1)
    ids = draw(2, 40)
    decoder = Decoder(model, 2, 40, drafts=True)
    parts = []
    for begin, end in [(0, 13), (13, 14), (14, 16), (16, 30), (30, 39)]:
        streams = decoder.read(ids[:, begin:end], [end - begin] * 2)
        decoder.commit([end - begin] * 2)
        parts.append(decoder.draft(streams, ids[:, begin + 1 : end + 1], [end - begin] * 2))
    torch.testing.assert_close(torch.cat(parts, 1), model.mtp_logits(ids)[0][:, :39], **CLOSE)


# ---- sampling ------------------------------------------------------------------------------------
def test_texts_do_not_depend_on_their_neighbours_and_follow_the_seed():
    model = build()
    prompts = [draw(1, n, seed=n)[0].tolist() for n in (5, 11)]
    sampling = Sampling(max_new_tokens=20, temperature=0.9, top_p=0.9, seed=1)
    both = generate(model, prompts, sampling)
    assert both[0] == generate(model, prompts[:1], sampling)[0]
    assert both == generate(model, prompts, sampling)
    assert both != generate(model, prompts, replace(sampling, seed=2))


def test_draws_follow_the_probabilities():
    """20000 draws: a share of p is off by 5 sqrt(p / n) at most."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 1.5])
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.7)):
        p = (logits.double() / temperature).softmax(0)
        order = p.argsort(descending=True)
        before = p[order].cumsum(0) - p[order]
        p[order[before >= top_p]] = 0
        p /= p.sum()
        sampling = Sampling(temperature=temperature, top_p=top_p)
        counts = collections.Counter(choose(logits, sampling, 0, n) for n in range(20000))
        for token in range(5):
            share = counts[token] / 20000
            assert abs(share - float(p[token])) <= 5 * (float(p[token]) / 20000) ** 0.5


def test_stop_token_ends_a_text_and_tokens_stream_in_order():
    model = build()
    prompts = [draw(1, n, seed=n)[0].tolist() for n in (4, 9)]
    free = generate(model, prompts, Sampling(max_new_tokens=25))
    stop = free[0][6]
    told = [[], []]
    texts = generate(
        model,
        prompts,
        Sampling(max_new_tokens=25, stop_id=stop),
        on_token=lambda text, token: told[text].append(token),
    )
    assert told == texts
    for text, whole in zip(texts, free, strict=True):
        end = whole.index(stop) if stop in whole else len(whole)
        assert text == whole[:end]
    assert len(texts[0]) < 25


@pytest.mark.parametrize(
    ("prompts", "sampling", "names"),
    [
        ([], {}, "no prompt"),
        ([[]], {}, "prompt 0"),
        ([[1], [64]], {}, "prompt 1: id 64 is not one of the vocab_size=64 ids"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"temperature": math.nan}, "temperature=nan"),
        ([[1]], {"top_p": 0.0}, "top_p=0.0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"speculative": True}, "num_nextn_predict_layers=0"),
    ],
)
def test_wrong_input_is_named(prompts, sampling, names):
    with pytest.raises(ValueError, match=names):
        generate(build(), prompts, Sampling(**sampling))


def test_cache_refuses_a_text_that_outgrows_it():
    decoder = Decoder(build(), 1, 10)
    decoder.logits(draw(1, 8))
    with pytest.raises(ValueError, match=r"8 \+ 3 tokens .* max_tokens=10"):
        decoder.logits(draw(1, 3))
