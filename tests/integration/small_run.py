"""A whole run in about a second: the real loop on a small model and a generated corpus."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import torch

from data.config import DataConfig, PackingConfig, SourceConfig, SourceKind, ValidationConfig
from optim.config import OptimConfig, ScheduleConfig
from tests.helpers import small_config
from tests.train.checkpoint.folders import locate
from train.build import build
from train.checkpoint import reader as checkpoint_reader
from train.config.schema import Device, Precision, RunConfig, SampleConfig, TrainConfig
from train.loop import Trainer
from train.record.metrics import Record, read_metrics, unmeasured

SEQ_LEN, ROWS = 48, 4


def write_corpus(folder: Path, documents: int = 60) -> Path:
    """Documents of 20 to 400 words, deterministic; some shorter than a row, most longer."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 8))) for _ in range(80)]
    path = folder / "corpus.jsonl"
    with path.open("w") as file:
        for _ in range(documents):
            text = " ".join(rng.choices(words, k=rng.choice((20, 60, 120, 400))))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def small_run(folder: Path, corpus: Path, steps: int = 6, **train: Any) -> RunConfig:
    """Config of a run with every loss on; ``train`` overrides its section."""
    return RunConfig(
        run_dir=str(folder),
        model=small_config(vocab_size=260),
        data=DataConfig(
            tokenizer="byte",
            cache_dir=str(corpus.parent / "cache"),
            sources={"words": SourceConfig(kind=SourceKind.jsonl, path=str(corpus))},
            packing=PackingConfig(pool_documents=16),
            validation=ValidationConfig(bytes=2000, max_overlap=1.0),
        ),
        optim=OptimConfig(lr=3e-3, schedule=ScheduleConfig(warmup_steps=2, decay_start=0.5)),
        train=TrainConfig(
            **{
                "steps": steps,
                "seq_len": SEQ_LEN,
                "global_batch_tokens": ROWS * SEQ_LEN,
                "micro_batch_size": 2,
                "precision": Precision.fp32,
                "device": Device.cpu,
                "eval_tokens": 4 * SEQ_LEN,
                "eval_every": 3,
                "monitor_every": 2,
                **train,
            }
        ),
        sample=SampleConfig(prompt="the", tokens=4),
    )


def fit(run: RunConfig) -> tuple[int, Trainer]:
    """Build and run; the exit code."""
    trainer = build(run)
    return trainer.fit(), trainer


def metrics_of(run: RunConfig) -> list[Record]:
    """What two equal runs share."""
    return [unmeasured(r) for r in read_metrics(Path(run.run_dir) / "metrics.jsonl")]


def final_tensors(run: RunConfig) -> dict[str, torch.Tensor]:
    """Everything in the newest checkpoint of a run."""
    path = locate(run.run_dir)
    index = checkpoint_reader.dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {n: torch.empty(e.size, dtype=e.properties.dtype) for n, e in index.items()}
    checkpoint_reader.read(path, tensors)
    return tensors


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names that differ in presence or in any bit."""
    return sorted({*a, *b} - {n for n in a.keys() & b.keys() if torch.equal(a[n], b[n])})


class Killed(BaseException):
    """As sudden as a signal nobody can catch: nothing in the loop expects it."""


class KillAfter:
    """A tracker that ends the run after a step's line is written and before its checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def show(self, record: Record) -> None:
        if record["step"] == self.step:
            raise Killed

    def rewind(self, step: int) -> None:
        pass

    def before_save(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


class SignalAfter(KillAfter):
    """A tracker that sends this process a signal after a step."""

    def __init__(self, step: int, number: int) -> None:
        super().__init__(step)
        self.number = number

    def show(self, record: Record) -> None:
        if record["step"] == self.step:
            os.kill(os.getpid(), self.number)
