"""Scores of given tokens, and the scripts that run a model, called as a user calls them."""

import json
import math
import re

import numpy as np
import pytest
import torch

from data.tokenizer import ByteTokenizer
from model.decoding_costs import kv_cache_bytes
from model.generate import Sampling
from model.generate import generate as continue_prompts
from quant.apply import apply_quant
from quant.config import QuantConfig
from quant.probe import QuantProbe
from scripts import export_hf, generate, import_hf, score
from tests.train.exchange.exchange_models import CONFIG_TINY, tiny_model, write_run
from train.exchange.score import documents, token_nll

TEXT = "def f(x):\n    return '\u00e4\u20ac' * x  # twice, or \U0001f600\n" * 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder, its model, and the text as a file and as tokens."""
    folder = tmp_path_factory.mktemp("score")
    model = write_run(folder / "run")
    (folder / "text.txt").write_text(TEXT, "utf-8")
    np.save(folder / "tokens.npy", np.array(ByteTokenizer().encode(TEXT), np.uint16))
    return folder, model


def whole_nll(model, ids):
    """The definition: one forward pass over the document."""
    logits = model.logits(torch.tensor([ids]))[0].double().log_softmax(-1)
    return torch.tensor([math.nan, *(-float(logits[t - 1, i]) for t, i in enumerate(ids) if t)])


def called(main, *arguments):
    return main([str(a) for a in arguments])


# ---- scoring -------------------------------------------------------------------------------------
@pytest.mark.core
@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_scores_are_those_of_one_forward_pass(chunk, run):
    ids = ByteTokenizer().encode(TEXT)[:60]
    got = token_nll(run[1], torch.tensor(ids), chunk)
    torch.testing.assert_close(got, whole_nll(run[1], ids), rtol=0, atol=2e-5, equal_nan=True)


def test_nothing_and_one_token_have_no_score(run):
    assert token_nll(run[1], torch.empty(0, dtype=torch.int64)).shape == (0,)
    assert token_nll(run[1], torch.tensor([3])).isnan().all()
    with pytest.raises(ValueError, match="token id 320 is not one of the vocab_size=320"):
        token_nll(run[1], torch.tensor([1, 320]))


def test_documents_end_behind_the_eos():
    ids = torch.tensor([5, 0, 6, 7, 0, 8])
    assert documents(ids, None) == [(0, 6)]
    assert documents(ids, 0) == [(0, 2), (2, 5), (5, 6)]
    assert documents(ids[:5], 0) == [(0, 2), (2, 5)]
    assert documents(ids[:0], 0) == [(0, 0)]


def test_all_formats_have_the_same_scores(run, tmp_path, capsys):
    """fp32 tensors, so to the last bit; the quantised one is another model and differs.

    Under ``deployed``, which computes with what it stores, the quantised one is equal too.
    """
    folder, model = run
    models = {"run": folder / "run"}
    for layout in ("transformers", "official"):
        models[layout] = tmp_path / layout
        export = (folder / "run", models[layout], "--to", layout, "--dtype", "fp32")
        assert called(export_hf.main, *export) == 0
    models["back"] = tmp_path / "back"
    assert called(import_hf.main, models["transformers"], models["back"]) == 0
    models["quantised"] = tmp_path / "quantised"
    assert called(export_hf.main, folder / "run", models["quantised"], "--to", "quantised") == 0
    found, told = {}, {}
    for name, path in models.items():
        capsys.readouterr()
        out = tmp_path / f"{name}.npz"
        assert called(score.main, path, folder / "text.txt", "--out", out) == 0
        told[name] = json.loads(capsys.readouterr().out)
        with np.load(out) as arrays:
            found[name] = {key: arrays[key] for key in arrays.files}
    ids = ByteTokenizer().encode(TEXT)
    expected = whole_nll(model, ids)
    for name in ("run", "transformers", "official", "back"):
        assert np.array_equal(found[name]["nll"], found["run"]["nll"], equal_nan=True), name
        assert told[name] == told["run"]
        got = torch.from_numpy(found[name]["nll"])
        torch.testing.assert_close(got, expected.float(), rtol=0, atol=2e-5, equal_nan=True)
        assert found[name]["ids"].tolist() == ids
        assert found[name]["byte_ends"][-1] == len(TEXT.encode())
    assert found["run"]["byte_ends"].tolist() == list(range(1, len(ids) + 1))
    mean = float(expected[1:].mean())
    assert told["run"]["tokens"] == told["run"]["bytes"] == len(ids) - 1
    assert told["run"]["nats_per_token"] == pytest.approx(mean, abs=1e-5)
    assert told["run"]["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert told["run"]["bits_per_byte"] == pytest.approx(mean / math.log(2), abs=1e-5)
    assert told["quantised"]["nats_per_token"] != told["run"]["nats_per_token"]
    deployed = {}
    for name, path in models.items():
        out = tmp_path / f"{name}_deployed.npz"
        arguments = (path, folder / "text.txt", "--out", out, "--quant", "deployed")
        assert called(score.main, *arguments) == 0
        with np.load(out) as arrays:
            deployed[name] = arrays["nll"]
        assert np.array_equal(deployed[name], deployed["run"], equal_nan=True), name
    assert not np.array_equal(deployed["run"], found["run"]["nll"], equal_nan=True)


def test_token_files_hold_documents(run, capsys):
    folder, model = run
    ids = [40, 41, 42, 256, 43, 44, 45, 46, 256]
    np.savez(folder / "two.npz", ids=np.array(ids))
    out = folder / "two_out.npz"
    arguments = (folder / "run", folder / "two.npz", "--eos-id", 256, "--out", out)
    assert called(score.main, *arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tokens"] == 7
    assert told["bytes"] is None
    assert told["bits_per_byte"] is None
    expected = torch.cat((whole_nll(model, ids[:4]), whole_nll(model, ids[4:])))
    with np.load(out) as arrays:
        got = torch.from_numpy(arrays["nll"])
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=2e-5, equal_nan=True)


# ---- writing -------------------------------------------------------------------------------------
def test_generate_streams_what_the_cache_gives(run, capsys):
    folder, model = run
    arguments = (folder / "run", "--prompt", "def \u00e4", "--tokens", 30, "--no-stop")
    assert called(generate.main, *arguments) == 0
    told = capsys.readouterr()
    prompt = ByteTokenizer().encode("def \u00e4")
    text = continue_prompts(model, [prompt], Sampling(max_new_tokens=30))[0]
    assert told.out == ByteTokenizer().decode(prompt + text) + "\n"
    tokens = len(prompt) + 30
    size = kv_cache_bytes(model.config, tokens, 4)
    assert f"cache: {size} bytes for {tokens} tokens ({size / tokens:.1f} a token)" in told.err
    assert called(generate.main, *arguments, "--speculative") == 0
    assert capsys.readouterr().out == told.out


def test_generate_continues_a_batch_with_quantised_rows(run, tmp_path, capsys):
    folder, model = run
    (tmp_path / "prompt").write_text("import ")
    arguments = ("--tokens", 12, "--no-stop", "--cache", "fp8", "--temperature", 0.8)
    prompts = ("--prompt-file", tmp_path / "prompt", "--prompt", "", "--ids", "1,2,3")
    assert called(generate.main, folder / "run", *prompts, *arguments) == 0
    told = capsys.readouterr()
    cast = tiny_model()
    apply_quant(cast, QuantConfig(kv=True, indexer=True), QuantProbe())
    ids = [[256], ByteTokenizer().encode("import "), [1, 2, 3]]
    sampling = Sampling(max_new_tokens=12, temperature=0.8)
    texts = [p + t for p, t in zip(ids, continue_prompts(cast, ids, sampling), strict=True)]
    shown = [f"[{n}] {ByteTokenizer().decode(text)}\n" for n, text in enumerate(texts)]
    assert told.out == "".join(shown)
    assert f"cache: {kv_cache_bytes(CONFIG_TINY, 19)} bytes for 19 tokens" in told.err


def test_a_character_is_streamed_whole(capsys):
    stream, parts = generate.Stream(ByteTokenizer(), list(b"a")), []
    for byte in "b\u20acc".encode():
        stream.add(0, byte)
        parts.append(capsys.readouterr().out)
    stream.end()
    assert [*parts, capsys.readouterr().out] == ["ab", "", "", "\u20ac", "c", "\n"]


# ---- what cannot be ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("main", "arguments", "names"),
    [
        (score.main, ("{run}/nothing", "{run}/text.txt"), "nothing does not exist"),
        (score.main, ("{run}/run", "{run}/nothing.txt"), "nothing.txt is no file"),
        (
            score.main,
            ("{run}/run", "{run}/text.txt", "--out", "{run}/text.txt/x.npz"),
            "text.txt cannot",
        ),
        (score.main, ("{run}/run", "{run}/text.txt", "--chunk-tokens", "0"), "--chunk-tokens 0"),
        (score.main, ("{run}/run", "{run}/run/config.npy"), "config.npy cannot be read"),
        (score.main, ("{run}/run", "{run}/blank.txt"), "blank.txt has 1 tokens: of each document"),
        (score.main, ("{run}/run", ""), "file '' names no file or folder"),
        (score.main, ("{run}/run", "{run}/text.txt", "--out", " "), "--out ' ' names no file or"),
        (generate.main, ("{run}/run",), "no prompt"),
        (generate.main, ("{run}/run", "--ids", "1,x"), "--ids 1,x"),
        (generate.main, ("{run}/run", "--ids", "1,999"), "id 999 is not one of the vocab_size=320"),
        (generate.main, ("{run}/run", "--prompt-file", "{run}/no"), "no is no file"),
        (generate.main, ("{run}/run", "--prompt-file", "{run}/tokens.npy"), "npy is not UTF-8"),
        (
            generate.main,
            ("{run}/run", "--prompt", "x", "--temperature", "nan"),
            "--temperature nan",
        ),
        (generate.main, ("{run}/run", "--prompt", "x", "--tokens", "0"), "--tokens 0 must be 1"),
        (
            generate.main,
            ("{run}/run", "--prompt", "x", "--tokens", "1048576"),
            "max_position_embeddings=",
        ),
        (export_hf.main, ("{run}/run", "{run}/run"), "are the same folder"),
        (export_hf.main, ("{run}/run", "{run}/x", "--shard-gb", "0"), "--shard-gb 0 "),
        (import_hf.main, ("{run}", "{run}/x"), "holds no model"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(main, arguments, names, run, capsys):
    (run[0] / "run" / "config.npy").write_text("none")
    (run[0] / "blank.txt").write_text("\n")
    assert called(main, *(a.format(run=run[0]) for a in arguments)) == 2
    told = capsys.readouterr()
    assert re.fullmatch(r"error: .*\n", told.err)
    assert names in told.err
    assert not told.out


@pytest.mark.parametrize("main", [score.main, generate.main, export_hf.main, import_hf.main])
def test_help_says_what_it_is_for(main, capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    assert "example" in capsys.readouterr().out
