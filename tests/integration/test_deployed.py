"""A trained run, its exported files, and back: what is deployed is what was trained, bit for bit.

The reader of the files is struct, json and numpy on raw bytes, written from the published layout
(reference C.6, E.1): it shares no code with the writer, not even the file format's library.
"""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from quant.config import QuantConfig, Recipe
from quant.linear import QuantOp
from scripts import export_hf, import_hf
from tests.integration.small_run import fit, small_run, write_corpus
from train.config.schema import StageConfig
from train.exchange.open import load_model
from train.record.metrics import read_metrics

FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
SEQ_TOKENS = 192  # of a step


def read_files(folder):
    """Every tensor of a folder as (dtype, raw bytes, shape), by its name."""
    tensors = {}
    for path in Path(folder).glob("*.safetensors"):
        raw = path.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        for name, entry in json.loads(raw[8 : 8 + size]).items():
            if name != "__metadata__":
                begin, end = (8 + size + at for at in entry["data_offsets"])
                tensors[name] = (entry["dtype"], raw[begin:end], entry["shape"])
    return tensors


def decode_fp4(weight, scale):
    """Two codes a byte, low nibble first; a power of two for every 32 columns."""
    assert (weight[0], scale[0]) == ("I8", "F8_E8M0")
    byte = np.frombuffer(weight[1], np.uint8).reshape(weight[2])
    codes = np.stack([byte & 15, byte >> 4], axis=-1).reshape(len(byte), -1)
    exponent = np.frombuffer(scale[1], np.uint8).reshape(scale[2]).astype(np.int32) - 127
    sign = np.where(codes & 8, np.float32(-1), np.float32(1))
    power = np.ldexp(np.float32(1), np.repeat(exponent, 32, axis=1)[:, : codes.shape[1]])
    return sign * FP4_VALUES[codes & 7] * power


def operands(model, ids):
    """The weights that a forward pass really multiplies expert rows by, by module."""
    used = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "op", None), QuantOp) and module.op.grouped:
            plain = module.op.grouped

            def watched(x, w, offsets, name=name, plain=plain):
                used[name] = w.detach().clone().numpy()
                return plain(x, w, offsets)

            module.op.grouped = watched
    with torch.no_grad():
        model.logits(ids)
        model.mtp_logits(ids)
    return used


def indexer_casts(model, ids):
    """Queries and keys of every indexer, as the casts give them."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if name.endswith(("indexer.q_cast", "indexer.compressor.cast")):
            hook = module.register_forward_hook(
                lambda _, __, out, name=name: seen.update({name: out.detach().clone()})
            )
            handles.append(hook)
    logits = model.logits(ids)
    for handle in handles:
        handle.remove()
    return logits, seen


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two plain steps, then one under QAT: a late stage, as the paper has it."""
    folder = tmp_path_factory.mktemp("deployed")
    stages = [
        StageConfig(name="plain", until_tokens=2 * SEQ_TOKENS, quantised=False),
        StageConfig(name="fp4", until_tokens=3 * SEQ_TOKENS),
    ]
    run = small_run(folder / "run", write_corpus(folder), steps=0, stages=stages, eval_every=0,
                    monitor_every=1)  # fmt: skip
    run.quant = QuantConfig(recipe=Recipe.fp4_qat)
    code, trainer = fit(run)
    assert code == 0
    assert export_hf.main([run.run_dir, str(folder / "out"), "--to", "quantised"]) == 0
    return folder, trainer


def test_quantisation_begins_with_its_stage(trained):
    folder, trainer = trained
    records = read_metrics(folder / "run" / "metrics.jsonl")
    assert [r["stage"] for r in records] == ["plain", "plain", "fp4"]
    assert [("quant_error_experts" in r) for r in records] == [False, False, True]
    assert trainer.audit.result()["steps"] == [1, 2, 3], "the new stage is audited too"


def test_exported_experts_are_those_of_the_last_forward_pass(trained):
    """After the last update; MTP included."""
    folder, trainer = trained
    ids = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(0))
    used, stored = operands(trainer.engine.model, ids), read_files(folder / "out")
    compared = 0
    for name, stack in used.items():
        stem, leaf = name.rsplit(".", 1)
        for expert, values in enumerate(stack):
            official = f"{stem}.{expert}.{leaf}"
            decoded = decode_fp4(stored[f"{official}.weight"], stored[f"{official}.scale"])
            assert decoded.tobytes() == values.tobytes(), official
            compared += 1
    assert compared == 4 * 3 * 4, "three layers and an MTP block, w1 to w3, four experts"


def test_reimported_checkpoint_computes_the_same_when_deployed(trained):
    """The run, its quantised folder and a checkpoint made of that: logits, indexer, bit for bit."""
    folder, _ = trained
    assert import_hf.main([str(folder / "out"), str(folder / "back")]) == 0
    ids = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(1))
    expected, seen = indexer_casts(load_model(folder / "run", recipe=Recipe.deployed)[0], ids)
    assert len(seen) == 2, "one indexer"
    for name in ("out", "back"):
        logits, casts = indexer_casts(load_model(folder / name, recipe=Recipe.deployed)[0], ids)
        assert torch.equal(logits, expected), name
        for cast, values in seen.items():
            assert torch.equal(casts[cast], values), (name, cast)
