"""Folders of finished runs as the trainer leaves them, without training: config and receipt fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import yaml

from train.config.load import dump
from train.config.schema import RunConfig
from train.record.receipt import config_hash, plain

CODE = "c" * 64


def leave_run(
    folder: Path,
    run: RunConfig,
    curve: Mapping[int, float | None],
    code: str = CODE,
    bits_per_nat: float = 0.5,
    seconds: float = 0.5,
    text: str = "same",
) -> Path:
    """Write what a run with these validation losses (step -> nats) leaves."""
    run = replace(run, run_dir=str(folder))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(run))
    records = [
        {"step": step, "tokens": step * 64, "loss": loss, "val_loss": loss, "step_seconds": 1.0,
         "step_cpu_seconds": seconds, "past_window": 0.5, "val_text": text,
         "val_bits_per_byte": None if loss is None else bits_per_nat * loss}
        for step, loss in curve.items()
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    receipt = {
        "config_sha256": config_hash(yaml.safe_load((folder / "config.yaml").read_text())),
        "code": {"source_sha256": code, "commit": None, "changed_files": None},
        "data": {"seed": run.seed, "sources": {"words": {"store": "d" * 64}}},
        "layout": plain(run.parallel),
        "environment": {"torch_threads": 1},
        "finished": True,
        "progress": {"step": max(curve)},
        "final_metrics": records[-1],
    }
    (folder / "receipt.json").write_text(json.dumps(receipt))
    return folder
