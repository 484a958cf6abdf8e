"""What changes between stages besides the objective: who trains, quantisation, YaRN, shards."""

from __future__ import annotations

import logging
from collections.abc import Callable

from model.transformer import DeepSeekV4
from parallel.engine import Engine
from quant.apply import QuantRecord, absent_parts, apply_quant, remove_quant
from quant.config import QuantConfig
from quant.probe import QuantProbe
from train.errors import UserError
from train.stages import trains
from train.step import StepPlan

log = logging.getLogger(__name__)


class PhaseSwitch:
    """Brings model and optimizer into the state that a step needs; cheap where nothing changes.

    Args:
        engine: holds the model.
        quant: the ``quant`` section.

    Attributes:
        probe: what quantisation did in the current step.
        records: seams that are quantised now.
    """

    def __init__(self, engine: Engine, quant: QuantConfig) -> None:
        assert isinstance(engine.model, DeepSeekV4)
        self._engine, self._model, self._quant = engine, engine.model, quant
        self.probe = QuantProbe()
        self.records: list[QuantRecord] = []
        self._quantised = False
        self._frozen: frozenset[str] | None = None

    def enter(self, step: StepPlan) -> None:
        """Prepare for ``step``."""
        self._engine.cut_rows(step.stage.cp)
        self._model.yarn = step.stage.seq_len >= self._model.config.yarn_from_seq_len
        self.quantise(step.stage.quantised)
        trained = trained_names(step)
        frozen = frozenset(n for n, _ in self._model.named_parameters() if not trained(n))
        if frozen != self._frozen:
            self._engine.set_trainable(trained)
            self._frozen = frozen
            log.info("stage %s: %d parameters frozen", step.stage.name, len(frozen))

    def quantise(self, on: bool) -> None:
        """Swap quantisation in or out.

        Raises:
            ValueError: a part that is asked for finds nothing to act on in this model.
        """
        if on and self._quant.active and not self._quantised:
            self._quantised = True
            self.records = apply_quant(
                self._model, self._quant, self.probe, keep_weights=not self._engine.sharded
            )
            missing = self._engine.gather(absent_parts(self._quant, self.records))
            absent = [part for part in missing[0] if all(part in some for some in missing)]
            if absent:  # on every rank: a pipeline stage may well have none
                raise UserError(
                    f"quant.{absent[0]} is asked for (recipe {self._quant.recipe.value}) but"
                    f" model.name={self._model.config.name} has nothing that it acts on"
                )
        elif not on and self._quantised:
            remove_quant(self.records)
            self.records, self._quantised = [], False


def trained_names(step: StepPlan) -> Callable[[str], bool]:
    """Predicate: which parameters learn in ``step``."""
    return lambda name: trains(name, step.stage, step.weights)
