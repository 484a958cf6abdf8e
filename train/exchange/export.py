"""Writes models: ``transformers`` folders, official folders plain or quantised.

A folder is written shard by shard from any source of ``exchange/open.py``. Each shard is written
beside its place and renamed when complete, and says in its header what it was made from; a stopped
export started again keeps those that fit. The index comes last. Memory: one shard, and the largest
piece (``transformers`` stacks the experts of a layer).
"""

# Legend: E experts, I expert width, D hidden
from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.tokenizer import Tokenizer
from model.config_json import official_config
from model.state_dict import transformers_name
from quant.export import INDEX, Stored, index_of, quantise_official, stored_as
from train.config.model_json import CONFIG_JSON, QUANT_KEY, quant_values
from train.config.transformers_json import transformers_config
from train.errors import UserError, one_line
from train.exchange.model_card import CARD, UNKNOWN_LICENCE, model_card
from train.exchange.model_source import ModelSource
from train.exchange.output_files import (
    alone_in,
    check_target,
    json_bytes,
    replacing,
    write_bytes,
)
from train.exchange.tokenizer_files import tokenizer_files

SHARD_BYTES = 4 << 30
GENERATION_JSON = "generation_config.json"
ShowProgress = Callable[[int, int], None]  # bytes done, all bytes


class ExportFormat(StrEnum):
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
        licence: identifier in the model card.
    """

    layout: ExportFormat
    dtype: FloatType = FloatType.bf16
    experts: Stored = Stored.fp4
    shard_bytes: int = SHARD_BYTES
    tokenizer: bool = True
    licence: str = UNKNOWN_LICENCE

    def label(self) -> str:
        """Tells jobs apart whose shards differ."""
        detail = self.experts if self.layout is ExportFormat.quantised else self.dtype
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
    source: ModelSource,
    target: Path,
    job: ExportJob,
    report: ShowProgress = lambda done, total: None,
) -> None:
    """Write a source as a folder of safetensors, configs, the tokenizer and a model card.

    Args:
        source: what to write.
        target: made if need be; must be empty or hold an earlier part of the same job.
        job: layout, dtypes and sizes.
        report: called with the bytes done and all bytes.

    Raises:
        UserError: ``target`` holds something else or is being written, or the layout cannot hold
            the model.
    """
    shards = _shards(source, job)
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    origin = {"source": source.origin, "job": job.label()}
    files = _files(source, job)
    with alone_in(target):
        # The model card last: of what differs, it says the least.
        first = {name: content for name, content in files.items() if name != CARD}
        check_target(target, first, [*names, INDEX, CARD], "export")
        _check_shards(target, names, origin)
        check_target(target, files, [*names, INDEX], "export")
        for name, content in files.items():
            write_bytes(target / name, content)
        done, total = 0, sum(piece.nbytes for shard in shards for piece in shard)
        for name, shard in zip(names, shards, strict=True):
            if not (target / name).exists():
                _write_shard(target / name, shard, origin)
            done += sum(piece.nbytes for piece in shard)
            report(done, total)
        write_bytes(target / INDEX, json_bytes(index_of(target / name for name in names)))


def _check_shards(target: Path, names: list[str], origin: dict[str, str]) -> None:
    """Look into the shards that are there.

    Raises:
        UserError: one was made from something else.
    """
    for path in (target / name for name in names if (target / name).exists()):
        try:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read: {one_line(error)}") from error
        for key, value in origin.items():
            if found.get(key) != value:
                raise UserError(
                    f"target {target} holds {path.name}, made from {key} {found.get(key)!r} and not"
                    f" {value!r}: choose an empty folder"
                )


def _write_shard(path: Path, shard: list[_Piece], origin: dict[str, str]) -> None:
    tensors: dict[str, Tensor] = {}
    for piece in shard:
        tensors |= piece.make()
    with replacing(path) as aside:
        try:
            save_file(tensors, aside, metadata={"format": "pt", **origin})
        except SafetensorError as error:  # the library tells the system's errors by their number
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _shards(source: ModelSource, job: ExportJob) -> list[list[_Piece]]:
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
def _plain(source: ModelSource, job: ExportJob, name: str, written: str) -> _Piece:
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


def _official_pieces(source: ModelSource, job: ExportJob) -> Iterator[_Piece]:
    for name in source.shapes:
        yield _plain(source, job, name, name)


def _quantised_pieces(source: ModelSource, job: ExportJob) -> Iterator[_Piece]:
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


def _transformers_pieces(source: ModelSource, job: ExportJob) -> Iterator[_Piece]:
    """Their names; MTP blocks, which they pass over, under the official ones."""
    for name in source.shapes:
        expert = _EXPERT.fullmatch(name)
        if expert is None:
            is_mtp = name.startswith("mtp.")
            yield _plain(source, job, name, name if is_mtp else transformers_name(name))
        elif expert[2] == "0" and expert[3] != "w3":  # where a stack begins
            yield _stack(source, job, expert[1], expert[3])


def _stack(source: ModelSource, job: ExportJob, layer: str, matrix: str) -> _Piece:
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


_PIECES: dict[ExportFormat, Callable[[ModelSource, ExportJob], Iterator[_Piece]]] = {
    ExportFormat.transformers: _transformers_pieces,
    ExportFormat.official: _official_pieces,
    ExportFormat.quantised: _quantised_pieces,
}


# ---- config and tokenizer ------------------------------------------------------------------------
def _config(source: ModelSource, job: ExportJob) -> dict[str, Any]:
    plain = job.layout is not ExportFormat.quantised
    if job.layout is ExportFormat.transformers:
        values = transformers_config(source.config)
    else:
        values = official_config(replace(source.config, yarn_from_seq_len=0))
    dtype = job.dtype if plain else FloatType.bf16
    values["dtype"] = {FloatType.fp32: "float32", FloatType.bf16: "bfloat16"}[dtype]
    values["bos_token_id"] = None  # never added (reference E.3)
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


def _files(source: ModelSource, job: ExportJob) -> dict[str, bytes]:
    """All that is not a tensor, by name."""
    config, tokenizer = _config(source, job), source.tokenizer() if job.tokenizer else None
    dtype = config["dtype"] if job.layout is not ExportFormat.quantised else job.experts.value
    card = model_card(source.config, job.layout.value, dtype, source.provenance, job.licence)
    files = small_files(config, tokenizer) | {CARD: card.encode()}
    if tokenizer is not None:
        ends = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id}
        files[GENERATION_JSON] = json_bytes(ends)
    return files


def small_files(config: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """``config.json``, with the end-of-document id, and the tokenizer's files, by name.

    Raises:
        UserError: the tokenizer cannot be written so that it gives the same ids.
    """
    config = {**config, "eos_token_id": tokenizer.eos_id if tokenizer is not None else None}
    files = {CONFIG_JSON: json_bytes(config)}
    if tokenizer is not None:
        length = config["max_position_embeddings"]
        files |= {n: json_bytes(v) for n, v in tokenizer_files(tokenizer, length).items()}
    return files
