"""Collects the evidence of one audited step while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable

from parallel.engine import Engine, Shares, Update
from parallel.pieces import fingerprints, norms_of
from train.audit.checks import BEFORE_UPDATE
from train.audit.evidence import Evidence
from train.audit.faults import faults_of, refuse
from train.audit.samples import AuditSample


class Observer:
    """Collects the evidence of one step."""

    def __init__(
        self,
        evidence: Evidence,
        engine: Engine,
        samples: Callable[[Evidence], dict[str, AuditSample]],
    ) -> None:
        self.evidence, self._engine, self._samples = evidence, engine, samples
        self._weights: dict[str, tuple[int, int]] = {}
        self._states: dict[str, tuple[int, int]] = {}

    def before_step(self) -> None:
        """Note the bits of what may move and of what must not."""
        self._weights, self._states = self._bits()

    def after_backward(self, shares: Shares) -> None:
        """Note gradients and losses, and judge them before anything moves.

        Losses that are not finite are not judged: ``train.recovery`` says what becomes of such a
        step, in an audited step as in any other. Where the operations of a compiled block give
        finite ones, its graph is the fault.
        """
        e = self.evidence
        e.shares = shares
        for name, parameter in e.model.named_parameters():
            if parameter.requires_grad:
                e.requires_grad.add(name)
        for name, gradient in self._engine.gradients():
            e.grad_norms[name] = norms_of(gradient, ".ffn.experts." in name)
        if e.compiled is not None:
            e.by_operations.distances = e.by_operations.compare(self._engine.gradients())
            e.by_operations.gradients.clear()
        e.seams.settle()
        e.early = self._changed(self._weights, fingerprints(self._engine.weights()))
        e.samples = self._samples(e)
        assert shares.total is not None
        if math.isfinite(float(shares.total)):
            refuse(self._engine, faults_of(BEFORE_UPDATE, e))
        elif e.compiled is not None and math.isfinite(float(e.by_operations.shares.total or 0.0)):
            refuse(self._engine, faults_of({"compiled": BEFORE_UPDATE["compiled"]}, e))

    def after_update(self, update: Update) -> None:
        """Note what moved; frozen parameters keep their state objects, so both are compared."""
        e = self.evidence
        e.update = update
        e.optimizer_after = self._engine.optimizer.state_dict()
        e.moved = dict(self._engine.optimizer.moved)
        e.weights = dict(self._engine.weights())
        e.stale = self._engine.stale()
        weights, states = self._bits()
        e.changed = self._changed(self._weights, weights)
        e.changed_states = self._changed(self._states, states)

    def _bits(self) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]]:
        states = {
            f"{name}.{key}": tensor
            for name, tensors in self._engine.optimizer.state_dict().items()
            if name not in self.evidence.trained
            for key, tensor in tensors.items()
        }
        return fingerprints(self._engine.weights()), fingerprints(states)

    def _changed(
        self, before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]
    ) -> set[str]:
        """Names that changed on any rank."""
        mine = [name for name, bits in before.items() if after[name] != bits]
        return {name for names in self._engine.gather(mine) for name in names}
