"""Warnings of a run that goes wrong without failing: collapsed gates, overfitting, large gradients.

A sign is told when it has held for some records, once, with the remedy that the table of metrics
(``train/record/metrics.py``) has for it; it is told again only after it was well for as long. All
of it follows from ``metrics.jsonl``: a start, or a rollback, reads the steps that the run has done
and says nothing of them again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from model.config import ModelConfig
from train.record.gates import PATIENCE, has_idle, is_collapsed, largest_load
from train.record.metrics import Record, metric_of

log = logging.getLogger(__name__)

_ABOVE_BEST = 1.01  # validation loss over its lowest
_USUAL = 10.0  # times the usual norm of the gradient
_FORGET = 0.05  # share of the newest norm in the usual one
_LEARNT = 10  # norms before there is a usual one
_GAIN = 4.0


@dataclass
class Sign:
    """One thing that may go wrong.

    Attributes:
        metric: that shows it.
        text: what is wrong, given the value.
        patience: records for which it must hold, or be gone.
        look: of a record: whether it holds; None: the record does not say.
    """

    metric: str
    text: Callable[[float], str]
    patience: int
    look: Callable[[Mapping[str, Any]], bool | None]
    seen: int = 0  # records in a row that say the same
    holds: bool = False  # what they say
    told: bool = False

    def notices(self, record: Mapping[str, Any]) -> bool:
        """Take a record; whether this is the moment to tell."""
        now = self.look(record)
        if now is None:
            return False
        self.seen = self.seen + 1 if now == self.holds else 1
        self.holds = now
        if self.seen < self.patience or self.told == now:
            return False
        self.told = now
        return now


class Health:
    """A tracker that warns.

    Args:
        model: bounds what a gate can do.
        history: reads the steps that the run has done, oldest first.

    Attributes:
        warnings: told so far: step and text.
    """

    def __init__(self, model: ModelConfig, history: Callable[[], list[Record]]) -> None:
        self._model, self._history = model, history
        self._read_back()

    def _read_back(self) -> None:
        self.warnings: list[tuple[int, str]] = []
        self._best: float | None = None
        self._log_norm, self._norms = 0.0, 0  # of the usual gradient; norms that it is made of
        self._tokens: int | None = None  # trained before the step that is looked at
        self._signs = self._make_signs()
        for record in self._history():
            self._look(record)

    def show(self, record: Mapping[str, Any]) -> None:
        """Look at a step, and warn where there is reason to."""
        for text in self._look(record):
            log.warning("warning, step %d: %s", record["step"], text)

    def rewind(self, step: int) -> None:
        """Forget the steps that are gone."""
        self._read_back()

    def before_save(self) -> dict[str, Any]:
        """Nothing that metrics.jsonl does not hold."""
        return {}

    def close(self) -> None:
        """Nothing to let go."""

    def _look(self, record: Mapping[str, Any]) -> list[str]:
        told = []
        for sign in self._signs:
            if sign.notices(record):
                value = record.get(sign.metric)
                text = sign.text(math.nan if value is None else float(value))
                told.append(f"{text}; {metric_of(sign.metric).advice}")
        self.warnings += [(record["step"], text) for text in told]
        self._tokens = record.get("tokens")
        return told

    def _make_signs(self) -> list[Sign]:
        most = largest_load(self._model)
        return [
            Sign(
                "expert_load_max",
                lambda v: (
                    f"a gate has collapsed: its busiest expert gets {v:.3g} times the mean of"
                    f" {most:.3g} that are possible (expert_load_max)"
                ),
                PATIENCE,
                lambda r: is_collapsed(r, self._model),
            ),
            Sign(
                "dead_experts",
                lambda v: f"{v:.0f} experts get no token (dead_experts)",
                PATIENCE,
                lambda r: has_idle(r, self._tokens, self._model),
            ),
            Sign(
                "val_loss",
                lambda v: (
                    f"the validation loss rises: val_loss {v:.4g}, its lowest was"
                    f" {math.nan if self._best is None else self._best:.4g}"
                ),
                2,
                self._rises,
            ),
            Sign(
                "grad_norm",
                lambda v: (
                    f"gradients explode: grad_norm {v:.4g}, usual is {math.exp(self._log_norm):.4g}"
                ),
                3,
                self._explodes,
            ),
            Sign(
                "stream_gain",
                lambda v: f"blocks multiply the residual streams by {v:.3g} (stream_gain)",
                2,
                lambda r: _above(r, "stream_gain", _GAIN),
            ),
        ]

    def _rises(self, record: Mapping[str, Any]) -> bool | None:
        loss = record.get("val_loss")
        if loss is None or not math.isfinite(loss):
            return True if "val_loss" in record else None
        best = loss if self._best is None else min(loss, self._best)
        self._best = best
        return loss > _ABOVE_BEST * best

    def _explodes(self, record: Mapping[str, Any]) -> bool | None:
        norm = record.get("grad_norm")
        if norm is None or not math.isfinite(norm):
            return True if "grad_norm" in record else None
        if norm <= 0:
            return None
        if self._norms >= _LEARNT and norm > _USUAL * math.exp(self._log_norm):
            return True
        share = max(_FORGET, 1 / (self._norms + 1))
        self._log_norm += share * (math.log(norm) - self._log_norm)
        self._norms += 1
        return False


def _above(record: Mapping[str, Any], name: str, bound: float) -> bool | None:
    value = record.get(name)
    return None if value is None else value >= bound
