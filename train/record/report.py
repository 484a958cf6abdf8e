"""What a run leaves behind besides checkpoints and metrics: receipt, curve, text, comparison."""

from __future__ import annotations

import logging
import lzma
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.tokenizer import Tokenizer
from model.kernels.select import active_kernels
from model.transformer import DeepSeekV4
from optim.muon import matmul_dtype
from parallel.engine import Engine
from train.config.schema import RunConfig
from train.preflight.precision import PrecisionChoice
from train.record.continuation import continue_text
from train.record.gates import gates_over_the_run
from train.record.metrics import all_finite, read_metrics, told_value
from train.record.plots import draw_losses
from train.record.receipt import (
    HARNESS,
    RECEIPT,
    config_hash,
    environment,
    plain,
    read_receipt,
    write_json,
)
from train.run_folder.folder import METRICS
from train.run_folder.identity import RunIdentity

log = logging.getLogger(__name__)

CURVE, TEXT, EVALUATION = "loss.png", "sample.txt", "evaluation.json"


@dataclass(frozen=True)
class FinalEvaluation:
    """What the evaluation after the last step gave.

    Attributes:
        values: metrics; empty where no text is held out.
        text: the bytes that were scored.
    """

    values: Mapping[str, Any]
    text: bytes

    @property
    def is_finite(self) -> bool:
        """Whether every number is."""
        return all_finite(self.values)


class RunReport:
    """Writes the last files of a run folder: rank 0 does, the others help to write the sample.

    Args:
        run: the config.
        engine: holds the model.
        tokenizer: of the run.
        prompt: what the sample continues.
        identity: what the run is; the receipt quotes it.
        precision: what ``train.precision=auto`` became and why, where that was asked.
    """

    def __init__(
        self,
        run: RunConfig,
        engine: Engine,
        tokenizer: Tokenizer,
        prompt: str,
        identity: RunIdentity,
        precision: PrecisionChoice | None = None,
    ) -> None:
        self._folder, self._seed = Path(run.run_dir), run.seed
        self._weights = run.train.weights.value
        self._title, self._model = run_title(run), run.model
        self._sample = (prompt, run.sample.tokens, run.sample.temperature)
        self._facts = {
            "config_sha256": config_hash(run),
            "data": {"tokenizer": identity.tokenizer, "sources": identity.sources},
            "layout": identity.layout,
            "code": identity.code,
            "environment": environment(engine.device),
            # What optim.muon.dtype=auto became on this device.
            "muon_dtype": str(matmul_dtype(run.optim.muon.dtype, engine.device)).split(".")[1],
            "kernels_selected": active_kernels(run.model.kernels, engine.device),
            "kernels_deterministic": run.model.deterministic,
        }
        if precision is not None:
            self._facts["precision"] = plain(precision)
        self._engine, self._tokenizer = engine, tokenizer

    def write(
        self,
        progress: Mapping[str, Any],
        audit: Mapping[str, Any],
        validation: FinalEvaluation | None,
    ) -> None:
        """Write curve and receipt; of a finished run also a sample and the comparison with xz.

        Args:
            progress: steps, tokens, skipped steps.
            audit: what the audit saw.
            validation: of a finished run, None of one that stopped early.
        """
        if validation is not None and validation.is_finite:
            self.write_text(tell=True)
        if self._engine.rank:
            return
        records = read_metrics(self._folder / METRICS)
        draw_losses(records, self._folder / CURVE, self._title)
        gates, warnings = gates_over_the_run(records, self._model)
        for text in warnings:
            log.warning("audit, over the run: %s", text)
        receipt = {
            **self._facts,
            "finished": validation is not None and validation.is_finite,
            "progress": dict(progress),
            "kernels": dict(audit["kernels"]),  # what ran, by op
            "audit": {**audit, "gates": gates},
            "final_metrics": records[-1] if records else {},
        }
        if validation is not None:
            receipt["validation"] = compare_with_xz(validation)
        if harness := read_receipt(self._folder).get(HARNESS):
            receipt[HARNESS] = harness  # of this or of an earlier step
        write_json(self._folder / RECEIPT, receipt)

    def write_evaluation(
        self, values: Mapping[str, Any], quantised: Mapping[str, float] | None = None
    ) -> None:
        """Write what an evaluation without training gave, and of which weights.

        Args:
            values: metrics.
            quantised: of each quantised weight, squared error over squared norm.
        """
        found = {**self._facts, "weights": self._weights, "metrics": dict(values)}
        if quantised:
            found["quantised"] = dict(quantised)
        write_json(self._folder / EVALUATION, found)
        shown = " ".join(f"{name} {told_value(value)}" for name, value in values.items())
        log.info("evaluation (%s weights): %s", self._weights, shown)

    def write_text(self, tell: bool = False) -> None:
        """Let the model write the sample. Collective.

        Args:
            tell: show it on the console too.
        """
        prompt, tokens, temperature = self._sample
        if not tokens:
            return
        assert isinstance(self._engine.model, DeepSeekV4)
        text = continue_text(
            self._engine.model, self._tokenizer, prompt, tokens, temperature, self._seed,
            self._engine.device, self._engine.same_everywhere,
        )  # fmt: skip
        if self._engine.rank:
            return
        (self._folder / TEXT).write_text(text + "\n", encoding="utf-8")
        if tell:
            log.info("sample (%s):\n%s", self._folder / TEXT, text)


def run_title(run: RunConfig) -> str:
    """What a run is, in a line."""
    return f"{run.model.name}, {run.optim.name.value}, {run.train.precision.value}"


def compare_with_xz(validation: FinalEvaluation) -> dict[str, Any]:
    """Bits per byte of the evaluated text: the model's beside those of ``xz -9e``."""
    text = validation.text
    if not text:
        return {}
    xz = 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    bits = validation.values["val_bits_per_byte"]
    log.info(
        "validation text, %d bytes: %.4f bits per byte under the model, %.4f under xz -9e",
        len(text),
        bits,
        xz,
    )
    found = {"bytes": len(text), "xz_bits_per_byte": xz}
    for metric, value in validation.values.items():
        if metric.startswith("val_"):
            found[metric.removeprefix("val_")] = value
    return found
