"""Finished runs, found by what they are and not by where they lie.

A run's identity is its whole config without the folder (and without the path that weights came
from): an arm that several studies share is trained once, wherever its folder is. A run counts as
finished when its receipt says so, the receipt's hash is that of the config beside it, and the code
was the same. ``archive`` keeps the small files of a run, enough for every report; weights stay
behind.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from train.config.schema import RunConfig, load
from train.errors import UserError
from train.record.metrics import Record, read_metrics
from train.record.receipt import config_hash, plain
from train.record.report import EVALUATION, RECEIPT
from train.run_folder.folder import CHECKPOINTS, CONFIG, METRICS

log = logging.getLogger(__name__)

_NOT_IDENTITY = ("run_dir", "init_from", "wandb", "tensorboard")
# Of metrics.jsonl: what reports read. The rest triples the size of an archive.
_KEPT = (
    "step", "tokens", "loss", "val_loss", "val_bits_per_byte", "lr", "skipped_steps",
    "indexer_leaves_out", "indexer_captured_mass", "past_window", "past_hca_block", "dead_experts",
    "step_seconds", "step_cpu_seconds", "peak_memory_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class FinishedRun:
    """One run that came to its end.

    Attributes:
        folder: where it lies.
        run: its config, as today's code reads it.
        receipt: what it left behind.
        records: its metrics; empty of an evaluation.
    """

    folder: Path
    run: RunConfig
    receipt: Mapping[str, Any]
    records: list[Record]

    @property
    def identity(self) -> str:
        """See :func:`identity_of`."""
        return identity_of(self.run, self.is_evaluation)

    @property
    def name(self) -> str:
        """Of its archive: the hash in its receipt, which no later code changes."""
        return str(self.receipt["config_sha256"])[:12]

    @property
    def is_evaluation(self) -> bool:
        """Whether weights of another run were evaluated and nothing trained."""
        return "metrics" in self.receipt

    @property
    def code(self) -> str:
        """Hash of the sources it ran on."""
        return str(self.receipt["code"]["source_sha256"])

    @property
    def val_loss(self) -> float:
        """Validation loss after the last step, nats per token; infinite where it was not finite."""
        last = self.receipt["metrics" if self.is_evaluation else "final_metrics"]
        value = last.get("val_loss")
        return float("inf") if value is None else float(value)

    @property
    def bits_per_byte(self) -> float | None:
        """Of the validation text, after the last step."""
        return self.receipt["metrics" if self.is_evaluation else "final_metrics"].get(
            "val_bits_per_byte"
        )

    @property
    def rows_evaluated(self) -> float | None:
        """Tokens per byte of the text behind ``val_loss``: equal where the rows were the same."""
        bits = self.bits_per_byte
        return None if bits is None or not self.val_loss else bits * math.log(2) / self.val_loss

    @property
    def has_weights(self) -> bool:
        """Whether a checkpoint lies there too."""
        return any((self.folder / CHECKPOINTS).glob("step_*"))


def identity_of(run: RunConfig, evaluation: bool = False) -> str:
    """Twelve hex digits that equal runs share."""
    content = {key: value for key, value in plain(run).items() if key not in _NOT_IDENTITY}
    return config_hash({**content, "evaluation": evaluation})[:12]


def read_run(folder: Path) -> FinishedRun:
    """Read one run folder, or the archive of one.

    Raises:
        UserError: it holds no finished run, or its receipt is of another config.
    """
    name = EVALUATION if (folder / EVALUATION).is_file() else RECEIPT
    try:
        raw = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        receipt = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{folder} holds no finished run: {error}") from error
    if name == RECEIPT and not receipt["finished"]:
        raise UserError(f"{folder}: the run stopped after step {receipt['progress']['step']}")
    if receipt["config_sha256"] != config_hash(raw):
        raise UserError(
            f"{folder}: {name} is of the config {receipt['config_sha256'][:12]}, but {CONFIG} is"
            f" {config_hash(raw)[:12]}"
        )
    try:
        run = load(DictConfig(raw))
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error
    return FinishedRun(folder, run, receipt, read_metrics(folder / METRICS))


class Store:
    """The finished runs below some folders.

    Args:
        folders: searched in this order; of equal runs the first counts.
        code: hash of the sources that a run must have run on; None: any.
    """

    def __init__(self, folders: Iterable[Path], code: str | None) -> None:
        self._folders, self._code = list(folders), code
        self.runs: dict[str, FinishedRun] = {}  # by identity
        self.other_code: dict[str, FinishedRun] = {}
        self._seen: set[Path] = set()
        self.scan()

    def scan(self) -> None:
        """Look for runs that have finished since."""
        for folder in self._folders:
            for name in (RECEIPT, EVALUATION):
                for path in sorted(folder.rglob(name)):
                    self._take(path.parent)

    def _take(self, folder: Path) -> None:
        if folder in self._seen:
            return
        try:
            found = read_run(folder)
        except UserError as error:  # unfinished, or damaged: it is run again
            log.debug("passed over: %s", error)
            return
        self._seen.add(folder)
        right = self._code in (None, found.code)
        (self.runs if right else self.other_code).setdefault(found.identity, found)


def archive(found: FinishedRun, root: Path) -> Path:
    """Copy what reports need to ``root/NAME`` and return that folder."""
    target = root / found.name
    if target.is_dir() and target != found.folder:
        shutil.rmtree(target)
    if target != found.folder:
        aside = root / f".{found.name}.writing"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name in (CONFIG, RECEIPT, EVALUATION):
            if (found.folder / name).is_file():
                shutil.copyfile(found.folder / name, aside / name)
        if found.records:
            lines = [
                json.dumps({key: record[key] for key in _KEPT if key in record}, allow_nan=False)
                + "\n"
                for record in found.records
            ]
            (aside / METRICS).write_text("".join(lines), encoding="utf-8")
        aside.rename(target)
    return target
