"""Finished runs, found by what they are and not by where they lie.

A run's identity is its whole config without the folder (and without the path that weights came
from): an arm that several studies share is trained once, wherever its folder is. A run counts as
finished when its receipt says so, the receipt's hash is that of the config beside it, and the code
was the same. Runs lie in folders as the trainer leaves them, or in the archive of a study
(``scripts/studies/archive.py``), where a run is named ``NAME.tar.xz/RUN``.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from train.config.load import load
from train.config.schema import RunConfig
from train.errors import UserError
from train.record.metrics import Record, read_metrics
from train.record.receipt import RECEIPT, config_hash, plain
from train.record.report import EVALUATION
from train.run_folder.folder import CHECKPOINTS, CONFIG, METRICS

log = logging.getLogger(__name__)

ARCHIVED = ".tar.xz"
PROBE = "probe.json"  # what a study asked it, if any
_NOT_IDENTITY = ("run_dir", "init_from", "wandb", "tensorboard", "sample")


@dataclass(frozen=True)
class FinishedRun:
    """One run that came to its end.

    Attributes:
        folder: where it lies.
        run: its config, as today's code reads it.
        receipt: what it left behind.
        records: its metrics; empty of an evaluation.
        files: name -> bytes of its config and its receipt, as they lie there; of an archive the
            answers to a probe, too.
    """

    folder: Path
    run: RunConfig
    receipt: Mapping[str, Any]
    records: list[Record]
    files: Mapping[str, bytes] = field(repr=False)

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
    def step_seconds(self) -> float:
        """Median over the steps: CPU seconds of the process on a CPU, else wall-clock."""
        on_cpu = self.receipt["environment"].get("device", "cpu") == "cpu"
        key = "step_cpu_seconds" if on_cpu else "step_seconds"
        return statistics.median(record[key] for record in self.records)

    @property
    def weight_errors(self) -> dict[str, float]:
        """Of an evaluation: quantised weight -> squared error over squared norm."""
        return dict(self.receipt.get("quantised", {}))

    @property
    def probe(self) -> bytes | None:
        """What ``v4 probe`` found, which may be later than the run; None before."""
        file = self.folder / PROBE
        return file.read_bytes() if file.is_file() else self.files.get(PROBE)

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
    """Read one run folder, or one run of an archive (``NAME.tar.xz/RUN``).

    Raises:
        UserError: it holds no finished run, or its receipt is of another config.
    """
    if folder.parent.is_file():
        return parse_run(folder, read_archive(folder.parent).get(folder.name, {}))
    names = [name for name in (CONFIG, RECEIPT, EVALUATION) if (folder / name).is_file()]
    return parse_run(folder, {name: (folder / name).read_bytes() for name in names})


def read_archive(path: Path) -> dict[str, dict[str, bytes]]:
    """Every run of a study's archive: its name -> its files.

    Raises:
        UserError: it is no archive.
    """
    runs: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                run, _, name = member.name.rpartition("/")
                file = archive.extractfile(member)
                if file is not None:
                    runs.setdefault(run, {})[name] = file.read()
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{path} is no archive of runs: {error}") from error
    return runs


def parse_run(folder: Path, files: Mapping[str, bytes]) -> FinishedRun:
    """A run from its files; metrics are read from the folder where they are not among these.

    Raises:
        UserError: as :func:`read_run`.
    """
    name = EVALUATION if EVALUATION in files else RECEIPT
    if not files.keys() >= {CONFIG, name}:
        raise UserError(f"{folder} holds no finished run: no {CONFIG} with {RECEIPT}")
    try:
        raw = yaml.safe_load(files[CONFIG])
        receipt = json.loads(files[name])
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{folder} holds no finished run: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{folder / CONFIG} is damaged: it holds no config")
    if (lacks := _lacks(receipt, name)) is not None:
        raise UserError(f"{folder / name} is damaged: it holds no {lacks}")
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
    if METRICS in files:
        records = [json.loads(line) for line in files[METRICS].splitlines()]
    else:
        records = read_metrics(folder / METRICS)
    kept = {n: files[n] for n in (CONFIG, name, PROBE) if n in files}
    return FinishedRun(folder, run, receipt, records, kept)


# Of a receipt and of an evaluation's: the values that are read here, with their types.
_READ: dict[str, type] = {
    "config_sha256": str, "code.source_sha256": str,
}  # fmt: skip
_READ_OF = {
    RECEIPT: _READ | {"finished": bool, "progress.step": int, "final_metrics": dict},
    EVALUATION: _READ | {"metrics": dict},
}
_NUMBERS = ("val_loss", "val_bits_per_byte")


def _lacks(receipt: Any, name: str) -> str | None:
    """The first key that a receipt has not, or with a value of another type; None: all are well."""
    for key, kind in _READ_OF[name].items():
        value = receipt
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if type(value) is not kind:
            return key
    metrics = receipt["final_metrics" if name == RECEIPT else "metrics"]
    for key in _NUMBERS:
        if type(metrics.get(key)) not in (int, float, type(None)):
            return f"number under {key}"
    return None


class Store:
    """The finished runs below some folders, and in the archives there.

    Args:
        folders: searched in this order, runs before archives; of equal runs the first counts.
        code: hash of the sources that a run must have run on; None: any.
    """

    def __init__(self, folders: Iterable[Path], code: str | None) -> None:
        self._folders, self._code = list(folders), code
        self.runs: dict[str, FinishedRun] = {}  # by identity
        self.other_code: dict[str, FinishedRun] = {}
        self._seen: set[Path | bytes] = set()
        self._scan_archives = True  # once: only folders get new runs
        self.scan()

    def scan(self) -> None:
        """Look for runs that have finished since."""
        for folder in self._folders:
            for name in (RECEIPT, EVALUATION):
                for path in sorted(folder.rglob(name)):
                    self._take(path.parent)
            if self._scan_archives:
                archives = [folder] if folder.is_file() else folder.rglob(f"*{ARCHIVED}")
                for path in sorted(archives):
                    for run, files in read_archive(path).items():
                        if CONFIG in files:  # else: what says of the study itself
                            self._take(path / run, files)
        self._scan_archives = False

    def _take(self, folder: Path, files: Mapping[str, bytes] | None = None) -> None:
        """Take a run up; several archives may hold the same one."""
        key = folder if files is None else b"".join(files[n] for n in sorted(files))
        if key in self._seen:
            return
        try:
            found = read_run(folder) if files is None else parse_run(folder, files)
        except UserError as error:  # unfinished, or damaged: it is run again
            log.debug("passed over: %s", error)
            return
        self._seen.add(key)
        right = self._code in (None, found.code)
        (self.runs if right else self.other_code).setdefault(found.identity, found)
