"""One file a study: ``docs/studies/archives/NAME.tar.xz`` holds what its report was made from.

Inside lie ``study.json`` (the study as it was asked, and which run was which cell's) and of every
run its config, its receipt and the metrics that reports read; weights stay behind. Since the cells
are written down, a report can be made again from its archive whatever the defaults of ``conf/`` are
today.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path

from omegaconf import OmegaConf

from scripts.studies.cells import Cell
from scripts.studies.config import StudyConfig
from scripts.studies.protocol import Protocol
from scripts.studies.store import ARCHIVED, PROBE, FinishedRun, Store, parse_run, read_archive
from train.errors import UserError
from train.exchange.output_files import replacing
from train.record.receipt import plain
from train.run_folder.folder import METRICS

STUDY = "study.json"
# Of metrics.jsonl: what reports read. The rest triples the size of an archive.
_KEPT = (
    "step", "tokens", "loss", "val_loss", "val_bits_per_byte", "val_text", "lr",
    "skipped_steps", "indexer_leaves_out", "indexer_captured_mass", "past_window", "past_hca_block",
    "dead_experts", "step_seconds", "step_cpu_seconds", "peak_memory_bytes",
)  # fmt: skip


def archive_of(name: str, folder: Path) -> Path:
    """Where a study's archive lies.

    Args:
        name: of the study.
        folder: of all archives.
    """
    return folder / f"{name}{ARCHIVED}"


def pack(protocol: Protocol, path: Path) -> None:
    """Write a study and everything of it that is finished.

    An older archive there gives way, but for its runs while the study is not complete: they may be
    of another code version, and the only copy.
    """
    cells = protocol.finished()
    listed = [
        [*astuple(cell)[:4], *([list(cell.settings)] if cell.settings else []), run.name]
        for cell, run in cells.items()
    ]
    content = {"study": plain(protocol.study), "cells": listed}
    files = {STUDY: json.dumps(content, allow_nan=False).encode()}
    if path.is_file() and any(done < wanted for _, _, wanted, done in protocol.plan()):
        for name, parts in read_archive(path).items():
            files |= {f"{name}/{part}": data for part, data in parts.items() if name}
    for run in cells.values():
        files |= {f"{run.name}/{name}": data for name, data in _files_of(run).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside, tarfile.open(aside, "w:xz", preset=9) as archive:
        # like beside like compresses best
        for name in sorted(files, key=lambda name: (name.rpartition("/")[2], name)):
            member = tarfile.TarInfo(name)
            member.size = len(files[name])
            archive.addfile(member, io.BytesIO(files[name]))


def _files_of(run: FinishedRun) -> Mapping[str, bytes]:
    files = run.files if run.probe is None else {**run.files, PROBE: run.probe}
    if not run.records:
        return files
    kept = [{key: record[key] for key in _KEPT if key in record} for record in run.records]
    lines = [json.dumps(record, allow_nan=False) + "\n" for record in kept]
    return {**files, METRICS: "".join(lines).encode()}


def open_archive(path: Path) -> Protocol:
    """A study as it was archived: its runs are found by its own list, not by today's defaults.

    Raises:
        UserError: it is no archive of a study, or a run of it cannot be read.
    """
    files = read_archive(path)
    try:
        content = json.loads(files[""][STUDY])
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} holds no readable {STUDY}: {error}") from error
    schema = OmegaConf.structured(StudyConfig)
    study = OmegaConf.to_object(OmegaConf.merge(schema, content["study"]))
    assert isinstance(study, StudyConfig)
    runs = {
        Cell(arm, steps, lr, seed, settings=tuple(*settings)): parse_run(path / name, files[name])
        for arm, steps, lr, seed, *settings, name in content["cells"]
    }
    return Protocol(study, Store([], None), path.parent, runs)
