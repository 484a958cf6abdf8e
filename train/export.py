"""Writes models: ``transformers`` folders, official folders plain or quantised, checkpoints.

A folder is written shard by shard from any source of ``train/exchange.py``. Each shard is written
beside its place and renamed when complete, and says in its header what it was made from; a stopped
export started again keeps those that fit. The index comes last. Memory: one shard, and the largest
piece (``transformers`` stacks the experts of a layer).
"""

# Legend: E experts, I expert width, D hidden
from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from data.tokenizer import EOS, FIM_TOKENS, ByteTokenizer, Tokenizer
from model.config_json import official_config
from model.state_dict import transformers_name
from quant.export import Stored, quantise_official, stored_as, write_index
from train.checkpoint import Checkpoints
from train.errors import UserError, one_line
from train.exchange import fill_parameter
from train.model_source import CONFIG_JSON, QUANT_KEY, Source, meta_state, quant_values
from train.run_folder import CHECKPOINTS
from train.transformers_config import transformers_config

SHARD_BYTES = 4 << 30
Report = Callable[[int, int], None]  # bytes done, all bytes


class Layout(StrEnum):
    """What a folder is for."""

    transformers = "transformers"  # AutoModelForCausalLM
    official = "official"  # released names, plain dtypes
    quantised = "quantised"  # as released: FP8 blocks, packed FP4 experts, scales


class FloatType(StrEnum):
    """Dtype of weights in a plain layout."""

    fp32 = "fp32"
    bf16 = "bf16"  # but for what the released checkpoint keeps in fp32


@dataclass(frozen=True)
class ExportJob:
    """What is written.

    Attributes:
        layout: of the folder.
        dtype: of a plain layout.
        experts: stored format of the routed experts in the quantised layout.
        shard_bytes: a shard holds no more, unless a single tensor does.
        tokenizer: write it too.
    """

    layout: Layout
    dtype: FloatType = FloatType.bf16
    experts: Stored = Stored.fp4
    shard_bytes: int = SHARD_BYTES
    tokenizer: bool = True

    def label(self) -> str:
        """Tells jobs apart whose shards differ."""
        detail = self.experts if self.layout is Layout.quantised else self.dtype
        return f"{self.layout.value} {detail.value}, shards of {self.shard_bytes} bytes"


@dataclass(frozen=True)
class _Piece:
    """Tensors that are made together.

    Attributes:
        nbytes: of them all, about.
        make: does it.
    """

    nbytes: int
    make: Callable[[], dict[str, Tensor]]


def export_folder(
    source: Source, target: Path, job: ExportJob, report: Report = lambda done, total: None
) -> None:
    """Write a source as a folder of safetensors, ``config.json`` and the tokenizer.

    Args:
        source: what to write.
        target: made if need be; must be empty or hold an earlier part of the same job.
        job: layout, dtypes and sizes.
        report: called with the bytes done and all bytes.

    Raises:
        UserError: ``target`` holds something else, or the layout cannot hold the model.
    """
    config = _config(source, job)
    shards = _shards(source, job)
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    origin = {"source": source.origin, "job": job.label()}
    _check_target(target, names, origin)
    target.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(target, source.tokenizer() if job.tokenizer else None, config)
    _write_json(target / CONFIG_JSON, config)
    done, total = 0, sum(piece.nbytes for shard in shards for piece in shard)
    for name, shard in zip(names, shards, strict=True):
        if not (target / name).exists():
            tensors: dict[str, Tensor] = {}
            for piece in shard:
                tensors |= piece.make()
            partial = (target / name).with_suffix(".partial")
            save_file(tensors, partial, metadata={"format": "pt", **origin})
            partial.replace(target / name)
        done += sum(piece.nbytes for piece in shard)
        report(done, total)
    write_index(target, [target / name for name in names])


def _check_target(target: Path, names: list[str], origin: dict[str, str]) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"target {target} is a file")
    for path in sorted(target.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
        except SafetensorError as error:
            raise UserError(f"{path} cannot be read: {one_line(error)}") from error
        other = [key for key in origin if found.get(key) != origin[key]]
        if path.name not in names or other:
            was = f"{other[0]} {found.get(other[0])!r}" if other else "another number of shards"
            raise UserError(
                f"{path} is there already, made from {was}: choose an empty target folder"
            )


def _shards(source: Source, job: ExportJob) -> list[list[_Piece]]:
    shards: list[list[_Piece]] = [[]]
    size = 0
    for piece in _PIECES[job.layout](source, job):
        if shards[-1] and size + piece.nbytes > job.shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    return shards


# ---- layouts -------------------------------------------------------------------------------------
def _plain(source: Source, job: ExportJob, name: str, written: str) -> _Piece:
    dtype = _dtype(name, job.dtype)

    def make() -> dict[str, Tensor]:
        # A copy: experts are views of one stack, which safetensors does not write.
        return {written: source.read(name).to(dtype, copy=True).contiguous()}

    return _Piece(source.shapes[name].numel() * dtype.itemsize, make)


def _dtype(name: str, asked: FloatType) -> torch.dtype:
    stored = stored_as(name)
    if stored is Stored.int64:
        return torch.int64
    plain = asked is FloatType.fp32 or stored is Stored.fp32
    return torch.float32 if plain else torch.bfloat16


def _official_pieces(source: Source, job: ExportJob) -> Iterator[_Piece]:
    for name in source.shapes:
        yield _plain(source, job, name, name)


def _quantised_pieces(source: Source, job: ExportJob) -> Iterator[_Piece]:
    for name, shape in source.shapes.items():
        stored = stored_as(name)
        stored = job.experts if stored is Stored.fp4 else stored

        def make(name: str = name) -> dict[str, Tensor]:
            return dict(quantise_official([(name, source.read(name).clone())], job.experts))

        yield _Piece(int(shape.numel() * _STORED_BYTES[stored]), make)


_STORED_BYTES = {
    Stored.fp4: 0.5 + 1 / 32,
    Stored.fp8: 1.0,
    Stored.bf16: 2.0,
    Stored.fp32: 4.0,
    Stored.int64: 8.0,
}
_EXPERT = re.compile(r"(layers\.\d+)\.ffn\.experts\.(\d+)\.(w[123])\.weight")


def _transformers_pieces(source: Source, job: ExportJob) -> Iterator[_Piece]:
    """Their names; MTP blocks, which they pass over, under the official ones."""
    for name in source.shapes:
        expert = _EXPERT.fullmatch(name)
        if expert is None:
            is_mtp = name.startswith("mtp.")
            yield _plain(source, job, name, name if is_mtp else transformers_name(name))
        elif expert[2] == "0" and expert[3] != "w3":  # where a stack begins
            yield _stack(source, job, expert[1], expert[3])


def _stack(source: Source, job: ExportJob, layer: str, matrix: str) -> _Piece:
    """``gate_up_proj [E, 2 I, D]`` (gate first) or ``down_proj [E, D, I]``."""
    count, dtype = (
        source.config.n_routed_experts,
        _dtype(f"{layer}.ffn.experts.0.w1.weight", job.dtype),
    )
    rows, cols = source.shapes[f"{layer}.ffn.experts.0.{matrix}.weight"]
    parts = ["w2"] if matrix == "w2" else ["w1", "w3"]
    written = f"model.{layer}.mlp.experts." + ("down_proj" if matrix == "w2" else "gate_up_proj")

    def make() -> dict[str, Tensor]:
        stack = torch.empty(count, rows * len(parts), cols, dtype=dtype)
        for place, part in enumerate(parts):  # one of our stacks after the other
            for expert in range(count):
                value = source.read(f"{layer}.ffn.experts.{expert}.{part}.weight")
                stack[expert, place * rows : (place + 1) * rows] = value
        return {written: stack}

    return _Piece(count * rows * len(parts) * cols * dtype.itemsize, make)


_PIECES: dict[Layout, Callable[[Source, ExportJob], Iterator[_Piece]]] = {
    Layout.transformers: _transformers_pieces,
    Layout.official: _official_pieces,
    Layout.quantised: _quantised_pieces,
}


# ---- config and tokenizer ------------------------------------------------------------------------
def _config(source: Source, job: ExportJob) -> dict[str, Any]:
    plain = job.layout is not Layout.quantised
    if job.layout is Layout.transformers:
        values = transformers_config(source.config)
    else:
        values = official_config(replace(source.config, yarn_from_seq_len=0))
    dtype = job.dtype if plain else FloatType.bf16
    values["dtype"] = {FloatType.fp32: "float32", FloatType.bf16: "bfloat16"}[dtype]
    values["bos_token_id"] = None  # never added (V4_SPEC E.3)
    if source.quant is not None:
        values[QUANT_KEY] = quant_values(source.quant)
    if not plain:
        values["expert_dtype"] = job.experts.value
        values["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        }
    return values


def _write_tokenizer(folder: Path, tokenizer: Tokenizer | None, config: dict[str, Any]) -> None:
    """``tokenizer.json`` and its config; the end-of-document id goes into ``config`` too."""
    if tokenizer is None:
        config["eos_token_id"] = None
        return
    inner = tokenizer_json(tokenizer)
    eos = HFTokenizer.from_str(json.dumps(inner, allow_nan=False)).id_to_token(tokenizer.eos_id)
    _write_json(folder / "tokenizer.json", inner)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "add_eos_token": False,
            "eos_token": eos,
            "pad_token": eos,
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        },
    )
    config["eos_token_id"] = tokenizer.eos_id


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The same tokenizer for the ``tokenizers`` library."""
    if not isinstance(tokenizer, ByteTokenizer):
        return json.loads(tokenizer.serialise())["tokenizer"]
    # BPE without merges: the alphabet stands for the bytes, ids in the order of the bytes.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable}
    letter |= {byte: chr(256 + place) for place, byte in enumerate(moved)}
    assert set(letter.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    inner = HFTokenizer(models.BPE({letter[byte]: byte for byte in range(256)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([EOS, *FIM_TOKENS])
    return json.loads(inner.to_str())


def _write_json(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", "utf-8")
    partial.replace(path)


# ---- checkpoints ---------------------------------------------------------------------------------
def import_checkpoint(
    source: Source, target: Path, report: Report = lambda done, total: None
) -> Path:
    """Write a source as a checkpoint that ``init_from``, and everything here, can read.

    Parameters are first laid out as files, one each, which the checkpoint is then written from
    without being in memory; so a stopped import goes on, and needs twice the model's size on disk.

    Args:
        source: what to write.
        target: folder of the imported model: ``config.json``, tokenizer, ``checkpoints/``.
        report: called with the bytes done and all bytes.

    Returns:
        The checkpoint.

    Raises:
        UserError: ``target`` holds a model already, or part of another one.
    """
    checkpoints = Checkpoints(target / CHECKPOINTS)
    if checkpoints.published():
        raise UserError(f"{target} holds a model already: choose an empty target folder")
    checkpoints.clean()  # what a killed import left half written
    staging = target / "importing"
    staging.mkdir(parents=True, exist_ok=True)
    mark = staging / "origin"
    if mark.is_file() and mark.read_text("utf-8") != source.origin:
        raise UserError(f"{target} holds part of an import from elsewhere: choose an empty folder")
    mark.write_text(source.origin, "utf-8")
    state = meta_state(source.config)
    done, total = 0, sum(tensor.nbytes for tensor in state.values())
    tensors: dict[str, Tensor] = {}
    for name, meta in state.items():
        tensors[f"model.{name}"] = _lay_out(staging, name, meta, source)
        done += meta.nbytes
        report(done, total)
    config = official_config(replace(source.config, yarn_from_seq_len=0))
    if source.quant is not None:
        config[QUANT_KEY] = quant_values(source.quant)
    _write_tokenizer(target, source.tokenizer(), config)
    _write_json(target / CONFIG_JSON, config)
    path = checkpoints.save(0, tensors, {"imported_from": source.origin})
    shutil.rmtree(staging)
    return path


def _lay_out(staging: Path, name: str, meta: Tensor, source: Source) -> Tensor:
    """The parameter as a mapped file, filled unless it was before."""
    final = staging / f"{name}.tensor"
    fresh = not final.exists()
    path = final.with_suffix(".partial") if fresh else final
    tensor = torch.from_file(str(path), shared=True, size=meta.numel(), dtype=meta.dtype)
    tensor = tensor.view(meta.shape)
    if fresh:
        fill_parameter(tensor, name, source)
        path.replace(final)
    return tensor
