"""Probes: what is written holds what is asked, and what is measured equals plain formulas.

Reading through the cache rounds otherwise than one pass; logits of fp32 models of this size agree
to 1e-4 (tests/model/test_generate.py), so do losses. Attention's parts are compared with the
reference kernel's probabilities, formed once more from its scores.
"""

import json
import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.synthetic import answer, question
from data.tokenizer import ByteTokenizer, train_bpe
from model.config import IndexerPhase
from model.init import init_weights
from model.transformer import DeepSeekV4
from scripts.__main__ import main as v4
from scripts.cli.model_yaml import load_model_config
from train.exchange.open import load_model
from train.probes.attention import attention_by_distance, watching
from train.probes.measures import edges, loss_by_position, needles, retrieval, tail_losses
from train.probes.reader import CacheReader, TokenScores
from train.probes.tasks import (
    NEEDLES,
    copy,
    filler_document,
    induction,
    needle,
    ordinary_ids,
    window_reach,
)

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def bpe():
    text = BYTES.decode(filler_document(BYTES, 20_000, 3).tolist())
    return train_bpe([text], 600)


@pytest.mark.parametrize("kind", NEEDLES)
@pytest.mark.parametrize("of", ["bytes", "bpe"])
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_a_needle_holds_what_it_asks_for_once(kind, of, depth, bpe):
    tokenizer = BYTES if of == "bytes" else bpe
    for number in range(3):
        q = needle(tokenizer, kind, 700, depth, 0, number)
        assert 560 < len(q.ids_N) <= 700
        text = tokenizer.decode(q.ids_N.tolist())
        told = tokenizer.decode(q.ids_N[q.begin :].tolist())
        key = tokenizer.decode(q.ids_N[: q.begin].tolist()).split()[-2]
        values = told.strip().split(", ")
        assert told == answer(values)
        assert text.endswith(question(key, values) + told)
        assert len(values) == (4 if kind == "values" else 1)
        stated = "are" if kind == "values" else "is"
        assert text.count(f"of {key} {stated}{told}.") == 1
        assert text.count(values[0]) == 2
        # the distance leads from the token before the answer to the value that was stated
        source = q.begin - 1 - q.distance
        assert tokenizer.decode(q.ids_N[source:].tolist()).startswith(told + ".")
        others = len(re.findall(r"The word of \w+ is", text)) - (kind != "values")
        assert 0 < others <= 13 if kind == "keys" else others == 0
        assert q.chance == (1 / 14 if kind == "keys" else 1e-4)


def test_depth_moves_the_needle_and_seeds_the_words():
    distances = [needle(BYTES, "single", 2000, d, 0, 0).distance for d in (0, 0.25, 0.5, 0.75, 1)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 1800
    assert distances[-1] < 80
    first, again, other = (needle(BYTES, "single", 300, 0.5, s, 0).ids_N for s in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()


def test_copies_and_induction_come_from_the_distance_they_name(bpe):
    q = copy(bpe, 800, 0, 0)
    n = len(q.ids_N) - q.begin
    source = q.begin - 1 - q.distance
    assert q.ids_N[source : source + n].tolist() == q.ids_N[q.begin :].tolist()
    assert 700 < q.distance < 900
    q = induction(ordinary_ids(bpe), 100, 0, 0)
    assert q.ids_N[:100].tolist() == q.ids_N[100:].tolist()
    assert q.distance == 99
    assert not set(q.ids_N.tolist()) & set(bpe.control_ids)


class Oracle:
    """Knows every token that stands within its window behind the same token, and no other."""

    max_tokens = 1 << 20

    def __init__(self, window):
        self.window = window

    def score(self, ids_N, begin):
        hits = []
        for t in range(begin, len(ids_N)):
            past = ids_N[max(0, t - self.window) : t]
            found = np.flatnonzero(past == ids_N[t - 1])
            hits.append(any(i + 1 < len(past) and past[i + 1] == ids_N[t] for i in found[:-1]))
        hit = torch.tensor(hits)
        return TokenScores(torch.where(hit, 0.1, 5.0), hit)


def test_a_reader_that_looks_back_solves_what_lies_within_its_window():
    near = needles(Oracle(5000), BYTES, NEEDLES, [600], [0.0, 1.0], 2, 0, reach=300)
    assert {c.beyond for c in near if c.depth == 0} == {True}
    assert {c.beyond for c in near if c.depth == 1 and c.task == "single"} == {False}
    found = retrieval(near)
    assert found["single"]["beyond_reach"]["documents"] == 2
    assert set(found) == set(NEEDLES)


@pytest.fixture(scope="module")
def model():
    config = replace(load_model_config("v4_tiny"), vocab_size=260, sliding_window=16, index_topk=4)
    model = DeepSeekV4(config)
    init_weights(model, 0, torch.ones(260, dtype=torch.int64))
    return model.requires_grad_(False)


def test_scores_are_those_of_one_pass(model):
    ids_N = filler_document(BYTES, 230, 0)
    logits_NV = model.logits(torch.from_numpy(ids_N)[None])[0].log_softmax(-1)
    expected = -logits_NV[:-1].gather(1, torch.from_numpy(ids_N)[1:, None])[:, 0]
    for begin, chunk in ((1, 64), (1, 512), (65, 64), (64, 64), (200, 50), (229, 7)):
        scored = CacheReader(model, chunk).score(ids_N, begin)
        torch.testing.assert_close(scored.nll_P, expected[begin - 1 :], atol=1e-4, rtol=1e-4)
        best = logits_NV[begin - 1 : -1].argmax(-1)
        assert scored.hit_P.tolist() == (best == torch.from_numpy(ids_N)[begin:]).tolist()


def test_losses_by_position_add_up(model):
    documents = [filler_document(BYTES, n, n) for n in (40, 150, 90)]
    reader = CacheReader(model)
    buckets = loss_by_position(reader, documents, 100)
    assert [b["from"] for b in buckets] == edges(100) == [0, 16, 64]
    cut = [d[:100] for d in documents]
    assert sum(b["tokens"] for b in buckets) == sum(len(d) - 1 for d in cut)
    nats = sum(float(reader.score(d, 1).nll_P.sum()) for d in cut)
    assert sum(b["tokens"] * b["loss"] for b in buckets) == pytest.approx(nats, rel=1e-5)
    late = [reader.score(d, 64).nll_P for d in cut if len(d) > 64]
    assert buckets[2]["loss"] == pytest.approx(float(torch.cat(late).mean()), rel=1e-5)


def test_tails_are_read_whole_and_cut(model):
    documents = [filler_document(BYTES, n, n) for n in (40, 150, 120)]
    reader = CacheReader(model)
    found = tail_losses(reader, documents, 140, {"window": 16, "training_length": 64}, tail=30)
    assert (found["documents"], found["tokens"]) == (2, 140 + 120)
    for name, kept in (("whole", 140), ("window", 46), ("training_length", 94)):
        cut = [d[-min(len(d), 140) :][-kept:] for d in documents[1:]]
        expected = np.mean([float(reader.score(d, len(d) - 30).nll_P.mean()) for d in cut])
        assert found[name] == pytest.approx(expected, rel=1e-5)
    assert tail_losses(reader, documents, 140, {"window": 300}, 30)["documents"] == 0


def by_the_formula(attn, args, distances):
    """Shares of window, sink and entries, and the recall, of one query and head after another."""
    q_BTHK, kv_BTK, sink_H, start_BT, window, entries = args
    T, H = q_BTHK.shape[1:3]
    queries = [*range(T // 2, T)]
    parts = Counter()
    best, found = Counter(), Counter()
    for t in queries:
        near = kv_BTK[0, max(int(start_BT[0, t]), t - window + 1) : t + 1].double()
        visible = range(int(entries.first_BT[0, t]), int(entries.stop_BT[0, t])) if entries else ()
        chosen = list(visible)
        if entries and entries.index_BTN is not None:
            chosen = [int(e) for e in entries.index_BTN[0, t] if e >= 0]
        full = Counter()
        bucket = {e: max(d for d in distances if d <= t - ((e + 1) * attn.ratio - 1))
                  for e in visible}  # fmt: skip
        for h in range(H):
            q = q_BTHK[0, t, h].double() * q_BTHK.shape[-1] ** -0.5
            own = float((near @ q).exp().sum())
            far = (entries.kv_BEK[0].double() @ q).exp().tolist() if entries else []
            sink = math.exp(float(sink_H[h]))
            share = 1 / (sink + own + sum(far[e] for e in chosen)) / H
            parts["sink"] += sink * share / len(queries)
            parts["window"] += own * share / len(queries)
            for e in visible:
                full[e] += far[e] * share
                if e in chosen:
                    parts[bucket[e]] += far[e] * share / len(queries)
        if len(full) > len(chosen):
            for e, _ in full.most_common(len(chosen)):
                best[bucket[e]] += 1
                found[bucket[e]] += e in chosen
    return parts, {str(d): found[d] / n for d, n in best.items()}


def test_attention_is_that_of_the_formula(model):
    ids = torch.from_numpy(filler_document(BYTES, 90, 1))
    distances = [0, 8, 16, 40]
    layers = attention_by_distance(model, ids, distances)
    assert [row["layer"] for row in layers] == [f"layers.{i}.attn" for i in model.layers]
    given = []
    context = model.context(torch.zeros(1, len(ids), dtype=torch.int64))
    context.phase = IndexerPhase.sparse
    with torch.no_grad(), watching(model, lambda attn, args, _: given.append((attn, args))):
        model.trunk(model.streams(ids[None]), ids[None], context)
    recalls = []
    for row, (attn, args) in zip(layers, given, strict=True):
        parts, recall = by_the_formula(attn, args, distances)
        mine = {"window": row["window"], "sink": row["sink"]}
        mine |= {int(begin): share for begin, share in row["entries"].items() if share}
        assert mine == pytest.approx({k: v for k, v in parts.items() if v}, abs=1e-5)
        assert bool(row["entries"]) == (row["kind"] != "swa")
        if row["kind"] == "csa":
            assert row["recall"] == pytest.approx(recall)
            recalls += recall.values()
    assert 0 < min(recalls) < max(recalls) <= 1  # an untrained indexer's choice is neither


def test_an_indexer_that_knows_attention_has_full_recall(model, monkeypatch):
    """With as many choices as there are entries nothing is left out; with few something is."""
    ids = torch.from_numpy(filler_document(BYTES, 200, 1))
    some = [r for r in attention_by_distance(model, ids, [0, 64]) if r["kind"] == "csa"]
    assert any(min(row["recall"].values()) < 1 for row in some)
    for block in model.layers.values():
        monkeypatch.setattr(block.attn, "topk", 1000, raising=False)
    everything = [r for r in attention_by_distance(model, ids, [0, 64]) if r["kind"] == "csa"]
    assert all(row["recall_queries"] == 0 for row in everything)


def test_windows_reach_as_far_as_they_stack(model):
    assert window_reach(model.config) == model.config.num_hidden_layers * 15


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probed") / "run"
    code = v4([
        "pretrain", "model=v4_tiny", "data=long_range", "data.tokenizer=byte",
        "data.sources.packages.packages=[asyncio,json,email,http]", f"run_dir={folder}",
        "data.sources.synthetic.documents=20", "data.sources.synthetic.document_characters=2048",
        f"data.cache_dir={folder.parent}/cache", "data.validation.bytes=3000",
        "model.vocab_size=260", "train.steps=2", "train.seq_len=64", "sample.tokens=0",
        "train.global_batch_tokens=128", "train.micro_batch_size=1", "train.eval_tokens=128",
    ])  # fmt: skip
    assert code == 0
    return folder


def test_a_run_probes_itself(run, tmp_path):
    """Losses while training are those of the reader, on the weights of the step."""
    folder = tmp_path / "probing"
    words = [
        "pretrain", "model=v4_tiny", "data=long_range", "data.tokenizer=byte",
        "data.sources.packages.packages=[asyncio,json,email,http]", f"run_dir={folder}",
        "data.sources.synthetic.documents=20", "data.sources.synthetic.document_characters=2048",
        f"data.cache_dir={run.parent}/cache", "data.validation.bytes=3000",
        "model.vocab_size=260", "train.steps=2", "train.seq_len=256", "sample.tokens=0",
        "train.global_batch_tokens=256", "train.micro_batch_size=1", "train.eval_tokens=256",
        "train.probe_every=2", "train.precision=fp32",
    ]  # fmt: skip
    assert v4(words) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert not any(name.startswith("probe_") for name in lines[0])
    model, tokenizer = load_model(folder)
    reader = CacheReader(model)
    for name, depth in (("far", 0.0), ("near", 1.0)):
        asked = [needle(tokenizer, "single", 256, depth, 0, n) for n in range(8)]
        nll = torch.cat([reader.score(q.ids_N, q.begin).nll_P for q in asked])
        assert lines[1][f"probe_needle_{name}"] == pytest.approx(float(nll.mean()), rel=1e-4)
    assert {"probe_loss_0", "probe_loss_64", "probe_tail_whole"} <= set(lines[1])
    words = [word.replace("=256", "=64").replace("probing", "short") for word in words]
    assert v4(words) == 2
    assert not (tmp_path / "short").exists()


def test_the_command_probes_runs_and_exports(run, tmp_path, capsys):
    exported = run.parent / "exported"
    assert v4(["export_hf", str(run), str(exported), "--dtype", "fp32"]) == 0
    out = tmp_path / "out"
    words = [
        "probe", str(run), str(exported), "--lengths", "160", "--depths", "2", "--count", "1",
        "--needle", "gist", "--needle", "pairs", "--tail", "20", "--out", str(out),
    ]  # fmt: skip
    capsys.readouterr()
    assert v4(words) == 0
    told = capsys.readouterr().out
    assert "run " in told
    assert "exported" in told
    found = json.loads((out / "probe.json").read_text())["models"]
    assert set(found) == {"run", "exported"}
    assert found["run"]["needles"] == found["exported"]["needles"]
    assert {cell["task"] for cell in found["run"]["needles"]} == {"gist", "pairs"}
    assert found["run"]["attention"] == found["exported"]["attention"]
    assert found["run"]["positions"]
    assert found["run"]["contexts"]["training_length"] == 64
    assert "not measured" in found["exported"]["losses"]
    for name in ("run_needles.png", "run_attention.png", "exported_needles.png", "positions.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    assert v4(words) == 0  # over its own results
    capsys.readouterr()
    (out / "probe.json").write_text("{}")
    assert v4(words) == 2
    assert "holds something else" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "says"), [
    (["--lengths", "64"], "--lengths 64: 64 must be at least 128"),
    (["--lengths", "x"], "--lengths x must be numbers"),
    (["--count", "0"], "--count 0 must be 1 or more"),
    (["--lengths", "100000000"], "exceeds the"),
    (["--text", "{blank}"], "blank.txt has no text"),
    (["--text", "{blank}.none"], "blank.txt.none cannot be read"),
])  # fmt: skip
def test_bad_options_are_one_line(run, tmp_path, words, says, capsys):
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n")
    words = [word.format(blank=blank) for word in words]
    assert v4(["probe", str(run), "--out", str(tmp_path / "o"), *words]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert says in told[0]
    assert not (tmp_path / "o").exists()


def test_other_models_are_read_by_transformers(tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    folder = tmp_path / "llama"
    LlamaForCausalLM(LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=512,
    )).save_pretrained(folder)  # fmt: skip
    (folder / "tokenizer.json").write_text(BYTES.serialise())
    text = tmp_path / "book.txt"
    text.write_text(BYTES.decode(filler_document(BYTES, 900, 0).tolist()))
    capsys.readouterr()
    assert v4(["probe", str(folder), "--lengths", "256", "--depths", "1", "--count", "1",
               "--text", str(text), "--out", str(tmp_path / "o")]) == 0  # fmt: skip
    found = json.loads((tmp_path / "o" / "probe.json").read_text())["models"]["llama"]
    assert found["window_reach"] is None
    assert "attention" not in found
    assert found["positions"][0]["loss"] == pytest.approx(np.log(260), rel=0.1)
    assert set(found["retrieval"]) == {*NEEDLES, "copy", "induction"}
