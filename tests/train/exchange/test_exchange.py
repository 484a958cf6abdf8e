"""Run folder, every layout, and back: weights bitwise, transformers' fp32 logits within 1e-5."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.tokenizer import ByteTokenizer, train_bpe
from model.config import LayerKind
from model.state_dict import to_official
from model.transformer import DeepSeekV4
from quant.apply import apply_quant
from quant.config import ExpertFormat, QuantConfig, Recipe
from quant.export import INDEX, Stored, stored_as
from quant.probe import QuantProbe
from tests.parity.models import build_hf
from tests.parity.weights import random_weights
from tests.train.checkpoint.folders import locate
from tests.train.exchange.exchange_models import CONFIG_TINY, tiny_config, tiny_model, write_run
from train.checkpoint import reader as checkpoint_reader
from train.exchange import export
from train.exchange.export import ExportFormat, ExportJob, FloatType, export_folder
from train.exchange.folder_source import FolderSource
from train.exchange.import_model import import_checkpoint
from train.exchange.open import load_model, open_source
from train.exchange.run_source import RunSource

SMALL = 64 << 10  # bytes of a shard: several of them
FP32 = {
    layout: ExportJob(layout, FloatType.fp32, shard_bytes=SMALL)
    for layout in (ExportFormat.transformers, ExportFormat.official)
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    return folder, write_run(folder)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 260, (2, 50), generator=torch.Generator().manual_seed(0))


def assert_same_weights(model, expected):
    ours, theirs = to_official(model), to_official(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


# ---- reading -------------------------------------------------------------------------------------
@pytest.mark.core
def test_run_and_checkpoint_are_read_bitwise(run, ids):
    folder, expected = run
    for path in (folder, folder / "checkpoints" / "step_00000010"):
        model, tokenizer = load_model(path)
        assert_same_weights(model, expected)
        assert torch.equal(model.logits(ids), expected.logits(ids))
        assert isinstance(tokenizer, ByteTokenizer)
        assert not any(p.requires_grad for p in model.parameters())


def test_run_is_read_as_its_last_step_used_it(tmp_path, ids):
    """No top-k in the full phase, no YaRN before its length, quantised as trained."""
    config = replace(CONFIG_TINY, yarn_from_seq_len=128)
    expected = write_run(tmp_path / "a", tiny_model(config), indexer_phase="full")
    expected.yarn = False
    expected.config.index_topk = 10**6
    for layer in expected.layers.values():
        layer.attn.topk = 10**6
    model, _ = load_model(tmp_path / "a")
    assert torch.equal(model.logits(ids), expected.logits(ids))
    quant = QuantConfig(recipe=Recipe.fp4_qat)
    trained = write_run(tmp_path / "b", quant=quant)
    plain = trained.logits(ids)
    apply_quant(trained, quant, QuantProbe())
    assert torch.equal(load_model(tmp_path / "b")[0].logits(ids), trained.logits(ids))
    assert torch.equal(load_model(tmp_path / "b", recipe=Recipe.none)[0].logits(ids), plain)


# ---- plain layouts -------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", list(FP32))
def test_plain_layouts_come_back_bitwise(layout, run, tmp_path, ids):
    folder, expected = run
    export_folder(open_source(folder), tmp_path / "out", FP32[layout])
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    model, tokenizer = load_model(tmp_path / "out")
    assert_same_weights(model, expected)
    assert torch.equal(model.logits(ids), expected.logits(ids))
    assert tokenizer.encode("a \u00e9\n") == ByteTokenizer().encode("a \u00e9\n")
    path = import_checkpoint(open_source(tmp_path / "out"), tmp_path / "back")
    assert_same_weights(load_model(tmp_path / "back")[0], expected)
    assert locate(str(tmp_path / "back")) == path, "init_from finds it"
    names = checkpoint_reader.saved_tensors(path)
    assert names == {f"model.{n}": t.shape for n, t in expected.state_dict().items()}


@pytest.mark.core
def test_transformers_loads_what_is_exported(run, tmp_path, ids):
    folder, expected = run
    export_folder(open_source(folder), tmp_path, FP32[ExportFormat.transformers])
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info.values()), info
    with torch.no_grad():
        logits = theirs(ids, use_cache=False).logits
    assert (logits - expected.logits(ids)).abs().max() <= 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n  return '\u00e4' # \U0001f600"
    assert tokenizer(text)["input_ids"] == ByteTokenizer().encode(text)
    assert tokenizer.eos_token_id == theirs.config.eos_token_id == 256


def test_what_transformers_saves_is_read(tmp_path):
    """``save_pretrained`` has spellings of its own and no MTP block."""
    config = replace(CONFIG_TINY, num_nextn_predict_layers=0, compress_ratios=[0, 8, 4, 8, 4])
    expected = tiny_model(config)
    build_hf(config, random_weights(config, 3)).save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path)
    assert_same_weights(model, expected)
    assert tokenizer is None


def test_bf16_keeps_what_the_release_keeps(run, tmp_path):
    folder, expected = run
    weights = to_official(expected)
    for layout in FP32:
        out = tmp_path / layout.value
        export_folder(open_source(folder), out, ExportJob(layout, FloatType.bf16))
        again = to_official(load_model(out)[0])
        for name, value in weights.items():
            rounds = stored_as(name) not in (Stored.fp32, Stored.int64)
            assert torch.equal(again[name], value.bfloat16().float() if rounds else value), name
    stored = load_file(next((tmp_path / "official").glob("*.safetensors")))
    assert stored["embed.weight"].dtype == torch.bfloat16
    assert stored["layers.0.attn.attn_sink"].dtype == torch.float32


# ---- the quantised layout ------------------------------------------------------------------------
@pytest.mark.parametrize("experts", [Stored.fp4, Stored.fp8])
def test_quantised_layout_holds_what_the_forward_pass_uses(experts, tmp_path, ids):
    """Read by code of its own, under ``deployed`` it gives bitwise the exported state's logits."""
    quant = QuantConfig(recipe=Recipe.deployed, experts=ExpertFormat(experts.value))
    model = write_run(tmp_path / "run", quant=quant)
    job = ExportJob(ExportFormat.quantised, experts=experts, shard_bytes=SMALL)
    export_folder(open_source(tmp_path / "run"), tmp_path / "out", job)
    plain = model.logits(ids)
    apply_quant(model, quant, QuantProbe())
    again, _ = load_model(tmp_path / "out")
    assert torch.equal(again.logits(ids), model.logits(ids))
    assert not torch.equal(plain, model.logits(ids))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["expert_dtype"] == experts.value
    path = import_checkpoint(open_source(tmp_path / "out"), tmp_path / "back")
    assert torch.equal(load_model(path)[0].logits(ids), model.logits(ids))


# ---- streaming and resuming ----------------------------------------------------------------------
class Watched:
    """A source that counts what is read, and may stop."""

    def __init__(self, source, stop_after=10**9):
        self.source, self.reads, self.stop_after = source, 0, stop_after
        self.config, self.quant = source.config, source.quant
        self.origin, self.shapes = source.origin, source.shapes
        self.tokenizer, self.provenance = source.tokenizer, source.provenance

    def read(self, name):
        self.reads += 1
        if self.reads > self.stop_after:
            raise KeyboardInterrupt
        return self.source.read(name)


def assert_same_files(folder, expected):
    """Bytes; of shards values and metadata, whose order in the header is not fixed."""
    names = sorted(p.name for p in expected.iterdir())
    assert sorted(p.name for p in folder.iterdir()) == names
    for name in names:
        if not name.endswith(".safetensors"):
            assert (folder / name).read_bytes() == (expected / name).read_bytes()
            continue
        with safe_open(folder / name, "pt") as ours, safe_open(expected / name, "pt") as theirs:
            assert ours.metadata() == theirs.metadata()
            assert set(ours.keys()) == set(theirs.keys())
            for key in ours.keys():
                got, want = ours.get_tensor(key), theirs.get_tensor(key)
                assert got.dtype == want.dtype
                assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("layout", list(ExportFormat))
def test_a_stopped_export_goes_on(layout, run, tmp_path):
    job = ExportJob(layout, FloatType.fp32, shard_bytes=SMALL)
    whole = Watched(open_source(run[0]))
    export_folder(whole, tmp_path / "whole", job)
    stopped = Watched(open_source(run[0]), whole.reads // 2)
    with pytest.raises(KeyboardInterrupt):
        export_folder(stopped, tmp_path / "parts", job)
    assert not (tmp_path / "parts" / "model.safetensors.index.json").exists()
    rest, told = Watched(open_source(run[0])), []
    export_folder(rest, tmp_path / "parts", job, lambda done, total: told.append((done, total)))
    assert rest.reads < 0.75 * whole.reads
    assert_same_files(tmp_path / "parts", tmp_path / "whole")
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]


def test_a_stopped_import_goes_on(run, tmp_path):
    export_folder(open_source(run[0]), tmp_path / "out", FP32[ExportFormat.official])
    whole = Watched(open_source(tmp_path / "out"))
    import_checkpoint(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(Watched(open_source(tmp_path / "out"), whole.reads // 2), tmp_path / "b")
    with pytest.raises(ValueError, match="holds part of an import from elsewhere"):
        import_checkpoint(open_source(run[0]), tmp_path / "b")
    rest = Watched(open_source(tmp_path / "out"))
    import_checkpoint(rest, tmp_path / "b")
    assert rest.reads < 0.75 * whole.reads
    assert_same_weights(load_model(tmp_path / "b")[0], run[1])
    assert not (tmp_path / "b" / "importing").exists()


def test_an_export_never_holds_more_than_a_shard(run, tmp_path, monkeypatch):
    """Stands for memory: what is handed to each file, in a job of many shards."""
    sizes = []
    real = export.save_file

    def save(tensors, path, **kwargs):
        sizes.append(sum(t.nbytes for t in tensors.values()))
        real(tensors, path, **kwargs)

    monkeypatch.setattr(export, "save_file", save)
    export_folder(open_source(run[0]), tmp_path / "out", FP32[ExportFormat.official])
    assert max(sizes) <= max(SMALL, 320 * 32 * 4)
    assert len(sizes) > 3


# ---- what cannot be ------------------------------------------------------------------------------
def test_wrong_sources_are_named(run, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_source(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no model"):
        open_source(tmp_path)
    out = tmp_path / "out"
    export_folder(open_source(run[0]), out, ExportJob(ExportFormat.official, FloatType.fp32))
    shard = next(out.glob("*.safetensors"))
    good = load_file(shard)
    (out / INDEX).unlink()

    def refused(tensors, match):
        save_file(tensors, shard)
        with pytest.raises(ValueError, match=match):
            open_source(out)

    sink = "layers.1.attn.attn_sink"
    refused({k: v for k, v in good.items() if k != sink}, f"tensor {sink} is missing")
    refused(good | {"layers.9.x": torch.ones(1)}, "1 tensors are not part .*layers.9.x")
    refused(good | {sink: torch.ones(5)}, rf"tensor {sink} has shape \[5\]")
    shard.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="cannot be read"):
        open_source(out)
    (out / "config.json").write_text("{")
    save_file(good, shard)
    with pytest.raises(ValueError, match="is no JSON"):
        open_source(out)


def test_a_damaged_run_is_refused(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step_00000010" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        open_source(tmp_path / "run")
    (tmp_path / "run" / "config.yaml").unlink()
    shutil.copytree(run[0] / "checkpoints", tmp_path / "run" / "checkpoints", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"neither config\.yaml nor config\.json"):
        open_source(tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ({"residual": "plain"}, "model.residual=plain"),
        ({"n_shared_experts": 2}, "model.n_shared_experts=2"),
        ({"layer_kinds": [LayerKind.dense] * 5, "compress_ratios": [0] * 5}, "layer 0 is dense"),
        ({"compress_ratios": [0, 8, 4, 16, 4]}, r"hca layers use the ratios \[8, 16\]"),
    ],
)
def test_what_transformers_cannot_hold_is_refused_but_goes_official(overrides, names, tmp_path):
    model = write_run(tmp_path / "run", tiny_model(tiny_config(**overrides)))
    source = open_source(tmp_path / "run")
    with pytest.raises(ValueError, match=names):
        export_folder(source, tmp_path / "a", FP32[ExportFormat.transformers])
    export_folder(source, tmp_path / "b", replace(FP32[ExportFormat.official], tokenizer=False))
    assert_same_weights(load_model(tmp_path / "b")[0], model)


def test_sources_are_told_apart(run, tmp_path):
    assert isinstance(open_source(run[0]), RunSource)
    export_folder(open_source(run[0]), tmp_path, FP32[ExportFormat.official])
    assert isinstance(open_source(tmp_path), FolderSource)
    assert isinstance(DeepSeekV4(open_source(tmp_path).config), DeepSeekV4)


def test_trained_tokenizer_survives(tmp_path, run, monkeypatch):
    bpe = train_bpe(["the cat sat on the mat. " * 20], 300)
    source = open_source(run[0])
    monkeypatch.setattr(source, "tokenizer", lambda: bpe)
    export_folder(source, tmp_path, FP32[ExportFormat.transformers])
    _, ours = load_model(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "the cat <|endoftext|> sat"
    assert ours.encode(text) == bpe.encode(text)
    assert ours.eos_id == bpe.eos_id == theirs.eos_token_id
    assert theirs("the cat sat")["input_ids"] == bpe.encode("the cat sat")
