"""Folders of safetensors: which files count, which dtypes are read, what is refused by name."""

import json
import logging
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.state_dict import to_official
from quant.export import INDEX, Stored
from tests.train.exchange.exchange_models import CONFIG_TINY, write_run
from train.config.transformers_json import from_transformers_config, transformers_config
from train.exchange.export import ExportFormat, ExportJob, FloatType, export_folder
from train.exchange.open import load_model, open_source

SINK, EMBED = "layers.1.attn.attn_sink", "embed.weight"
QUANTISED, EXPERT = "layers.1.attn.wq_a", "layers.1.ffn.experts.0.w1"
SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run's weights, its plain and quantised folders of one shard each."""
    folder = tmp_path_factory.mktemp("made")
    model = write_run(folder / "run")
    source = open_source(folder / "run")
    export_folder(source, folder / "plain", ExportJob(ExportFormat.official, FloatType.fp32))
    export_folder(
        source, folder / "quantised", ExportJob(ExportFormat.quantised, experts=Stored.fp4)
    )
    return model, folder


@pytest.fixture
def plain(made, tmp_path):
    """A copy of the plain folder, and its tensors."""
    shutil.copytree(made[1] / "plain", tmp_path / "out")
    return tmp_path / "out", load_file(tmp_path / "out" / SHARD)


def refused(folder, names):
    with pytest.raises(ValueError, match=re.escape(names)) as error:
        load_model(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def change_index(folder, **tensors):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {
        k: v for k, v in (index["weight_map"] | tensors).items() if v is not None
    }
    (folder / INDEX).write_text(json.dumps(index))


# ---- which files count ---------------------------------------------------------------------------
@pytest.mark.core
def test_the_index_decides_and_strays_are_told(made, plain, caplog):
    """A tensor of another export lies beside: what the index names is read, as everywhere else."""
    folder, tensors = plain
    other = {name: torch.full_like(value, 7) for name, value in tensors.items() if "embed" in name}
    for stray in ("model-00001-of-00003.safetensors", "optimizer.safetensors"):
        save_file(other, folder / stray)
    with caplog.at_level(logging.WARNING, "train"):
        model, _ = load_model(folder)
    for name, value in to_official(made[0]).items():
        assert torch.equal(to_official(model)[name], value), name
    told = [r.getMessage() for r in caplog.records if "does not name them" in r.getMessage()]
    assert len(told) == 1
    assert "model-00001-of-00003.safetensors, optimizer.safetensors" in told[0]


def test_a_tensor_that_the_index_puts_elsewhere_is_not_read_here(made, plain):
    folder, tensors = plain
    save_file({EMBED: tensors[EMBED]}, folder / "embed.safetensors")
    save_file(tensors | {EMBED: torch.zeros_like(tensors[EMBED])}, folder / SHARD)
    change_index(folder, **{EMBED: "embed.safetensors"})
    assert torch.equal(load_model(folder)[0].embed.weight, made[0].embed.weight)


@pytest.mark.core
def test_a_name_in_two_files_without_an_index_is_refused(plain):
    folder, tensors = plain
    (folder / INDEX).unlink()
    load_model(folder)
    save_file({SINK: tensors[SINK]}, folder / "b.safetensors")
    refused(folder, f"tensor {SINK} is in b.safetensors and in {SHARD}, and there is no {INDEX}")


def test_an_index_that_contradicts_the_files_is_refused(plain):
    folder, tensors = plain
    change_index(folder, **{SINK: "gone.safetensors"})
    refused(folder, f"{INDEX} names gone.safetensors, which is missing")
    change_index(folder, **{SINK: "../out/" + SHARD})
    refused(folder, f"{INDEX} names ../out/{SHARD}, which is missing")
    change_index(folder, **{SINK: SHARD, "layers.9.x": SHARD})
    refused(folder, f"{INDEX} names tensor layers.9.x in {SHARD}, which does not hold it")
    change_index(folder, **{"layers.9.x": None, SINK: None})
    refused(folder, f"tensor {SINK} is missing")
    change_index(folder, **{SINK: SHARD})
    save_file(tensors, folder / "model.safetensors")
    refused(folder, f"holds model.safetensors and {INDEX}, which does not name it")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_refused(text, plain):
    (plain[0] / INDEX).write_text(text)
    refused(plain[0], f"{INDEX} cannot be read")


# ---- dtypes --------------------------------------------------------------------------------------
@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.bfloat16])
def test_a_scale_of_another_dtype_is_named(dtype, made, tmp_path):
    tensors = load_file(made[1] / "quantised" / SHARD)
    shutil.copy(made[1] / "quantised" / "config.json", tmp_path)
    scale = tensors[f"{QUANTISED}.scale"].view(torch.uint8).to(dtype)
    save_file(tensors | {f"{QUANTISED}.scale": scale}, tmp_path / SHARD)
    dtypes = {torch.float32: "F32", torch.uint8: "U8", torch.bfloat16: "BF16"}
    refused(tmp_path, f"{QUANTISED}.scale has dtype {dtypes[dtype]}, known for it are F8_E8M0")


@pytest.mark.core
def test_a_scale_is_never_dropped(made, tmp_path):
    tensors = load_file(made[1] / "quantised" / SHARD)
    shutil.copy(made[1] / "quantised" / "config.json", tmp_path)
    weight = tensors[f"{QUANTISED}.weight"]
    for other, says in (
        (weight.float().to(torch.float8_e5m2), "weight has dtype F8_E5M2, known for it are F32"),
        (weight.bfloat16(), f"scale is there, but {QUANTISED}.weight has dtype BF16"),
    ):
        save_file(tensors | {f"{QUANTISED}.weight": other}, tmp_path / SHARD)
        refused(tmp_path, says)
    without = {name: value for name, value in tensors.items() if name != f"{EXPERT}.scale"}
    save_file(without, tmp_path / SHARD)
    refused(tmp_path, f"tensor {EXPERT}.scale is missing (its weight has dtype I8)")
    save_file(tensors | {f"{EXPERT}.scale": tensors[f"{EXPERT}.scale"][1:]}, tmp_path / SHARD)
    refused(tmp_path, f"tensor {EXPERT}.scale has shape [15, 1], config.json wants [16, 1]")


@pytest.mark.parametrize(
    ("name", "dtype", "says"),
    [
        (EMBED, torch.int32, f"{EMBED} has dtype I32, known for it are F32, BF16, F16"),
        (EMBED, torch.float64, f"{EMBED} has dtype F64"),
        (SINK, torch.int8, f"{SINK} has dtype I8"),
        ("layers.0.ffn.gate.tid2eid", torch.float32, "tid2eid has dtype F32, known for it are I64"),
    ],
)
def test_a_dtype_that_the_tensor_cannot_have_is_named(name, dtype, says, plain):
    folder, tensors = plain
    save_file(tensors | {name: tensors[name].to(dtype)}, folder / SHARD)
    refused(folder, says)


def test_a_dtype_that_torch_lacks_is_named(plain):
    """FP4 has a dtype of its own in safetensors."""
    folder, _ = plain
    raw = (folder / SHARD).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    entry = header[EMBED]
    begin, end = entry["data_offsets"]
    entry |= {"dtype": "F4", "shape": [end - begin, 2]}
    text = json.dumps(header).encode()
    (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    refused(folder, f"{EMBED} has dtype F4, known for it are")


# ---- values --------------------------------------------------------------------------------------
@pytest.mark.core
@pytest.mark.parametrize("wrong", [-1, CONFIG_TINY.n_routed_experts])
def test_an_expert_that_does_not_exist_is_named(wrong, plain):
    folder, tensors = plain
    name = "layers.0.ffn.gate.tid2eid"
    tensors[name][5, 1] = wrong
    save_file(tensors, folder / SHARD)
    refused(folder, f"tensor {name} names expert {wrong}, but n_routed_experts=8")


@pytest.mark.core
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(wrong, plain):
    folder, tensors = plain
    tensors[f"{EXPERT}.weight"][3, 2] = wrong
    save_file(tensors, folder / SHARD)
    refused(folder, f"tensor {EXPERT}.weight holds NaN or Inf")


def test_a_run_with_weights_that_are_not_finite_is_refused(tmp_path):
    model = write_run(tmp_path / "good")
    model.layers["1"].ffn.experts.w1.weight[0, 0, 0] = torch.nan
    write_run(tmp_path / "run", model)
    with pytest.raises(ValueError, match=r"layers\.1\.ffn\.experts\.w1\.weight holds NaN or Inf"):
        load_model(tmp_path / "run")


# ---- config --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is no JSON"),
        ('{"hc_eps": NaN}', "is no JSON: NaN is no JSON number"),
        ("[]", "is no config: it holds a list"),
        ("[" * 100000, "is no JSON"),
    ],
)
def test_a_config_that_is_none_is_refused(text, says, plain):
    (plain[0] / "config.json").write_text(text)
    refused(plain[0], says)


@pytest.mark.parametrize(
    ("quant", "says"),
    [
        ([], "quant=[]"),
        ({"recipe": "fp2"}, "'fp2' is not a valid Recipe"),
        ({"bits": 4}, "unexpected keyword argument 'bits'"),
        ({"activations": True}, "quant.activations=true acts on linears"),
    ],
)
def test_casts_that_cannot_be_are_refused(quant, says, plain):
    path = plain[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quant": quant}))
    refused(plain[0], says)


def edited(values, path, new):
    *way, last = path.split(".")
    place = values
    for key in way:
        place = place[key]
    if new is None:
        del place[last]
    else:
        place[last] = new
    return values


@pytest.mark.parametrize(
    ("path", "new", "says"),
    [
        ("head_dim", None, "key head_dim is missing"),
        ("index_topk", None, "key index_topk is missing"),
        ("sliding_window", None, "key sliding_window is missing"),
        ("partial_rotary_factor", None, "key partial_rotary_factor is missing"),
        ("partial_rotary_factor", 2.0, "partial_rotary_factor=2.0 must be in (0, 1]"),
        ("layer_types", "swa", "layer_types='swa' must be a list"),
        ("layer_types", ["x"] * 5, "layer_types has 'x', known are"),
        ("mlp_layer_types", None, "mlp_layer_types=None must be a list"),
        ("compress_rates", 4, "compress_rates must hold keys"),
        ("compress_rates.compressed_sparse_attention", None,
         "key compress_rates.compressed_sparse_attention is missing"),
        ("rope_theta", 1.0, "rope_theta=1.0, but rope_parameters.main.rope_theta=10000.0"),
        ("rope_parameters.compress.rope_type", "linear", "compress.rope_type='linear'"),
        ("rope_parameters.compress.attention_factor", 1.2, "attention_factor=1.2"),
        ("rope_parameters.compress.beta_fast", None, "rope_parameters.compress.beta_fast is"),
        ("rope_parameters.main.rope_theta", None, "key rope_parameters.main.rope_theta is missing"),
    ],
)  # fmt: skip
def test_transformers_config_lacks_nothing_silently(path, new, says):
    values = json.loads(json.dumps(transformers_config(CONFIG_TINY)))
    assert from_transformers_config(values).index_topk == CONFIG_TINY.index_topk
    with pytest.raises(ValueError, match=re.escape(says)):
        from_transformers_config(edited(values, path, new))
