"""Writes a model as a checkpoint that a run can start from."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model.config_json import official_config
from train.checkpoint.manager import Checkpoints
from train.config.model_json import QUANT_KEY, quant_values
from train.errors import UserError
from train.exchange.export import ShowProgress, small_files
from train.exchange.model_source import ModelSource, meta_model
from train.exchange.open import fill_parameter
from train.exchange.output_files import (
    alone_in,
    check_target,
    file_errors,
    make_folder,
    replacing,
    write_bytes,
)
from train.run_folder.folder import CHECKPOINTS

_STAGING, _ORIGIN = "importing", "origin"


def import_checkpoint(
    source: ModelSource, target: Path, report: ShowProgress = lambda done, total: None
) -> Path:
    """Write a source as a checkpoint that ``init_from``, and everything here, can read.

    Parameters are first laid out as files, one each, which the checkpoint is then written from
    without being in memory; so a stopped import goes on, and needs twice the model's size on disk.

    Args:
        source: what to write.
        target: folder of the imported model: ``config.json``, tokenizer, ``checkpoints/``; must be
            empty or hold an earlier part of the same import.
        report: called with the bytes done and all bytes.

    Returns:
        The checkpoint.

    Raises:
        UserError: ``target`` holds a model already, part of another one or something else, or is
            being written.
    """
    config = official_config(replace(source.config, yarn_from_seq_len=0))
    if source.quant is not None:
        config[QUANT_KEY] = quant_values(source.quant)
    files = small_files(config, source.tokenizer())
    with alone_in(target):
        checkpoints = Checkpoints(target / CHECKPOINTS)
        if checkpoints.published():
            raise UserError(f"{target} holds a model already: choose an empty target folder")
        check_target(target, files, [_STAGING, CHECKPOINTS], "import")
        staging = _open_staging(target / _STAGING, source.origin)
        for name, content in files.items():
            write_bytes(target / name, content)
        checkpoints.clean()  # what a killed import left half written
        state = meta_model(source.config).state_dict()
        done, total = 0, sum(tensor.nbytes for tensor in state.values())
        tensors: dict[str, Tensor] = {}
        for name, meta in state.items():
            tensors[f"model.{name}"] = _lay_out(staging, name, meta, source)
            done += meta.nbytes
            report(done, total)
        path = checkpoints.save(0, tensors, {"imported_from": source.origin})
        shutil.rmtree(staging)
        return path


def _open_staging(staging: Path, origin: str) -> Path:
    make_folder(staging)
    mark = staging / _ORIGIN
    if mark.is_file() and mark.read_bytes() != origin.encode():
        raise UserError(
            f"{staging.parent} holds part of an import from elsewhere: choose an empty folder"
        )
    write_bytes(mark, origin.encode())
    return staging


def _lay_out(staging: Path, name: str, meta: Tensor, source: ModelSource) -> Tensor:
    """The parameter as a mapped file, filled unless it was before."""
    final = staging / f"{name}.tensor"
    if not final.exists():
        with replacing(final) as aside:
            _reserve(aside, meta.nbytes)
            fill_parameter(_mapped(aside, meta), name, source)
    with file_errors(final):
        return _mapped(final, meta)


def _mapped(path: Path, meta: Tensor) -> Tensor:
    flat = torch.from_file(str(path), shared=True, size=meta.numel(), dtype=meta.dtype)
    return flat.view(meta.shape)


def _reserve(path: Path, nbytes: int) -> None:
    """Take the disk's space now: a mapped file on a full disk would end the process later."""
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, max(nbytes, 1))
