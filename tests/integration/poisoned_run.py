"""A small run over a corpus with a poisoned region: consecutive documents of random characters.

The source is a stream, which is read in its own order, so that the poison comes in consecutive
steps. One step is about one document.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.config import PackingConfig, SourceConfig, SourceKind, ValidationConfig
from optim.config import MatmulDtype
from tests.integration.small_run import small_run
from train.config.recovery import RecoveryConfig, Remedy
from train.config.schema import RunConfig

STEPS, EVERY = 16, 4
FIRST_SPIKE = 9  # two documents are held out, the third is the first step's
GARBAGE = "".join(chr(c) for c in range(33, 97))  # no small letters


def write_poisoned(folder: Path, poison: range = range(11, 15)) -> Path:
    """Documents of one step each, those of ``poison`` garbage; deterministic."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 8))) for _ in range(40)]
    path = folder / "poisoned.jsonl"
    with path.open("w") as file:
        for number in range(80):
            text = " ".join(rng.choices(words, k=60))[:190]
            if number in poison:
                text = "".join(rng.choices(GARBAGE, k=190))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def poisoned_run(folder: Path, corpus: Path, **recovery: Any) -> RunConfig:
    """Config of a run that meets the poison; ``recovery`` overrides its section."""
    run = small_run(
        folder,
        corpus,
        steps=STEPS,
        eval_every=0,
        monitor_every=0,
        checkpoint_every=EVERY,
        log_samples=True,
        recovery=RecoveryConfig(
            **{
                "on_spike": Remedy.rollback,
                "window": 5,
                "threshold": 6.0,
                "patience": 2,
                "anticipatory_steps": 6,
                **recovery,
            }
        ),
    )
    source = SourceConfig(kind=SourceKind.jsonl, path=str(corpus), streaming=True)
    data = replace(
        run.data,
        sources={"words": source},
        packing=PackingConfig(pool_documents=1, pool_rows=0),
        validation=ValidationConfig(bytes=400, max_overlap=1.0),
    )
    muon = replace(run.optim.muon, dtype=MatmulDtype.fp32)
    return replace(run, data=data, optim=replace(run.optim, muon=muon))


def settings(run: RunConfig, **recovery: Any) -> RunConfig:
    """The same run with another section ``train.recovery``."""
    changed = replace(run.train.recovery, **recovery)
    return replace(run, train=replace(run.train, recovery=changed))
